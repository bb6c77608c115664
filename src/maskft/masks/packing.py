"""Masks as bits: one bit a weight, 1 = kept, rows padded to whole bytes, little bit first.

The layout is that of an adapter's file, so what training holds, what is saved and what is merged are the same
bytes.
"""

import torch
from torch import Tensor

from maskft.errors import MaskftError


def packed_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the packed form of a mask (out_features, in_features): (out_features, ceil(in_features / 8))."""
    return shape[0], (shape[1] + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask (out_features, in_features) into uint8 (out_features, ceil(in_features / 8))."""
    rows, columns = mask.shape
    padded = mask.new_zeros((rows, packed_shape((rows, columns))[1] * 8), dtype=torch.uint8)
    padded[:, :columns] = mask
    bits = padded.view(rows, -1, 8)
    packed = bits[..., 0].clone()
    for place in range(1, 8):
        packed |= bits[..., place] << place
    return packed


def unpack_mask(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 (out_features, ceil(in_features / 8)) into a boolean mask (out_features, in_features)."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> places) & 1
    return bits.view(packed.shape[0], -1)[:, :in_features].to(torch.bool)


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


def num_kept_bits(packed: Tensor) -> int:
    """Number of weights kept in a packed mask."""
    return int(_BIT_COUNTS.to(packed.device)[packed.int()].sum())


def num_flipped_bits(before: Tensor, after: Tensor) -> int:
    """Number of weights whose bit differs between two packed masks of one shape."""
    return num_kept_bits(before ^ after)


_BIT_COUNTS = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.int64)
