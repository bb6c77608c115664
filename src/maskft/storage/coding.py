"""Masks through a range coder: as many bits as the entropy of their kept shares, and the same bits back.

A coded mask is a flat uint8 tensor of little-endian 32-bit integers: the version of the format, the shape of the packed
mask, for each block of 2^19 bytes of it in row-major order the bits set, then the coded words. All blocks are one
stream, each coded with the share it keeps; one of one value alone adds nothing to it. The coder is that of the package
constriction (R. Bamler, arXiv 2201.01741). Whole bytes are its symbols, for each symbol loses about 0.0001 bits to
rounding, which is much where nearly all weights are kept.

There are words, zeros if need be, until each 2^17 bytes of a mask take eight bytes at least. Before anything is made,
what all headers say is compared with the layers' shapes and with the free memory; a layer whose shape is not known may
have 2^31 weights: a small hostile file cannot ask for more than there is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskft.errors import MaskftError
from maskft.storage.memory import require_memory

_BLOCK = 1 << 19
_PAID_BY_TWO_NUMBERS = 1 << 17
_VERSION = 2
_HEADER = 3
_MAX_UNKNOWN = 1 << 28  # bytes


def encode_mask(packed: Tensor) -> Tensor:
    """Code a packed mask (uint8, (out_features, ceil(in_features / 8))); flat uint8 on the CPU.

    Raises:
        MaskftError: constriction is not installed.
    """
    coder = _coder()
    data = packed.cpu().contiguous().view(-1).numpy()
    encoder = coder.queue.RangeEncoder()
    table = []
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        table.append(int(np.bitwise_count(block).sum(dtype=np.int64)))
        if 0 < table[-1] < 8 * len(block):
            encoder.encode(block.astype(np.int32), _model(coder, table[-1], 8 * len(block)))
    words = encoder.get_compressed()
    num_missing = _least_numbers(len(data)) - len(table) - len(words)
    padding = np.zeros(max(num_missing, 0), dtype=np.uint32)
    numbers = np.concatenate([np.array([_VERSION, *packed.shape, *table], dtype=np.uint32), words, padding])
    return torch.from_numpy(numbers.astype("<u4").view(np.uint8))


def decode_masks(coded: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The packed masks that :func:`encode_mask` coded, by the names of their modules.

    Args:
        coded: what it gave.
        shapes: (out_features, in_features) of the modules, as far as they are known.

    Raises:
        MaskftError: what is coded is no mask or one of another shape, takes more memory than is free, or constriction
            is not installed.
    """
    headers = {name: _header(each, name) for name, each in coded.items()}
    for name, (num_rows, num_columns, _) in headers.items():
        rows, columns = shapes.get(name, (None, 0))
        if rows is not None and (num_rows, num_columns) != (rows, -(-columns // 8)):
            raise MaskftError(
                f"The compressed mask of `{name}` says that it has {num_rows} rows of {num_columns} bytes, and the "
                f"layer has the shape ({rows}, {columns}); it was made for another model, or is damaged."
            )
        if rows is None and num_rows * num_columns > _MAX_UNKNOWN:
            raise MaskftError(
                f"The compressed mask of `{name}` says that its layer has {8 * num_rows * num_columns:.1e} weights; it "
                "is damaged, or needs the base model's folder, which tells the layer's shape."
            )
    require_memory(sum(rows * columns for rows, columns, _ in headers.values()), "What is in the compressed masks")
    return {name: _decode(numbers, rows, columns, name) for name, (rows, columns, numbers) in headers.items()}


def _header(coded: Tensor, name: str) -> tuple[int, int, "np.ndarray[Any, Any]"]:
    """Rows, and bytes of each, of a packed mask, and all numbers of the coded one."""
    if coded.dtype != torch.uint8 or coded.dim() != 1 or coded.numel() <= 4 * _HEADER or coded.numel() % 4:
        raise _damaged(name)
    numbers = np.frombuffer(coded.cpu().numpy().tobytes(), dtype="<u4").astype(np.uint32)
    version, num_rows, num_columns = (int(n) for n in numbers[:_HEADER])
    if version != _VERSION:
        raise MaskftError(
            f"The compressed mask of `{name}` has the format {version}, and this version of maskft reads format "
            f"{_VERSION}: install another version, or compress the adapter again."
        )
    if not num_rows * num_columns or len(numbers) < _HEADER + _least_numbers(num_rows * num_columns):
        raise _damaged(name)
    return num_rows, num_columns, numbers


def _decode(numbers: "np.ndarray[Any, Any]", num_rows: int, num_columns: int, name: str) -> Tensor:
    size = num_rows * num_columns
    table, words = np.split(numbers[_HEADER:], [-(-size // _BLOCK)])
    packed = np.empty(size, dtype=np.uint8)
    coder = _coder()
    try:
        decoder = coder.queue.RangeDecoder(words)
        for i, num_kept in enumerate(table.tolist()):
            block = packed[i * _BLOCK : (i + 1) * _BLOCK]
            if 0 < num_kept < 8 * len(block):
                block[:] = decoder.decode(_model(coder, num_kept, 8 * len(block)), len(block))
            else:
                block[:] = 255 if num_kept else 0
            if np.bitwise_count(block).sum(dtype=np.int64) != num_kept:
                raise _damaged(name)
    except (AssertionError, ValueError) as error:  # words that no encoder wrote
        raise _damaged(name) from error
    return torch.from_numpy(packed).view(num_rows, num_columns)


def _damaged(name: str) -> MaskftError:
    return MaskftError(f"The compressed mask of `{name}` is damaged or cut short; save or download the adapter again.")


def _least_numbers(size: int) -> int:
    return 2 * -(-size // _PAID_BY_TWO_NUMBERS)


def _coder():  # type: ignore[no-untyped-def]
    try:
        from constriction import stream
    except ImportError as error:
        raise MaskftError(
            "Compressed masks need the package constriction: run `pip install 'maskft[compress]'`."
        ) from error
    return stream


def _model(coder, num_kept: int, size: int):  # type: ignore[no-untyped-def]
    """Bytes of eight independent bits, each set with the share kept."""
    # Products one after the other, which are the same on every machine; powers are not.
    kept, left_out = (np.cumprod([1.0] + 8 * [share]) for share in (num_kept / size, (size - num_kept) / size))
    num_set = np.bitwise_count(np.arange(256, dtype=np.uint8))
    return coder.model.Categorical(kept[num_set] * left_out[8 - num_set], perfect=False)
