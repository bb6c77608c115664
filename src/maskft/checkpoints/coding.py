"""Masks through a range coder: as many bits as the entropy of their kept shares, and the same bits back.

A coded mask is a flat uint8 tensor of little-endian integers: the shape of the packed mask (two of 64 bits), then for
each block of 2^20 bits, in row-major order, the bits set and the coded words (32 bits each), then the words of all
blocks. A block is coded with the share it keeps; one of one value alone has no words. The coder is that of the package
constriction (R. Bamler, arXiv 2201.01741).

A block takes eight bytes at least, and a mask larger than the free memory is refused before it is made: a small hostile
file cannot ask for more than there is.
"""

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import unpack_mask

_BLOCK = 1 << 20
_SHAPE_BYTES = 16
_TABLE_BYTES = 8


def encode_mask(packed: Tensor) -> Tensor:
    """Code a packed mask (uint8, (out_features, ceil(in_features / 8))); flat uint8 on the CPU.

    Raises:
        MaskftError: constriction is not installed.
    """
    coder = _coder()
    bits = unpack_mask(packed.cpu(), 8 * packed.shape[1]).contiguous().view(-1).numpy()
    table, words = [], []
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        num_kept = int(np.count_nonzero(block))
        coded = np.empty(0, dtype=np.uint32)
        if 0 < num_kept < len(block):
            encoder = coder.queue.RangeEncoder()
            encoder.encode(block.astype(np.int32), _model(coder, num_kept, len(block)))
            coded = encoder.get_compressed()
        table.append((num_kept, len(coded)))
        words.append(coded)
    parts = [
        np.array(packed.shape, dtype="<u8"),
        np.array(table, dtype="<u4"),
        np.concatenate(words).astype("<u4"),
    ]
    return torch.from_numpy(np.frombuffer(b"".join(part.tobytes() for part in parts), dtype=np.uint8).copy())


def decode_mask(coded: Tensor, name: str) -> Tensor:
    """The packed mask that :func:`encode_mask` coded; `name` is for messages.

    Raises:
        MaskftError: what is coded is no mask, or constriction is not installed.
    """
    damaged = MaskftError(
        f"The compressed mask of `{name}` is damaged or cut short; save or download the adapter again."
    )
    if coded.dtype != torch.uint8 or coded.dim() != 1 or coded.numel() <= _SHAPE_BYTES:
        raise damaged
    data = coded.cpu().numpy().tobytes()
    num_rows, num_columns = (int(n) for n in np.frombuffer(data, dtype="<u8", count=2))
    num_bits = 8 * num_rows * num_columns
    num_blocks = -(-num_bits // _BLOCK)
    words_at = _SHAPE_BYTES + num_blocks * _TABLE_BYTES
    if num_bits == 0 or words_at > len(data) or (len(data) - words_at) % 4:
        raise damaged  # before anything of the declared size is made
    table = np.frombuffer(data, dtype="<u4", count=2 * num_blocks, offset=_SHAPE_BYTES).reshape(-1, 2)
    words = np.frombuffer(data, dtype="<u4", offset=words_at).astype(np.uint32)
    sizes = np.full(num_blocks, _BLOCK, dtype=np.int64)
    sizes[-1] = num_bits - (num_blocks - 1) * _BLOCK
    if int(table[:, 1].sum(dtype=np.int64)) != len(words) or (table[:, 0] > sizes).any():
        raise damaged
    if num_bits // 8 > psutil.virtual_memory().available:
        raise MaskftError(
            f"The compressed mask of `{name}` says that it needs {num_bits / 8e9:.1f} GB, which is more than the free "
            "memory; the file is damaged, or use a larger machine."
        )
    packed = np.empty(num_bits // 8, dtype=np.uint8)
    place = 0
    for i, (num_kept, num_words) in enumerate(table.tolist()):
        block = _decode_block(words[place : place + num_words], num_kept, int(sizes[i]))
        if block is None or np.count_nonzero(block) != num_kept:
            raise damaged
        start = i * _BLOCK // 8
        packed[start : start + len(block) // 8] = np.packbits(block, bitorder="little")
        place += num_words
    return torch.from_numpy(packed).view(num_rows, num_columns)


def _decode_block(words: NDArray[np.uint32], num_kept: int, size: int) -> NDArray[np.bool_] | None:
    if num_kept in (0, size):
        return np.full(size, num_kept > 0) if len(words) == 0 else None
    coder = _coder()
    try:
        decoded = coder.queue.RangeDecoder(words).decode(_model(coder, num_kept, size), size)
    except (AssertionError, ValueError):  # words that no encoder wrote
        return None
    block: NDArray[np.bool_] = decoded.astype(np.bool_)
    return block


def _coder():  # type: ignore[no-untyped-def]
    try:
        from constriction import stream
    except ImportError as error:
        raise MaskftError(
            "Compressed masks need the package constriction: run `pip install 'maskft[compress]'`."
        ) from error
    return stream


def _model(coder, num_kept: int, size: int):  # type: ignore[no-untyped-def]
    return coder.model.Bernoulli(num_kept / size, perfect=False)
