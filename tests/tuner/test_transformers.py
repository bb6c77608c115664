"""Adapters through Transformers' own calls, which match state-dict names and call none of PEFT's hooks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import X, llama, logits, step
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from maskft import MaskConfig, MaskftError, find_group
from maskft.adapters.compress import compress_adapter


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    )


def trained(model, **settings) -> PeftModel:
    model = get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", **settings))
    step(model)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("build", [llama, gpt2])
def test_load_adapter_finds_every_mask(build, tmp_path) -> None:
    model = trained(build())
    model.save_pretrained(tmp_path)
    loaded = build()
    info = loaded.load_adapter(str(tmp_path))
    assert info.missing_keys | info.unexpected_keys | info.mismatched_keys == set()
    assert torch.equal(logits(loaded), logits(model))
    assert not [name for name, _ in loaded.named_parameters() if "maskft_" in name]

    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(build()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # said by PEFT of any two
def test_adapters_of_one_model_switch_and_go(folder, tmp_path) -> None:
    other = trained(llama(), seed=5, density=0.5)
    other.save_pretrained(tmp_path / "other")
    model = llama()
    model.load_adapter(str(folder), adapter_name="first")
    model.load_adapter(str(tmp_path / "other"), adapter_name="second")
    first = logits(PeftModel.from_pretrained(llama(), folder))
    for name, expected in (("first", first), ("second", logits(other)), ("first", first)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_the_auto_class_takes_an_adapter_for_a_model(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_save_pretrained_writes_the_file_it_was_loaded_from(folder, tmp_path) -> None:
    model = llama()
    model.load_adapter(str(folder))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again")
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_added_for_training_trains(tmp_path) -> None:
    model = llama()
    model.add_adapter(MaskConfig())
    before = find_group(model, "default").masks()
    step(model)
    assert any(not torch.equal(before[name], mask) for name, mask in find_group(model, "default").masks().items())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_masks_stand_in_the_state_dict_in_inference_and_scores_in_training(folder) -> None:
    training = {name.rsplit(".", 2)[1] for name in trained(llama()).state_dict() if "maskft_" in name}
    assert training == {"maskft_scores"}
    loaded = PeftModel.from_pretrained(llama(), folder)
    assert {name.rsplit(".", 2)[1] for name in loaded.state_dict() if "maskft_" in name} == {"maskft_mask"}
    plain = {name.replace(".base_layer", "") for name in loaded.get_base_model().state_dict() if "maskft_" not in name}
    assert plain == set(llama().state_dict())


def test_another_base_model_is_refused_at_first_use_unless_asked(folder) -> None:
    model = llama(seed=1)
    model.load_adapter(str(folder))
    with pytest.raises(MaskftError, match="not the one this mask was learned on"):
        model(input_ids=X)
    with pytest.raises(MaskftError, match="not the one this mask was learned on"):
        find_group(model, "default").masks()
    model = llama(seed=1)
    model.load_adapter(str(folder), peft_config=MaskConfig.from_pretrained(folder, ignore_fingerprint=True))
    model(input_ids=X)


def flip(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][0, 0] ^= 1


def drop(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


@pytest.mark.parametrize("damage", [flip, drop])
def test_damaged_masks_are_refused_at_first_use(folder, damage) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, next(iter(tensors)))
    save_file(tensors, file)
    model = llama()
    model.load_adapter(str(folder))
    for _ in range(2):
        with pytest.raises(MaskftError, match=r"Adapter 'default' has no mask, or others than its adapter_config"):
            model(input_ids=X)


def test_a_compressed_adapter_is_called_one(folder, tmp_path) -> None:
    compress_adapter(folder, tmp_path / "compressed")
    model = llama()
    model.load_adapter(str(tmp_path / "compressed"))
    with pytest.raises(MaskftError, match=r"a compressed one, which Transformers' own load_adapter does not read"):
        model(input_ids=X)


def test_one_flipped_bit_is_refused_by_peft_too(folder) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    flip(tensors, next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(MaskftError, match=r"has no mask, or others than its adapter_config"):
        PeftModel.from_pretrained(llama(), folder)


def test_an_adapter_without_masks_is_refused_at_first_use() -> None:
    model = get_peft_model(llama(), MaskConfig(inference_mode=True))
    with pytest.raises(MaskftError, match="nothing was loaded into it"):
        model(input_ids=X)


def test_scores_that_are_not_in_the_file_are_not_made_up(folder, tmp_path) -> None:
    model = llama()
    model.load_adapter(str(folder), is_trainable=True)
    with pytest.raises(MaskftError, match="scores are not those that its masks were chosen from"):
        model(input_ids=X, labels=X)

    learned = trained(llama())
    learned.peft_config["default"].save_scores = True
    learned.save_pretrained(tmp_path / "checkpoint")
    model = llama()
    model.load_adapter(str(tmp_path / "checkpoint"), is_trainable=True)
    assert torch.equal(logits(model), logits(learned))


def test_one_configuration_may_serve_several_base_models(tmp_path) -> None:
    config = MaskConfig(task_type="CAUSAL_LM")
    digests = []
    for seed in (0, 1):
        model = get_peft_model(llama(seed), config)
        model.save_pretrained(tmp_path / str(seed))
        digests.append(json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())["base_fingerprint"])
        assert torch.equal(logits(PeftModel.from_pretrained(llama(seed), tmp_path / str(seed))), logits(model))
    assert digests[0] != digests[1]


def test_a_compiled_forward_refuses_what_it_cannot_check(folder) -> None:
    model = llama()
    model.load_adapter(str(folder))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model once before torch"):
        compiled(input_ids=X)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True, backend="eager")), expected)
