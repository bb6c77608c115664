"""Coverage-guided fuzzing of what users hand over: adapters, configurations, coded masks, rows, studies, results.

    python fuzz/fuzz_inputs.py -runs=200000 [CORPUS_FOLDER]

Half of the inputs are bytes as they are, the others build a file by a grammar: values of every type and depth in any
field, coded masks of up to 70 KB, and a digest that is computed again, so that a change is not found by it alone.
Any input either is read or ends with a `MaskftError`. Everything else stops the fuzzer, which leaves the input
beside it: another error, more than 512 MB for an input of at most 4 KB (`-rss_limit_mb` counts the interpreter too),
more than 10 s, or a file outside the input's own folder. Needs atheris (`pip install atheris`).
"""

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["maskft", "maskft_lab"]):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    from maskft.adapters.inspect import inspect_adapter
    from maskft.adapters.read import read_adapter
    from maskft.adapters.weight_files import weight_files
    from maskft.cli import _read_config as read_flags
    from maskft.data.rows import load_rows
    from maskft.errors import MaskftError
    from maskft.evaluation.scores import summarise
    from maskft.storage.coding import decode_masks, encode_mask
    from maskft.storage.fingerprint import fingerprint
    from maskft.storage.tensors import masks_and_scores
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments, TrainingSettings
    from maskft.tuner import MaskConfig
    from maskft_lab.study.config import read_study

_FOLDER = Path(tempfile.mkdtemp(prefix="maskft-fuzz-"))
_MODULE = "model.layers.0.mlp.up_proj"
_MASK = torch.full((3, 2), 255, dtype=torch.uint8)
_MASKS = save({f"base_model.model.{_MODULE}.maskft_mask": _MASK})
_CODED = encode_mask(torch.arange(60, dtype=torch.uint8).view(6, 10)).numpy().tobytes()
_CONFIG: dict[str, Any] = {
    "peft_type": "MASKFT",
    "target_modules": ["up_proj"],
    "density": 0.9,
    "base_model_name_or_path": "nowhere",
    "mask_digest": fingerprint({_MODULE: _MASK}),
}
_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_SAMPLE = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1, "doc_hash": "a"}
_PROTOCOL = {"model": "m", "task": "t", "n": 2, "groups": {}, "data": {"sha256": "a"}, "dtype": "float32"}
_PROTOCOL |= {"version": "1", "num_samples": 1, "generation_kwargs": None}
_STUDY = "name: a\nseeds: [1]\nmodels: {m: x}\ndomains: {d: {generated: {num_train: 2}}}\nmethods: {base: , fft: {}}\n"
_WORDS = ["", "a", "x" * 5000, "1e-4", "a\0b", "\ud800", "[/x]", "$", "../x", "float32:xxh3_128:" + 32 * "0"]
_DATACLASSES = (DataArguments, MaskArguments, TrainingSettings, GuardArguments)
_FLAGS = [f.name for kind in _DATACLASSES for f in fields(kind) if f.init]
_FIELDS = (*MaskConfig.__dataclass_fields__, "unknown")


def _any_value(given: atheris.FuzzedDataProvider, depth: int = 0, depths: Any = (1, 60, 64, 70, 70, 1500)) -> Any:
    """A value of any type that JSON has."""
    kind = given.ConsumeIntInRange(0, 9)
    if kind > 6 and depth < 4:
        parts = [_any_value(given, depth + 1, depths) for _ in range(given.ConsumeIntInRange(0, 3))]
        return parts if kind < 9 else {str(i): part for i, part in enumerate(parts)}
    if kind == 6:  # some deeper than is read, some deeper than Python's own reader goes
        return _nested(given.PickValueInList(list(depths)))
    numbers = (10**400, -1, 2**63, 0.0, 1e308)
    return (
        None,
        given.ConsumeBool(),
        given.ConsumeInt(8),
        given.ConsumeFloat(),
        numbers[given.ConsumeIntInRange(0, 4)],
        given.PickValueInList(_WORDS),
    )[min(kind, 5)]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _changed(value: dict[str, Any], given: atheris.FuzzedDataProvider, fields: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with up to three of its values, or of other `fields`, in the place of which any other stands."""
    names = [*value, *fields]
    return value | {given.PickValueInList(names): _any_value(given) for _ in range(given.ConsumeIntInRange(0, 3))}


def _text(value: Any) -> bytes:
    sys.setrecursionlimit(20_000)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(1000)


def _adapter_tensors(data: bytes) -> None:
    _read_adapter(_CONFIG, data)


def _changed_tensors(data: bytes) -> None:
    """A good file with some bytes of its header or content changed, and the digest of what it then holds."""
    changed = bytearray(_MASKS)
    for place, value in zip(data[::2], data[1::2], strict=False):
        changed[place % len(changed)] = value
    _read_adapter(_CONFIG | {"mask_digest": _digest(bytes(changed))}, bytes(changed))


def _digest(data: bytes) -> str | None:
    with contextlib.suppress(SafetensorError, ValueError, RuntimeError, TypeError):
        parts = {tuple(key.removeprefix("base_model.model.").rpartition(".")[::2]): t for key, t in load(data).items()}
        return fingerprint({name: mask for (name, kind), mask in parts.items() if kind == "maskft_mask"})
    return None


def _built_tensors(data: bytes) -> None:
    """Masks, scores and coded masks of any shape and dtype."""
    given = atheris.FuzzedDataProvider(data)
    dtypes = (torch.uint8, torch.float32, torch.int64, torch.bool, torch.bfloat16)
    tensors = {}
    for number in range(given.ConsumeIntInRange(1, 3)):
        shape = [given.ConsumeIntInRange(0, 5) for _ in range(given.ConsumeIntInRange(0, 3))]
        tensor = torch.full(shape, given.ConsumeIntInRange(0, 255)).to(given.PickValueInList(list(dtypes)))
        kind = given.PickValueInList(["maskft_mask", "maskft_scores", "maskft_coded", "lora_A"])
        name = f"model.layers.{given.PickValueInList(['0', '1', '9' * 5000, 'a', '٣'])}.m{number}"
        tensors[f"{given.PickValueInList(['', 'base_model.model.'])}{name}.{kind}"] = tensor
    _read_adapter(_CONFIG | {"mask_digest": _digest(save(tensors))}, save(tensors))


def _config_bytes(data: bytes) -> None:
    _read_adapter(data, _MASKS)


def _config_of_any_values(data: bytes) -> None:
    _read_adapter(_changed(_CONFIG, atheris.FuzzedDataProvider(data), _FIELDS), _MASKS)


def _read_adapter(config: dict[str, Any] | bytes, tensors: bytes) -> None:
    _write("adapter_config.json", config if isinstance(config, bytes) else _text(config))
    _write("adapter_model.safetensors", tensors)
    read_adapter(_FOLDER)
    inspect_adapter(_FOLDER)


def _rows(data: bytes) -> None:
    _write("rows.jsonl", data)
    load_rows(str(_FOLDER / "rows.jsonl"))


def _rows_of_any_values(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    row = given.PickValueInList([_ROW, {"prompt": "a", "completion": "b"}, {"text": "a"}])
    rows = [_changed(row, given, ("tools", "system", "chat_template_kwargs")) for _ in range(2)]
    if given.ConsumeBool():
        _write("rows.json", _text(rows))
        load_rows(str(_FOLDER / "rows.json"))
    else:
        _rows(b"\n".join(map(_text, rows)))


def _array_of_rows(data: bytes) -> None:
    _write("rows.json", data)
    load_rows(str(_FOLDER / "rows.json"))


def _study(data: bytes) -> None:
    _write("study.yaml", data)
    read_study(_FOLDER / "study.yaml")


def _study_of_any_values(data: bytes) -> None:
    """JSON is YAML too; one line may be many aliases of each other."""
    given = atheris.FuzzedDataProvider(data)
    lines = [
        f"{key}: {_text(_any_value(given, depths=(1, 70))).decode()}"
        for key in ("name", "seeds", "models")
        if given.ConsumeBool()
    ]
    lines += [f"a{i}: &a{i} [{', '.join(i * [f'*a{i - 1}'])}]" for i in range(1, given.ConsumeIntInRange(0, 12))]
    _study("\n".join([*_STUDY.splitlines()[given.ConsumeIntInRange(0, 5) :], "a0: &a0 x", *lines]).encode())


def _command(data: bytes) -> None:
    """The file of --config: flags with values of any type."""
    given = atheris.FuzzedDataProvider(data)
    values = {given.PickValueInList(_FLAGS): _any_value(given, depths=(1, 70)) for _ in range(3)}
    _write("config.yaml", _text(values))
    read_flags(_FOLDER / "config.yaml", _DATACLASSES)


def _coded_mask(data: bytes) -> None:
    _decode(data or b"\0")


def _built_coded_mask(data: bytes) -> None:
    """A header of any shape before up to 70 KB of numbers, most of which say the same."""
    given = atheris.FuzzedDataProvider(data)
    header = [given.PickValueInList([2, 2, 2, 1]), *(given.ConsumeIntInRange(0, 2**16) for _ in range(2))]
    word = given.ConsumeInt(4).to_bytes(4, "little", signed=True)
    numbers = b"".join(number.to_bytes(4, "little") for number in header) + word * given.ConsumeIntInRange(0, 17_500)
    changed = bytearray(numbers if given.ConsumeBool() else _CODED)
    for _ in range(given.ConsumeIntInRange(0, 20)):
        changed[given.ConsumeIntInRange(0, len(changed) - 1)] = given.ConsumeIntInRange(0, 255)
    _decode(bytes(changed))


def _decode(data: bytes) -> None:
    coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with contextlib.suppress(MaskftError):
        masks_and_scores({"base_model.model.a.maskft_coded": coded}, {"a": (6, 80)})
    decode_masks({"a": coded}, {})


def _results(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    samples = [_changed(_SAMPLE | {"doc_id": i, "doc_hash": str(i)}, given, ("nll", "doc")) for i in range(3)]
    _write("m/t/samples.jsonl", b"\n".join(map(_text, samples)))
    _write("m/t/protocol.json", _text(_changed(_PROTOCOL, given)))
    _write("results.json", _text({"scores": [_changed({"model": "m", "task": "t"}, given)]}))
    summarise(_FOLDER)


def _index(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    name = "model.safetensors.index.json"
    _write(name, data if given.ConsumeBool() else _text(_changed({"weight_map": {"a": "b"}}, given)))
    weight_files(_FOLDER)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    *(_adapter_tensors, _changed_tensors, _config_bytes, _rows, _array_of_rows, _study, _coded_mask),
    *(_built_tensors, _config_of_any_values, _rows_of_any_values, _study_of_any_values, _built_coded_mask),
    *(_results, _index, _command),
)
_NAMES = {"adapter_config.json", "adapter_model.safetensors", "rows.jsonl", "rows.json", "study.yaml"}
_NAMES |= {"m", "results.json", "config.yaml", "model.safetensors.index.json"}


def _write(name: str, data: bytes) -> None:
    (_FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
    (_FOLDER / name).write_bytes(data)


def test_one_input(data: bytes) -> None:
    """The first byte says what the rest is."""
    if not data:
        return
    with contextlib.suppress(MaskftError):
        TARGETS[data[0] % len(TARGETS)](data[1:])
    left = {path.name for path in _FOLDER.iterdir()} - _NAMES
    assert not left, f"files were left: {left}"


def seeds(folder: Path) -> None:
    """Inputs to start from, one of each kind; those of bytes are read without an error."""
    contents = (
        _MASKS,
        b"\x00\x00",
        json.dumps(_CONFIG).encode(),
        b'{"prompt": "a", "completion": "b"}\n',
        json.dumps([_ROW]).encode(),
        _STUDY.encode(),
        _CODED,
    )
    for i, target in enumerate(TARGETS):
        content = contents[i] if i < len(contents) else bytes(range(64))
        (folder / f"seed{i}_{target.__name__}").write_bytes(bytes([i]) + content)


if __name__ == "__main__":
    logging.disable()
    warnings.simplefilter("ignore")
    corpus = Path(tempfile.mkdtemp(prefix="maskft-corpus-"))
    seeds(corpus)
    arguments = [*sys.argv, "-max_len=4096", "-len_control=0", "-timeout=10", "-rss_limit_mb=3000", str(corpus)]
    atheris.Setup(arguments, test_one_input)
    atheris.Fuzz()
