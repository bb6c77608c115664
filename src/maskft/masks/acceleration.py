"""Where the Triton kernels are used: for plain tensors on a GPU, if Triton is there."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def _kernels() -> Any:
    try:
        from maskft.masks import kernels
    except ImportError:  # PyTorch brings Triton along on Linux alone
        return None
    return kernels


def kernels_for(*tensors: Tensor | None) -> Any:
    """The module :mod:`maskft.masks.kernels` where it can take all of these tensors (None is passed over), else None.

    Those that it shares the places of have to be contiguous; a compiled forward makes kernels of its own.
    """
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        is_plain = tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous())
        if not is_plain or (tensor is not None and not tensor.is_cuda):
            return None
    return _kernels()
