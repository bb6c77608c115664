"""The files of weights in a model's folder: which they are, and what their headers say."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskft.errors import MaskftError, first_line
from maskft.storage.files import is_file
from maskft.storage.json_text import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "save or download the model again"
# Those a masked weight can have, by safetensors' names; all others are quantized or no numbers at all.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file of weights; a dtype that no masked weight can have reads as uint8."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: Path) -> list[Path]:
    """The files that Transformers takes the weights from, safetensors where there are any; all of them are there.

    Raises:
        MaskftError: there are none, one is missing, or the index names none or one outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(path for path in folder.glob("pytorch_model*.bin") if path.is_file())
        if not pickles:
            raise MaskftError(
                f"The folder {folder} holds no weights, neither {SINGLE} nor {INDEX}; save or download the model again."
            )
        return pickles
    held = read_object(folder / INDEX, _AGAIN).get("weight_map")
    named = list(held.values()) if isinstance(held, dict) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise MaskftError(f"{folder / INDEX} names no files of weights; {_AGAIN}.")
    names = sorted(set(named))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise MaskftError(f"{folder / INDEX} names the file {outside[0]!r}, which is outside its folder.")
    for name in names:
        if not is_file(folder / name):
            raise MaskftError(f"{folder} lacks {name}, a part of its weights; save or download the model again.")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of safetensors by name.

    Raises:
        MaskftError: it is damaged, or shorter than its header says.
    """
    try:
        safe_open(file, framework="pt")  # checks the header against the size of the file
    except (OSError, SafetensorError) as error:
        raise _damaged(file, first_line(error)) from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        key: StoredTensor(
            file, 8 + length + held["data_offsets"][0], tuple(held["shape"]), _DTYPES.get(held["dtype"], torch.uint8)
        )
        for key, held in header.items()
    }


def read_rows(stored: StoredTensor, num_rows: int) -> Iterator[Tensor]:
    """The rows of a tensor of two dimensions, `num_rows` at a time; the next overwrite the last.

    Raises:
        MaskftError: the file has become shorter.
    """
    row_bytes = stored.shape[1] * stored.dtype.itemsize
    buffer = bytearray(min(num_rows, stored.shape[0]) * row_bytes)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        for start in range(0, stored.shape[0], num_rows):
            num = min(num_rows, stored.shape[0] - start)
            if file.readinto(memoryview(buffer)[: num * row_bytes]) < num * row_bytes:
                raise _damaged(stored.file, "it ended while it was read")
            rows = torch.frombuffer(buffer, dtype=stored.dtype, count=num * stored.shape[1])
            yield rows.view(num, stored.shape[1])


def _damaged(file: Path, reason: str) -> MaskftError:
    return MaskftError(f"{file} is damaged or was cut short ({reason}); save or download the model again.")
