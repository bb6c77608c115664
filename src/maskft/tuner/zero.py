"""DeepSpeed's ZeRO: optimizers that step flat copies of the scores, and at stage 3 scores and weights that are split.

At stage 3 each process keeps of each parameter an unbroken run of its values in row-major order, all of one length, the
last ones padded (`ds_tensor`); the parameter itself is whole while a layer that is known to use it runs, and empty
otherwise. DeepSpeed says so in attributes, so that it is imported only where it is at work already.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers.integrations import deepspeed as transformers_deepspeed

from maskft.masks import pack_mask
from maskft.masks.packing import unpack_mask
from maskft.masks.radix import Shard


def steps_copies() -> bool:
    """Whether DeepSpeed is at work, so that scores change where neither they nor their optimizer show it."""
    deepspeed: Any = sys.modules.get("deepspeed")
    return deepspeed is not None and bool(deepspeed.comm.is_initialized())


def is_split(tensor: Any) -> bool:
    """Whether a parameter is one that stage 3 keeps in parts, be it whole at the moment or not."""
    return hasattr(tensor, "ds_tensor")


def group_of(tensor: Any) -> dist.ProcessGroup:
    """The processes that hold the parts."""
    group: dist.ProcessGroup = tensor.ds_process_group
    return group


def shard_of(tensor: Any) -> Shard:
    """This process's part, flat and without the padding; it shares memory with it."""
    part = tensor.ds_tensor.detach()
    start = min(dist.get_rank(group_of(tensor)) * part.numel(), tensor.ds_numel)
    return Shard(part[: tensor.ds_numel - start], start, tensor.ds_numel)


def whole(tensor: Any) -> Tensor:
    """The parameter's values, of its shape; every process has to call it."""
    values = _gather(tensor.ds_tensor.detach(), tensor)
    return values[: tensor.ds_numel].view(tensor.ds_shape)


def whole_packed(mask: Tensor, tensor: Any) -> Tensor:
    """The packed mask of a parameter from the processes' flat parts of it; every process has to call it.

    Args:
        mask: bool, this process's part, of the length of its part of the parameter.
        tensor: the parameter, (out_features, in_features).

    Returns:
        uint8, (out_features, ceil(in_features / 8)).
    """
    length = tensor.ds_tensor.numel()
    padded = mask.new_zeros(1, length)
    padded[0, : mask.numel()] = mask
    bits = _gather(pack_mask(padded), tensor).view(dist.get_world_size(group_of(tensor)), -1)
    return pack_mask(unpack_mask(bits, length).flatten()[: tensor.ds_numel].view(tensor.ds_shape))


def _gather(part: Tensor, tensor: Any) -> Tensor:
    group = group_of(tensor)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def gather_for(module: nn.Module, parameters: Sequence[Any]) -> None:
    """Make split parameters whole that a module uses beside its own; DeepSpeed does it by itself from then on."""
    for parameter in parameters:
        if is_split(parameter) and parameter.numel() != parameter.ds_numel:
            deepspeed: Any = sys.modules["deepspeed"]
            deepspeed.zero.register_external_parameter(module, parameter)
            parameter.all_gather()


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let `from_pretrained` load whole what it would split: scores and fingerprints are made of whole weights."""
    reference = getattr(transformers_deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = reference() if reference is not None else None
    if config is None:
        yield
        return
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed.set_hf_deepspeed_config(config)
