"""Where kernels are used: for plain tensors on a GPU, if Triton is there; for large ones on a CPU, if Numba is."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_ON_CPU = 1 << 16  # elements for which Numba is worth importing


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels, tried once on the device: on a GPU they are compiled there, which takes a C compiler."""
    name, library = ("kernels_cpu", "Numba") if device.type == "cpu" else ("triton", "Triton")
    try:
        kernels = import_module(f"maskft.masks.{name}")
        kernels.try_on(device)
    except ImportError:  # PyTorch brings Triton along on Linux alone, and Numba is for whoever wants it
        return None
    except Exception as error:
        warnings.warn(f"Masks are chosen and applied without {library}, more slowly: {error!r}", stacklevel=2)
        return None
    return kernels


def kernels_for(*tensors: Tensor | None) -> Any:
    """The module of kernels that can take all of these tensors (None is passed over), or None.

    It is :mod:`maskft.masks.triton` or :mod:`maskft.masks.kernels_cpu`. The tensors have to be plain, contiguous and
    on one device; a compiled forward makes kernels of its own.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or not given or given[0].device.type not in ("cuda", "cpu"):
        return None
    device = given[0].device
    for tensor in given:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device or not tensor.is_contiguous():
            return None
    if device.type == "cpu" and sum(tensor.numel() for tensor in given) < _LEAST_ON_CPU:
        return None
    return _kernels(device)
