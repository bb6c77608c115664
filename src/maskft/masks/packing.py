"""Masks as bits: one bit a weight, 1 = kept, rows padded to whole bytes, little bit first.

The layout is that of an adapter's file, so what training holds, what is saved and what is merged are the same
bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskft.errors import MaskftError


def packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the packed form of a mask (out_features, in_features): (out_features, ceil(in_features / 8))."""
    return shape[0], (shape[1] + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask (out_features, in_features) into uint8 (out_features, ceil(in_features / 8))."""
    rows, columns = mask.shape
    if mask.device.type == "cpu" and type(mask) is Tensor and not torch.compiler.is_compiling():
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    num_bytes = packed_shape((rows, columns))[1]
    if columns % 8 or not mask.is_contiguous():
        padded = mask.new_zeros((rows, num_bytes * 8))
        padded[:, :columns] = mask
        mask = padded
    # Eight bytes of 0 or 1 are one int64. Multiplying it moves bit 8 i to bit 56 + i for each i, and no sums carry.
    return ((mask.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 (out_features, ceil(in_features / 8)) into a boolean mask (out_features, in_features)."""
    # Each byte is copied eight times into an int64, byte i keeps bit i, and whatever is left of it becomes 1.
    bits = (packed.to(torch.int64) * _EACH_BYTE) & _BIT_OF_BYTE
    ones = ((bits + _EACH_BYTE * 0x7F) >> 7) & _EACH_BYTE
    return ones.view(torch.bool)[:, :in_features]


def check_packed(packed: Tensor, shape: tuple[int, int], name: str) -> None:
    """Refuse a packed mask that cannot be one of a weight of `shape` (out_features, in_features).

    Raises:
        MaskftError: another dtype or shape than the weight needs, or bits set in the padding of a row.
    """
    expected = packed_shape(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise MaskftError(
            f"The mask of `{name}` is {str(packed.dtype).removeprefix('torch.')} {tuple(packed.shape)}, but a weight "
            f"of shape {shape} needs uint8 {expected}; the adapter was made for another model or its file is damaged."
        )
    num_padding = -shape[1] % 8
    if num_padding and (packed[:, -1] >> (8 - num_padding)).any():
        raise MaskftError(
            f"The mask of `{name}` has bits set past its {shape[1]} columns: the adapter's file is damaged; "
            "save or download it again."
        )


def majority_mask(packed: Sequence[Tensor], in_features: int) -> Tensor:
    """Packed mask of the weights that at least half of several packed masks keep.

    Args:
        packed: uint8 tensors of one shape, (out_features, ceil(in_features / 8)).
        in_features: columns of the masks.
    """
    num_keeping = sum(unpack_mask(mask, in_features).to(torch.int16) for mask in packed)
    return pack_mask(2 * torch.as_tensor(num_keeping) >= len(packed))


def shuffled_mask(mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of `mask` (boolean, any shape): the same count kept, elsewhere; what to compare it with."""
    flat = mask.reshape(-1)
    return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)].view(mask.shape)


def num_kept_bits(packed: Tensor) -> int:
    """Number of weights kept in a packed mask."""
    return int(_count_bits(packed))


def num_flipped_bits(before: Tensor, after: Tensor) -> Tensor:
    """Number of weights whose bit differs between two packed masks of one shape; an int64 scalar on their device."""
    return _count_bits(before ^ after)


def _count_bits(packed: Tensor) -> Tensor:
    if packed.device.type == "cpu" and type(packed) is Tensor:
        return torch.tensor(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))
    # Pairs, then fours, then whole bytes are added up in place.
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64)


_EACH_BYTE = 0x0101010101010101
_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))  # eight bytes of 0 or 1, times it, have their bits on top
_BIT_OF_BYTE = sum(1 << (9 * i) for i in range(8)) - (1 << 64)  # as a signed int64
