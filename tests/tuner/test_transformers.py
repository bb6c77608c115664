"""Adapters through Transformers' own calls, which match state-dict names and call none of PEFT's hooks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import X, edit, gpt2, llama, load, logits, masked, plain_weights, refused, same, step
from torch import Tensor
from transformers import LlamaForCausalLM

from maskft import MaskConfig, find_group
from maskft.adapters.compress import compress_adapter


def load_adapter(folder: Path, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    model = llama(seed)
    model.load_adapter(str(folder), **options)
    return model


@pytest.mark.parametrize("build", [llama, gpt2])
def test_load_adapter_finds_every_mask(build, tmp_path) -> None:
    model = get_peft_model(build(), MaskConfig(task_type="CAUSAL_LM"))
    step(model)
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
    other = masked(seed=5, density=0.5)
    other.save_pretrained(tmp_path / "other")
    model = load_adapter(folder, adapter_name="first")
    model.load_adapter(str(tmp_path / "other"), adapter_name="second")
    first = logits(load(folder))
    for name, expected in (("first", first), ("second", logits(other)), ("first", first)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_save_pretrained_writes_the_file_it_was_loaded_from(folder, tmp_path) -> None:
    model = load_adapter(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert same(before, after)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_an_adapter_added_for_training_trains(tmp_path) -> None:
    model = llama()
    model.add_adapter(MaskConfig())
    before = find_group(model, "default").masks()
    step(model)
    assert not same(before, find_group(model, "default").masks())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_masks_stand_in_the_state_dict_in_inference_and_scores_in_training(learned, folder) -> None:
    loaded = load(folder)
    for model, kind in ((learned, "maskft_scores"), (loaded, "maskft_mask")):
        assert {name.split(".")[-2] for name in model.state_dict() if "maskft_" in name} == {kind}
    assert plain_weights(loaded).keys() == llama().state_dict().keys()


def flip(masks: dict[str, Tensor]) -> None:
    next(iter(masks.values()))[0, 0] ^= 1


OTHERS = r"Adapter 'default' has no mask, or others than its adapter_config"


@pytest.mark.parametrize(
    ("damage", "seed", "options", "message"),
    [
        (None, 1, {}, "not the one this mask was learned on"),
        (flip, 0, {}, OTHERS),
        (dict.popitem, 0, {}, OTHERS),
        (None, 0, {"is_trainable": True}, "scores are not those that its masks were chosen from"),
    ],
)
def test_masks_that_do_not_fit_are_refused_at_first_use(folder, damage, seed, options, message) -> None:
    if damage is not None:
        edit(folder / "adapter_model.safetensors", damage)
    model = load_adapter(folder, seed, **options)
    for _ in range(2):
        with refused(message):
            model(input_ids=X)
    with refused(message):
        find_group(model, "default").masks()


def test_another_base_model_is_taken_when_asked(folder) -> None:
    load_adapter(folder, 1, peft_config=MaskConfig.from_pretrained(folder, ignore_fingerprint=True))(input_ids=X)


def test_a_compressed_adapter_is_called_one(folder, tmp_path) -> None:
    compress_adapter(folder, tmp_path / "compressed")
    with refused(r"a compressed one, which Transformers' own load_adapter does not read"):
        load_adapter(tmp_path / "compressed")(input_ids=X)


def test_an_adapter_without_masks_is_refused_at_first_use() -> None:
    with refused("nothing was loaded into it"):
        masked(inference_mode=True)(input_ids=X)


def test_scores_that_are_in_the_file_are_loaded(learned, tmp_path) -> None:
    learned.peft_config["default"].save_scores = True
    learned.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(tmp_path, is_trainable=True)), logits(learned))


def test_one_configuration_may_serve_several_base_models(tmp_path) -> None:
    config = MaskConfig(task_type="CAUSAL_LM")
    digests = []
    for seed in (0, 1):
        model = get_peft_model(llama(seed), config)
        model.save_pretrained(tmp_path / str(seed))
        digests.append(json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())["base_fingerprint"])
        assert torch.equal(logits(load(tmp_path / str(seed), llama(seed))), logits(model))
    assert digests[0] != digests[1]


def test_a_compiled_forward_refuses_what_it_cannot_check(folder) -> None:
    model = load_adapter(folder)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model once before torch"):
        compiled(input_ids=X)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True, backend="eager")), expected)
