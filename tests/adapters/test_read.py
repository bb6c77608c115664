import json
import warnings
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import make_model, save_base_and_adapter

from maskft import MaskConfig
from maskft.adapters.inspect import inspect_adapter
from maskft.adapters.read import check_saved, read_adapter
from maskft.errors import MaskftError
from maskft.tuner import find_group

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter whose base model lies beside it."""
    return save_base_and_adapter(tmp_path, make_model(), MaskConfig(density=0.6))[1]


def change_config(folder: Path, **settings: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)


def test_reads_what_was_saved(tmp_path) -> None:
    base, folder, _ = save_base_and_adapter(tmp_path, make_model(), MaskConfig(density=0.6))
    adapter = read_adapter(folder)
    assert adapter.path == folder
    assert adapter.config.density == 0.6
    assert adapter.config.base_model_name_or_path == str(base)
    assert not adapter.score_shapes
    assert len(adapter.masks) == 7
    assert adapter.masks["model.layers.0.mlp.gate_proj"].shape == (20, 2)
    assert all(mask.dtype == torch.uint8 for mask in adapter.masks.values())


def test_a_saved_adapter_is_read_back(tmp_path) -> None:
    model = get_peft_model(make_model(), MaskConfig(density=0.6, save_scores=True))
    model.save_pretrained(tmp_path)
    masks = find_group(model, "default").masks()
    check_saved(tmp_path, masks)
    adapter = read_adapter(tmp_path)
    assert adapter.score_shapes
    assert adapter.score_shapes["model.layers.0.mlp.gate_proj"] == (20, 12)
    assert set(adapter.score_shapes) == set(adapter.masks)

    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(MaskftError, match=rf"does not hold what is in memory \(1 of 7 masks, the first is `{name}`\)"):
        check_saved(tmp_path, masks | {name: masks[name] ^ 1})
    fewer = {other: mask for other, mask in masks.items() if other != name}
    with pytest.raises(MaskftError, match=rf"1 of 6 masks, the first is `{name}`"):
        check_saved(tmp_path, fewer)
    # As a checkpoint that has the rows of the first of two processes alone.
    key, lost = f"base_model.model.{name}.maskft_scores", rf"`{name}`\): .* parts of split scores are missing"
    scores = load_file(tmp_path / WEIGHTS)[key]
    scores[10:] = 0
    change_tensors(tmp_path, **{key: scores})
    with pytest.raises(MaskftError, match=rf"1 of 7 masks, the first is {lost}"):
        check_saved(tmp_path, masks)


def rewritten(change: Any) -> Any:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def with_tensor(name: str, tensor: torch.Tensor):
    return lambda folder: change_tensors(folder, **{f"base_model.model.{name}": tensor})


MASK = "model.layers.0.mlp.gate_proj.maskft_mask"
SCORES = MASK.replace("_mask", "_scores")
LORA = LoraConfig(target_modules=["q_proj"])
OF_LORA = r"'base_model\.model\.x\.lora_A\.weight', which is neither"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("moved")), "adapter is not a folder here"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"has no adapter_model\.safetensors; save or download"),
        (lambda folder: (folder / CONFIG).unlink(), r"has no adapter_config\.json, so it is not an adapter"),
        (lambda at: (at / WEIGHTS).rename(at / "masks.bin"), r"but masks\.bin, a pickle, which can run code"),
        (lambda at: (at / WEIGHTS).rename(at / "masks.pt"), r"but masks\.pt, a pickle, which can run code"),
        (lambda folder: (folder / CONFIG).write_text("{"), ": not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "must hold a JSON object, but it holds a list"),
        (lambda folder: change_config(folder, density=2), r"`density` must be in \(0, 1\], got 2"),
        (lambda folder: change_config(folder, self=0.5), "adapter_config.json cannot be used"),
        (lambda at: get_peft_model(make_model(), LORA).save_pretrained(at), "peft_type 'LORA', not 'MASKFT'"),
        *((rewritten(itemgetter(slice(end))), "is damaged or cut short") for end in (0, 4, 100, -1)),
        (rewritten(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "is damaged: its masks have the digest"),
        (with_tensor("x.lora_A.weight", torch.zeros(2, 2)), OF_LORA),
        (with_tensor(MASK, torch.zeros(20, 2)), "must be uint8 with 2 dimensions"),
        (with_tensor(MASK, torch.zeros(40, dtype=torch.uint8)), "must be uint8 with 2 dimensions"),
        (with_tensor(MASK, torch.zeros(0, 2, dtype=torch.uint8)), r"dimensions of at least 1, .* shape \(0, 2\)"),
        *(
            (with_tensor(SCORES, torch.zeros(shape)), "scores of .* have the shape")
            for shape in [(), (3,), (0, 3), (1, 2, 3)]
        ),
        *((lambda at, t=t: (at / CONFIG).write_text(t), "adapter_config.json") for t in (100_000 * "[", 90 * '{"a":')),
    ],
)
def test_a_folder_that_is_no_whole_adapter_is_refused(folder, harm, message) -> None:
    harm(folder)
    with pytest.raises(MaskftError, match=message):
        read_adapter(folder)


ODD = [
    None,
    True,
    3,
    -1,
    1.5,
    10**400,
    "",
    "a",
    "\x1b[31m\ud800",
    "x" * 5000,
    "a\0b",
    [],
    [1],
    ["a", []],
    {},
    {"a": {"b": 1}},
]


@pytest.mark.parametrize("field", [*MaskConfig.__dataclass_fields__, "unknown"])
def test_every_field_of_a_configuration_may_hold_anything(folder, field) -> None:
    (folder / CONFIG).write_text(json.dumps(settings := json.loads((folder / CONFIG).read_text())))
    for value in ODD:
        (folder / CONFIG).write_text(json.dumps(settings | {field: value}))
        # Any other exception than ours fails the test.
        with suppress(MaskftError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of fields it does not know
            inspect_adapter(folder)
