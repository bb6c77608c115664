"""The life of an adapter under PEFT's own calls, on a tiny random Llama."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from tiny import X, chosen, edit, layers_of, llama, load, logits, masked, plain_weights, refused, same, step
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from maskft import MaskConfig, find_group
from maskft.masks import unpack_mask


def test_the_method_is_known_to_peft_once_and_survives_copies() -> None:
    assert PeftType("MASKFT") is PeftType.MASKFT
    assert pickle.loads(pickle.dumps(PeftType.MASKFT)) is PeftType.MASKFT
    assert copy.deepcopy(PeftType.MASKFT) is PeftType.MASKFT
    assert [t.value for t in PeftType].count("MASKFT") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": [3]}, "names layer 3, but the model has layers 0 to 2"),
        ({"target_modules": ["q_porj"]}, r"names 'q_porj', which matches no module.*nearest: q_proj"),
        ({"target_modules": ["embed_tokens"]}, "`model.embed_tokens` cannot be masked: it is the model's input or"),
        ({"target_modules": ["q_proj", "lm_head"]}, "`lm_head` cannot be masked: it is the model's input or output"),
        ({"target_modules": ".*(up_proj|lm_head)"}, "`lm_head` cannot be masked: it is the model's input or output"),
        ({"target_modules": ["input_layernorm"]}, r"`model\.layers\.0\.input_layernorm` cannot .* it is a Llama"),
        ({"target_modules": "nothing.*"}, "matches no module"),
        ({"target_modules": ["model.layers.1.mlp.up_proj"], "layers_to_transform": [1]}, "has no effect on the full"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_before_the_model_is_changed(settings, message) -> None:
    model = llama()
    before = [name for name, _ in model.named_modules()]
    with refused(message):
        get_peft_model(model, MaskConfig(**settings))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["train", "keys", "v1.0"])
def test_names_that_pytorch_cannot_have_are_refused(name) -> None:
    with refused(f"An adapter cannot be named '{name}'"):
        get_peft_model(llama(), MaskConfig(), adapter_name=name)


def test_a_vocabulary_that_was_resized_is_refused_before_anything_is_trained(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    with refused(r"vocabulary of 70 and .*base one of 64, so it was resized"):
        get_peft_model(model, MaskConfig())
    model.save_pretrained(tmp_path / "resized")  # as the sentence says
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "resized"), MaskConfig())
    model.save_pretrained(tmp_path / "adapter")


def test_an_adapter_for_each_row_is_refused() -> None:
    with refused("`adapter_names` asks for an adapter for each row"):
        masked()(input_ids=X, adapter_names=["default", "__base__"])


def test_scores_are_moved_but_never_cast() -> None:
    model = masked()
    scores = {n: p.detach().clone() for n, p in model.named_parameters() if "maskft_scores" in n}
    model.to(torch.bfloat16)
    assert same({n: p for n, p in model.named_parameters() if "maskft_scores" in n}, scores)
    assert {p.dtype for n, p in model.named_parameters() if n not in scores} == {torch.bfloat16}
    step(model)


def test_a_saved_adapter_is_one_bit_a_weight_and_gives_the_same_logits(learned, folder) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.uint8}
    num_bytes = [layer.out_features * ((layer.in_features + 7) // 8) for layer in layers_of(learned).values()]
    assert sum(t.numel() for t in tensors.values()) == sum(num_bytes)
    loaded = load(folder)
    assert not [n for n, _ in loaded.named_parameters() if "maskft_" in n]
    assert torch.equal(logits(loaded), logits(learned))
    assert not torch.equal(logits(loaded), logits(llama()))


def test_embeddings_are_not_saved_beside_masks(tmp_path) -> None:
    with refused(r"`base_model\.model\.model\.embed_tokens\.weight` would be saved beside the"):
        masked().save_pretrained(tmp_path, save_embedding_layers=True)
    assert not list(tmp_path.glob("*.safetensors"))


def saved_masks(model, folder) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    packed = {name: tensors[f"base_model.model.{name}.maskft_mask"] for name in layers_of(model)}
    return {name: unpack_mask(packed[name], layer.in_features) for name, layer in layers_of(model).items()}


def merged_masks(model) -> dict[str, Tensor]:
    model.merge_adapter()
    return {name: layer.get_base_layer().weight != 0 for name, layer in layers_of(model).items()}


def asked_masks(model) -> dict[str, Tensor]:
    layers = layers_of(model)
    return {name: unpack_mask(m, layers[name].in_features) for name, m in find_group(model, "default").masks().items()}


def test_scores_that_are_changed_through_data_are_chosen_from_saved_and_merged(tmp_path) -> None:
    model = masked()
    logits(model)
    for layer in layers_of(model).values():
        layer.maskft_scores["default"].data = -layer.maskft_scores["default"].data.abs().flip(0)
    assert same(asked_masks(model), {name: chosen(layer) for name, layer in layers_of(model).items()})
    for masks_of in (lambda model: saved_masks(model, tmp_path), merged_masks):
        for layer in layers_of(model).values():
            scores = layer.maskft_scores["default"]
            scores.data.copy_(torch.randn_like(scores))  # as averages of parameters are put back
        assert same(masks_of(model), {name: chosen(layer) for name, layer in layers_of(model).items()})


def test_a_mask_that_was_set_by_hand_is_saved_and_merged_as_it_is(tmp_path) -> None:
    model, by_hand = masked(), {}
    for name, layer in layers_of(model).items():
        packed = torch.full_like(layer.maskft_mask["default"], 0x0F)
        layer.set_mask("default", packed)
        by_hand[name] = unpack_mask(packed, layer.in_features)
    assert same(saved_masks(model, tmp_path), by_hand)
    assert same(merged_masks(model), by_hand)


def test_a_merged_adapter_is_saved_as_an_unmerged_one(tmp_path) -> None:
    model = masked()
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "unmerged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()


@pytest.mark.parametrize("auto_class", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_an_auto_class_finds_the_base_model(auto_class, tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), MaskConfig(task_type="CAUSAL_LM"))
    step(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto_class.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_exact_and_unmerge_restores_every_byte(dtype) -> None:
    model = get_peft_model(llama().to(dtype), MaskConfig())
    with torch.no_grad():
        weight = layers_of(model)["model.layers.1.mlp.up_proj"].get_base_layer().weight
        weight[0, :3] = torch.tensor([-0.0, 0.0, 1e-30])
    before, expected = plain_weights(model), logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert plain_weights(model) == before
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_merged_weights_come_back_in_the_dtype_that_they_were_moved_to() -> None:
    model = get_peft_model(llama(), MaskConfig())
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert plain_weights(model) == plain_weights(llama().to(torch.bfloat16))


def test_several_adapters_are_merged_with_the_masks_of_their_scores() -> None:
    model = get_peft_model(llama(), MaskConfig(), adapter_name="one")
    model.add_adapter("two", MaskConfig(density=0.8))
    layers = layers_of(model, "two")
    with torch.no_grad():
        for layer in layers.values():
            layer.maskft_scores["two"].normal_()
    model.merge_adapter(["one", "two"])
    plain = llama()
    for name, layer in layers.items():
        expected = plain.get_submodule(name).weight * (chosen(layer, "two", density=0.8) & layer.mask(["one"]))
        assert torch.equal(layer.get_base_layer().weight, expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_names": ["default", "tow"]}, r"no adapter 'tow' to merge; `adapter_names` can name 'default'"),
        ({"safe_merge": True}, r"of `model\.layers\.2\.mlp\.up_proj` holds NaN or infinite values, so nothing"),
    ],
)
def test_a_merge_that_is_refused_merges_nothing(merge, options, message) -> None:
    model = masked()
    with torch.no_grad():
        layers_of(model)["model.layers.2.mlp.up_proj"].get_base_layer().weight[0, 0] = torch.inf
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with refused(message):
        getattr(model, merge)(**options)
    assert same(model.state_dict(), before)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_a_safe_merge_looks_at_what_is_merged_alone() -> None:
    model = masked()
    model.add_adapter("other", MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    with torch.no_grad():
        layers_of(model, "other")["model.layers.0.mlp.up_proj"].get_base_layer().weight[0, 0] = torch.inf
    model.merge_adapter(["default"], safe_merge=True)
    assert all(layer.merged for layer in layers_of(model).values())


def test_two_adapters_switch_combine_and_go(folder) -> None:
    both = load(folder)
    both.add_adapter("other", MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2], seed=5, density=0.5))
    first = logits(both)
    both.set_adapter("other")
    assert not torch.equal(first, logits(both))
    both.base_model.set_adapter(["default", "other"])
    combined = logits(both)
    plain = llama()
    for name, layer in layers_of(both).items():
        plain.get_submodule(name).weight.data *= layer.mask(["default"]) & layer.mask(["other"])
    torch.testing.assert_close(combined, logits(plain))
    both.set_adapter("default")
    both.delete_adapter("other")
    assert torch.equal(logits(both), first)
    both.add_adapter("other", MaskConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))  # over fewer modules
    assert {name.rpartition(".")[2] for name in layers_of(both, "other")} == {"up_proj"}
    both.set_adapter("other")
    logits(both)


FORM = r"float32:xxh3_128:[0-9a-f]{32}"


@pytest.mark.parametrize(
    ("seed", "dtype", "options", "message"),
    [
        (1, torch.float32, {}, rf"fingerprint {FORM}, the adapter expects {FORM}; give the right base model"),
        (0, torch.bfloat16, {}, r"load it in float32 \(in bfloat16 its weights are rounded\)"),
        (0, torch.float32, {"is_trainable": True}, "holds masks but no scores"),
        (1, torch.float32, {"is_trainable": True}, "holds masks but no scores"),
    ],
)
def test_a_load_that_is_refused_leaves_the_base_as_it_was(folder, seed, dtype, options, message) -> None:
    base = llama(seed).to(dtype)
    before, expected = plain_weights(base), logits(base)
    with refused(message):
        load(folder, base, **options)
    assert plain_weights(base) == before
    assert [name for name, _ in base.named_modules()] == [name for name, _ in llama().named_modules()]
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), expected)
    assert not torch.equal(logits(load(folder, base, ignore_fingerprint=True)), expected)


def test_a_base_model_with_other_weights_is_taken_when_asked(folder) -> None:
    load(folder, llama(1), ignore_fingerprint=True)
    # As the message says for load_adapter, which passes no such choice on.
    model = get_peft_model(llama(1), MaskConfig(task_type="CAUSAL_LM", inference_mode=True), adapter_name="mine")
    with refused(r"before `load_adapter`: add_adapter with MaskConfig.from_pretrained"):
        model.load_adapter(folder, "refused")
    model.add_adapter("forced", MaskConfig.from_pretrained(folder, ignore_fingerprint=True))
    model.load_adapter(folder, "forced")
    model.set_adapter("forced")
    logits(model)


def test_a_mask_that_learns_on_another_base_is_tied_to_that_one(tmp_path) -> None:
    masked(save_scores=True).save_pretrained(tmp_path / "first")
    moved = load(tmp_path / "first", llama(1), is_trainable=True, ignore_fingerprint=True)
    moved.peft_config["default"].save_scores = False
    moved.save_pretrained(tmp_path / "second")
    load(tmp_path / "second", llama(1))
    with refused("not the one this mask was learned on"):
        load(tmp_path / "second")


UP = "base_model.model.model.layers.{}.mlp.up_proj.maskft_mask"
DAMAGES = {
    "missing": (lambda masks: masks.pop(UP.format(1)), "has no mask for 1 of"),
    "shape": (lambda masks: masks.update({UP.format(1): masks[UP.format(1)][:1].clone()}), "but a weight of shape"),
    "unexpected": (lambda masks: masks.update({UP.format(0): masks[UP.format(1)].clone()}), "not to be masked here"),
    "one bit": (lambda masks: masks[UP.format(1)][0, 0].bitwise_xor_(1), "has no mask, or others than its adapter_con"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused(folder, damage) -> None:
    change, message = DAMAGES[damage]
    edit(folder / "adapter_model.safetensors", change)
    with refused(message):
        load(folder)


def test_scores_come_back_bit_for_bit_when_asked_for(learned, tmp_path) -> None:
    learned.peft_config["default"].save_scores = True
    learned.save_pretrained(tmp_path)
    models = (learned, load(tmp_path, is_trainable=True))
    scores, again = ({n: p for n, p in model.named_parameters() if "maskft_scores" in n} for model in models)
    assert scores
    assert same(scores, again)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_like_a_plain_one(backend) -> None:
    # One layer with masks and one without: each more is compiled anew.
    config = MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1])
    plain, other = (get_peft_model(llama(num_layers=2), config) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    optimizers = [None, None]
    for _ in range(3):
        optimizers = [step(m, o, learning_rate=1e-3) for m, o in zip((plain, compiled), optimizers, strict=True)]
    torch.testing.assert_close(logits(compiled), logits(plain))
    assert find_group(other, "default").num_refreshes == find_group(plain, "default").num_refreshes == 4


def test_a_mask_that_is_only_read_is_applied_once(folder) -> None:
    loaded = load(folder)
    with torch.inference_mode():
        first = logits(loaded)
    layer = layers_of(loaded)["model.layers.1.mlp.up_proj"]
    (cached,) = layer._masked_weights.values()
    assert torch.equal(logits(loaded), first)
    assert next(iter(layer._masked_weights.values())) is cached
    assert not cached.values.is_inference()


def test_another_file_is_not_loaded_over_an_adapter_that_was_checked(folder, tmp_path) -> None:
    other = masked(seed=5)
    other.save_pretrained(tmp_path / "other")
    model = load(folder)
    before = logits(model)
    model.load_adapter(folder, "default")  # the same file once more
    with refused(r"'default' holds the masks of another file.*delete_adapter\('default'\)"):
        model.load_adapter(tmp_path / "other", "default")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "other", "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    # Adapters that are only read share one masked weight.
    assert {len(layer._masked_weights) for layer in layers_of(model).values()} == {1}
