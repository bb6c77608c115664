"""Where the Triton kernels are used: for plain tensors on a GPU, if Triton is there."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels, tried once on the device: they are compiled there, which takes a C compiler and a GPU they know."""
    try:
        from maskft.masks import kernels

        kernels.try_on(device)
    except ImportError:  # PyTorch brings Triton along on Linux alone
        return None
    except Exception as error:
        warnings.warn(f"Masks are chosen and applied without Triton, more slowly: {error!r}", stacklevel=2)
        return None
    return kernels


def kernels_for(*tensors: Tensor | None) -> Any:
    """The module :mod:`maskft.masks.kernels` where it can take all of these tensors (None is passed over), else None.

    They have to be plain, contiguous and on one GPU; a compiled forward makes kernels of its own.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or not given or not given[0].is_cuda:
        return None
    device = given[0].device
    for tensor in given:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device or not tensor.is_contiguous():
            return None
    return _kernels(device)
