"""Where Triton's kernels are used: for plain tensors on a GPU that can compile them."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels, tried once on the device: they are compiled there, which takes a C compiler."""
    try:
        kernels = import_module("maskft.masks.triton")
        kernels.try_on(device)
    except ImportError:  # PyTorch brings Triton along on Linux alone
        return None
    except Exception as error:
        warnings.warn(f"Masks are chosen and applied without Triton, more slowly: {error!r}", stacklevel=2)
        return None
    return kernels


def kernels_for(*tensors: Tensor | None) -> Any:
    """:mod:`maskft.masks.triton` where it can take all of these tensors (None is passed over), or None.

    They have to be plain, contiguous and on one GPU; a compiled forward makes kernels of its own.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or not given or given[0].device.type != "cuda":
        return None
    for tensor in given:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != given[0].device or not tensor.is_contiguous():
            return None
    return _kernels(given[0].device)
