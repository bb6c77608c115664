"""Floating-point numbers as integers of the same order, for selection by digits."""

import torch
from torch import Tensor

KEY_DTYPES = {torch.float32: torch.int32, torch.float64: torch.int64}


def wide(values: Tensor) -> Tensor:
    """`values` in float32 where they are narrower; that loses nothing."""
    return values if values.dtype in KEY_DTYPES else values.to(torch.float32)


def ordered_key(values: Tensor) -> Tensor:
    """Flat signed integers in the order of `values`; -0.0 and 0.0 are one. int32 for float32, int64 for float64."""
    flat = wide(values).reshape(-1) + 0.0
    bits = flat.view(KEY_DTYPES[flat.dtype])
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def value_of_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 or float64 numbers that keys stand for."""
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key).view(dtype)
