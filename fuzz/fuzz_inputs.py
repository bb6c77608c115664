"""Coverage-guided fuzzing of what users hand over: adapter files, configurations, coded masks, data rows, studies.

    python fuzz/fuzz_inputs.py -runs=100000 [CORPUS_FOLDER]

Any input either is read or ends with a `MaskftError`. Everything else stops the fuzzer, which leaves the input
beside it: another error, more than 512 MB for an input of at most 4 KB (`-rss_limit_mb` counts the interpreter too),
more than 10 s, or a file outside the input's own folder. Needs atheris (`pip install atheris`).
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["maskft"]):
    import torch
    from safetensors.torch import save

    from maskft.adapters.inspect import inspect_adapter
    from maskft.adapters.read import read_adapter
    from maskft.data.rows import load_rows
    from maskft.errors import MaskftError
    from maskft.storage.coding import decode_mask, encode_mask
    from maskft.storage.fingerprint import fingerprint
    from maskft_lab.study.config import read_study

_FOLDER = Path(tempfile.mkdtemp(prefix="maskft-fuzz-"))
_MODULE = "model.layers.0.mlp.up_proj"
_MASK = torch.full((3, 2), 255, dtype=torch.uint8)
_MASKS = save({f"base_model.model.{_MODULE}.maskft_mask": _MASK})
_CODED = encode_mask(torch.arange(60, dtype=torch.uint8).view(6, 10)).numpy().tobytes()
_CONFIG = {
    "peft_type": "MASKFT",
    "target_modules": ["up_proj"],
    "density": 0.9,
    "base_model_name_or_path": "nowhere",
    "mask_digest": fingerprint({_MODULE: _MASK}),
}


def _adapter_tensors(data: bytes) -> None:
    _write("adapter_config.json", json.dumps(_CONFIG).encode())
    _write("adapter_model.safetensors", data)
    _read_adapter()


def _changed_tensors(data: bytes) -> None:
    """A good file with some bytes of its header or content changed."""
    changed = bytearray(_MASKS)
    for place, value in zip(data[::2], data[1::2], strict=False):
        changed[place % len(changed)] = value
    _adapter_tensors(bytes(changed))


def _adapter_config(data: bytes) -> None:
    _write("adapter_config.json", data)
    _write("adapter_model.safetensors", _MASKS)
    _read_adapter()


def _read_adapter() -> None:
    read_adapter(_FOLDER)
    inspect_adapter(_FOLDER)


def _rows(data: bytes) -> None:
    _write("rows.jsonl", data)
    load_rows(str(_FOLDER / "rows.jsonl"))


def _array_of_rows(data: bytes) -> None:
    _write("rows.json", data)
    load_rows(str(_FOLDER / "rows.json"))


def _study(data: bytes) -> None:
    _write("study.yaml", data)
    read_study(_FOLDER / "study.yaml")


def _coded_mask(data: bytes) -> None:
    decode_mask(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8), "a")


TARGETS = (_adapter_tensors, _changed_tensors, _adapter_config, _rows, _array_of_rows, _study, _coded_mask)
_NAMES = {"adapter_config.json", "adapter_model.safetensors", "rows.jsonl", "rows.json", "study.yaml"}


def _write(name: str, data: bytes) -> None:
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
    """Inputs to start from, one of each kind, that are read without an error."""
    study = (
        "name: a\nseeds: [1]\nmodels: {m: x}\ndomains: {d: {generated: {num_train: 2}}}\nmethods: {base: , fft: {}}\n"
    )
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    contents = (
        _MASKS,
        b"\x00\x00",
        json.dumps(_CONFIG).encode(),
        b'{"prompt": "a", "completion": "b"}\n',
        json.dumps([row]).encode(),
        study.encode(),
        _CODED,
    )
    for i, content in enumerate(contents):
        (folder / f"seed{i}").write_bytes(bytes([i]) + content)


if __name__ == "__main__":
    corpus = Path(tempfile.mkdtemp(prefix="maskft-corpus-"))
    seeds(corpus)
    arguments = [*sys.argv, "-max_len=4096", "-timeout=10", "-rss_limit_mb=3000", str(corpus)]
    atheris.Setup(arguments, test_one_input)
    atheris.Fuzz()
