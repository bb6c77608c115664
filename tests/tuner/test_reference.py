"""Masks that choose among the changes of fine-tuning: what is left out goes back to its pretrained value."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import X, llama, logits
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from maskft import MaskConfig, MaskftError, find_group
from maskft.adapters.merge import merge_checkpoint
from maskft.masks import unpack_mask


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    llama(0).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    llama(1).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def config(pretrained: Path, **settings: object) -> MaskConfig:
    return MaskConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=[1, 2],
        reference="pretrained",
        reference_model_name_or_path=str(pretrained),
        **settings,  # type: ignore[arg-type]
    )


def by_hand(masked: PeftModel) -> LlamaForCausalLM:
    """The fine-tuned model with each left-out weight put back by plain indexing."""
    plain, before = llama(1), llama(0)
    group = find_group(masked, "default")
    for name, packed in group.masks().items():
        mask = unpack_mask(packed, group.layers[name].in_features)
        weight = plain.get_submodule(name).weight
        weight.data[~mask] = before.get_submodule(name).weight.data[~mask]
    return plain


def test_what_is_left_out_takes_its_pretrained_value(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, density=0.7))
    assert find_group(masked, "default").kept_share() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(logits(masked), logits(by_hand(masked)))
    assert not torch.equal(logits(masked), logits(llama(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_reference_stays_as_the_weights_are(pretrained: Path, dtype: torch.dtype) -> None:
    masked = get_peft_model(llama(1).to(dtype), config(pretrained, density=0.7))
    before = llama(0).to(dtype)
    for name, layer in find_group(masked, "default").layers.items():
        expected = before.get_submodule(name).weight
        mask = layer.mask(["default"])
        weight = layer.get_base_layer().weight
        assert torch.equal(layer.apply_masks(["default"]), torch.where(mask, weight, expected))
        assert torch.equal(layer.change("default"), weight - expected)
    unmerged = logits(masked)
    masked.merge_adapter()
    assert torch.equal(logits(masked), unmerged)
    masked.unmerge_adapter()
    plain = llama(1).to(dtype)
    assert all(
        torch.equal(layer.get_base_layer().weight, plain.get_submodule(name).weight)
        for name, layer in find_group(masked, "default").layers.items()
    )


def test_a_mask_that_keeps_all_is_the_fine_tuned_model(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, selection="threshold", init_scores="keep_all"))
    assert torch.equal(logits(masked), logits(llama(1)))


def test_the_gradient_is_that_of_the_change(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, density=0.7, score_transform="none"))
    masked(input_ids=X, labels=X).loss.backward()
    plain = by_hand(masked)
    plain(input_ids=X, labels=X).loss.backward()
    before, after = llama(0), llama(1)
    for name, layer in find_group(masked, "default").layers.items():
        change = after.get_submodule(name).weight - before.get_submodule(name).weight
        wanted = plain.get_submodule(name).weight.grad * change
        torch.testing.assert_close(layer.maskft_scores["default"].grad, wanted, rtol=1e-4, atol=1e-8)


def test_a_magnitude_start_ranks_the_change(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, density=0.7, init_scores="magnitude"))
    for name, layer in find_group(masked, "default").layers.items():
        size = (llama(1).get_submodule(name).weight - llama(0).get_submodule(name).weight).detach().abs()
        scores = layer.maskft_scores["default"].detach()
        assert torch.equal(scores.flatten().argsort(), size.flatten().argsort())


def test_it_is_saved_loaded_merged_and_taken_out_again(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    masked = get_peft_model(LlamaForCausalLM.from_pretrained(tuned), config(pretrained, density=0.7))
    wanted = logits(masked)
    masked.save_pretrained(tmp_path / "mask")
    base = LlamaForCausalLM.from_pretrained(tuned)
    bytes_before = {n: p.detach().numpy().tobytes() for n, p in base.named_parameters()}
    loaded = PeftModel.from_pretrained(base, tmp_path / "mask")
    assert torch.equal(logits(loaded), wanted)
    loaded.merge_adapter()
    assert torch.equal(logits(loaded), wanted)
    loaded.unmerge_adapter()
    after = loaded.unload()
    assert {n: p.detach().numpy().tobytes() for n, p in after.named_parameters()} == bytes_before
    merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), wanted)


def test_a_transposed_reference_is_known_by_the_same_fingerprint(tmp_path: Path) -> None:
    for seed, name in ((0, "pretrained"), (1, "tuned")):
        torch.manual_seed(seed)
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=1, **shape)).save_pretrained(
            tmp_path / name
        )
    settings = {"reference": "pretrained", "reference_model_name_or_path": str(tmp_path / "pretrained")}
    masked = get_peft_model(
        GPT2LMHeadModel.from_pretrained(tmp_path / "tuned"), MaskConfig(task_type="CAUSAL_LM", **settings)
    )
    masked.save_pretrained(tmp_path / "mask")
    PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "tuned"), tmp_path / "mask")
    merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged")), logits(masked))


def test_another_reference_is_refused(pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    masked = get_peft_model(LlamaForCausalLM.from_pretrained(tuned), config(pretrained, density=0.7))
    masked.save_pretrained(tmp_path / "mask")
    llama(2).save_pretrained(pretrained)
    with pytest.raises(MaskftError, match="The reference model is not the one this mask was learned on"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tuned), tmp_path / "mask")
    with pytest.raises(MaskftError, match="The reference model is not the one this mask was learned on"):
        merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_it_is_loaded_with_low_memory_too(pretrained: Path, tuned: Path, tmp_path: Path, how: str) -> None:
    masked = get_peft_model(LlamaForCausalLM.from_pretrained(tuned), config(pretrained, density=0.7))
    masked.save_pretrained(tmp_path / "mask")
    base = LlamaForCausalLM.from_pretrained(tuned)
    if how == "from_pretrained":
        loaded = PeftModel.from_pretrained(base, tmp_path / "mask", low_cpu_mem_usage=True)
    else:
        loaded = PeftModel.from_pretrained(base, tmp_path / "mask")
        loaded.load_adapter(tmp_path / "mask", "other", low_cpu_mem_usage=True)
        loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(masked))


def _without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _as_adapter(folder: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    base.save_pretrained(folder.parent / "below")
    base = LlamaForCausalLM.from_pretrained(folder.parent / "below")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _without_a_weight,
            r"lacks the weight of 1 of the 14 modules to be masked, the first is `model\.layers\.1\.mlp",
        ),
        (_cut, r"from which no model can be read; .* \(Error while deserializing header"),
        (
            _as_adapter,
            "an adapter, which would be read without its changes; give the model before fine-tuning, or merge",
        ),
    ],
)
def test_a_reference_that_is_not_whole_is_refused(
    pretrained: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(pretrained)
    base = llama(1)
    with pytest.raises(MaskftError, match=message):
        get_peft_model(base, config(pretrained))
    assert [name for name, _ in base.named_modules()] == [name for name, _ in llama(1).named_modules()]


def test_a_reference_of_another_type_is_refused_before_it_is_made(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read as a Llama, a file of GPT-2's would give one of the default sizes: seven billion weights.
    GPT2Config().save_pretrained(pretrained)

    def from_pretrained(*_: object, **__: object) -> None:
        pytest.fail("it was read")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(
        MaskftError, match="a model of the type gpt2, and the fine-tuned one is of the type llama; give"
    ):
        get_peft_model(llama(1), config(pretrained))


def test_a_reference_may_be_a_part_of_what_its_folder_holds(pretrained: Path) -> None:
    wanted = logits(get_peft_model(llama(1), config(pretrained, density=0.7)))
    settings = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps({"model_type": "with_images", "text_config": settings}))
    assert torch.equal(logits(get_peft_model(llama(1), config(pretrained, density=0.7))), wanted)


def test_a_reference_does_not_stay_when_adding_fails(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), MaskConfig(task_type="CAUSAL_LM"))
    masked.merge_adapter()
    with pytest.raises(MaskftError, match="unmerge before adding"):
        masked.add_adapter("other", config(pretrained))
    assert "_reference_model" not in vars(masked.base_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_with_the_same_weights_is_refused(pretrained: Path, dtype: torch.dtype) -> None:
    base = llama(0).to(dtype)
    with pytest.raises(MaskftError, match="has the same weights as the model in all masked places, so no mask can"):
        get_peft_model(base, config(pretrained))
    assert not any("maskft" in name for name, _ in base.named_parameters())
    base.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1
    get_peft_model(base, config(pretrained))


def test_adapters_of_two_references_are_not_merged_in_part(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, density=0.7))
    masked.add_adapter("zero", MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]))
    with pytest.raises(MaskftError, match="put different values into the places they leave out"):
        masked.merge_adapter(["default", "zero"])
    assert not any(layer.merged for layer in find_group(masked, "default").layers.values())


def test_masks_of_two_references_are_not_mixed(pretrained: Path) -> None:
    masked = get_peft_model(llama(1), config(pretrained, density=0.7))
    masked.add_adapter("zero", MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]))
    masked.base_model.set_adapter(["default", "zero"], inference_mode=True)
    with pytest.raises(MaskftError, match="put different values into the places they leave out"):
        logits(masked)


def test_settings_that_cannot_work_are_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskftError, match="`reference` is 'pretrained' and `reference_model_name_or_path` is None"):
        MaskConfig(reference="pretrained")
    with pytest.raises(MaskftError, match="reference='zero' takes none"):
        MaskConfig(reference_model_name_or_path="somewhere")
    with pytest.raises(MaskftError, match="from which no model can be read"):
        get_peft_model(llama(1), config(tmp_path / "nothing"))
    llama(0, hidden_size=12).save_pretrained(tmp_path / "small")
    with pytest.raises(MaskftError, match="which is another model; give the one before fine-tuning"):
        get_peft_model(llama(1), config(tmp_path / "small"))
