"""Masks that choose among the changes of fine-tuning: what is left out goes back to its pretrained value."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import X, edit, gpt2, layers_of, llama, load, logits, masked, plain_weights, refused
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from maskft import MaskConfig, find_group
from maskft.adapters.merge import merge_checkpoint

read = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    llama(0).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    llama(1).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def config(pretrained: Path, **settings: Any) -> MaskConfig:
    at = {"reference": "pretrained", "reference_model_name_or_path": str(pretrained)}
    return MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2], **at, **settings)


def among_changes(pretrained: Path, base: Any = None, density: float = 0.7, **settings: Any) -> PeftModel:
    """Masks that choose among the changes from a model to that of seed 1."""
    return get_peft_model(llama(1) if base is None else base, config(pretrained, density=density, **settings))


@pytest.fixture
def folder(pretrained: Path, tuned: Path, tmp_path: Path) -> Path:
    """Their adapter."""
    among_changes(pretrained, read(tuned)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def by_hand(model: PeftModel) -> LlamaForCausalLM:
    """The fine-tuned model with each left-out weight put back by plain indexing."""
    plain, before = llama(1), llama(0)
    for name, layer in layers_of(model).items():
        left_out = ~layer.mask(["default"])
        plain.get_submodule(name).weight.data[left_out] = before.get_submodule(name).weight.data[left_out]
    return plain


def test_what_is_left_out_takes_its_pretrained_value(pretrained) -> None:
    model = among_changes(pretrained)
    assert find_group(model, "default").kept_share() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(logits(model), logits(by_hand(model)))
    assert not torch.equal(logits(model), logits(llama(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_reference_stays_as_the_weights_are(pretrained, dtype) -> None:
    model = among_changes(pretrained, llama(1).to(dtype))
    before = llama(0).to(dtype)
    for name, layer in layers_of(model).items():
        expected, weight = before.get_submodule(name).weight, layer.get_base_layer().weight
        assert torch.equal(layer.apply_masks(["default"]), torch.where(layer.mask(["default"]), weight, expected))
        assert torch.equal(layer.change("default"), weight - expected)
    unmerged = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), unmerged)
    model.unmerge_adapter()
    assert plain_weights(model) == plain_weights(llama(1).to(dtype))


def test_a_mask_that_keeps_all_is_the_fine_tuned_model(pretrained) -> None:
    model = get_peft_model(llama(1), config(pretrained, selection="threshold", init_scores="keep_all"))
    assert torch.equal(logits(model), logits(llama(1)))


def test_the_gradient_is_that_of_the_change(pretrained) -> None:
    model = among_changes(pretrained, score_transform="none")
    model(input_ids=X, labels=X).loss.backward()
    plain = by_hand(model)
    plain(input_ids=X, labels=X).loss.backward()
    before, after = llama(0), llama(1)
    for name, layer in layers_of(model).items():
        change = after.get_submodule(name).weight - before.get_submodule(name).weight
        expected = plain.get_submodule(name).weight.grad * change
        torch.testing.assert_close(layer.maskft_scores["default"].grad, expected, rtol=1e-4, atol=1e-8)


def test_a_magnitude_start_ranks_the_change(pretrained) -> None:
    before, after = llama(0), llama(1)
    for name, layer in layers_of(among_changes(pretrained, init_scores="magnitude")).items():
        size = (after.get_submodule(name).weight - before.get_submodule(name).weight).detach().abs()
        scores = layer.maskft_scores["default"].detach()
        assert torch.equal(scores.flatten().argsort(), size.flatten().argsort())


def test_it_is_saved_loaded_merged_and_taken_out_again(pretrained, tuned, folder, tmp_path) -> None:
    expected = logits(among_changes(pretrained))
    model = load(folder, read(tuned))
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert plain_weights(model.unload()) == plain_weights(llama(1))
    merge_checkpoint(folder, tmp_path / "merged")
    assert torch.equal(logits(read(tmp_path / "merged")), expected)


def test_a_transposed_reference_is_known_by_the_same_fingerprint(tmp_path) -> None:
    for seed, name in ((0, "pretrained"), (1, "tuned")):
        gpt2(seed).save_pretrained(tmp_path / name)
    settings = {"reference": "pretrained", "reference_model_name_or_path": str(tmp_path / "pretrained")}
    model = get_peft_model(read(tmp_path / "tuned"), MaskConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "mask")
    load(tmp_path / "mask", read(tmp_path / "tuned"))
    merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    assert torch.equal(logits(read(tmp_path / "merged")), logits(model))


def test_another_reference_is_refused(pretrained, tuned, folder, tmp_path) -> None:
    llama(2).save_pretrained(pretrained)
    with refused("The reference model is not the one this mask was learned on"):
        load(folder, read(tuned))
    with refused("The reference model is not the one this mask was learned on"):
        merge_checkpoint(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_it_is_loaded_with_low_memory_too(pretrained, tuned, folder) -> None:
    expected = logits(among_changes(pretrained))
    model = load(folder, read(tuned), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)
    model.load_adapter(folder, "other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)


def _as_adapter(folder: Path) -> None:
    folder.rename(folder.with_name("below"))
    base = LlamaForCausalLM.from_pretrained(folder.with_name("below"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


FILE, UP = "model.safetensors", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: edit(at / FILE, lambda w: w.pop(f"{UP}.weight")), rf"the weight of 1 of the 14 modules .* `{UP}`"),
        (
            lambda at: (at / FILE).write_bytes((at / FILE).read_bytes()[:1000]),
            r"from which no model can be read; .* \(Error while deserializing header",
        ),
        (_as_adapter, "an adapter, which would be read without its changes; give the model before .*, or merge"),
        (shutil.rmtree, "from which no model can be read"),
        (lambda at: llama(0, hidden_size=12).save_pretrained(at), "which is another model; give the one before fine"),
    ],
)
def test_a_reference_that_is_not_whole_is_refused(pretrained, damage, message) -> None:
    damage(pretrained)
    base = llama(1)
    with refused(message):
        get_peft_model(base, config(pretrained))
    assert [name for name, _ in base.named_modules()] == [name for name, _ in llama(1).named_modules()]


def test_a_reference_of_another_type_is_refused_before_it_is_made(pretrained, monkeypatch) -> None:
    # Read as a Llama, a file of GPT-2's would give one of the default sizes: seven billion weights.
    GPT2Config().save_pretrained(pretrained)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    with refused("a model of the type gpt2, and the fine-tuned one is of the type llama; give"):
        among_changes(pretrained)


def test_a_reference_may_be_a_part_of_what_its_folder_holds(pretrained) -> None:
    expected = logits(among_changes(pretrained))
    settings = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps({"model_type": "with_images", "text_config": settings}))
    assert torch.equal(logits(among_changes(pretrained)), expected)


def test_a_reference_does_not_stay_when_adding_fails(pretrained) -> None:
    model = masked()
    model.merge_adapter()
    with refused("unmerge before adding"):
        model.add_adapter("other", config(pretrained))
    assert "_adding" not in vars(model.base_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_with_the_same_weights_is_refused(pretrained, dtype) -> None:
    base = llama(0).to(dtype)
    with refused("has the same weights as the model in all masked layers, so no mask can"):
        among_changes(pretrained, base)
    assert not any("maskft" in name for name, _ in base.named_parameters())
    base.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1
    among_changes(pretrained, base)


def test_masks_of_two_references_are_neither_merged_in_part_nor_mixed(pretrained) -> None:
    model = among_changes(pretrained)
    model.add_adapter("zero", MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]))
    with refused("give the weights they leave out different values"):
        model.merge_adapter(["default", "zero"])
    assert not any(layer.merged for layer in layers_of(model).values())
    model.base_model.set_adapter(["default", "zero"], inference_mode=True)
    with refused("give the weights they leave out different values"):
        logits(model)
