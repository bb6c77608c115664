"""Scores that are split over processes: by rows by FSDP2 (`torch.distributed.fsdp.fully_shard`), flat by ZeRO-3."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from maskft.errors import MaskftError
from maskft.masks import pack_mask
from maskft.masks.radix import Shard, all_reduce_sum
from maskft.masks.selection import select_sharded
from maskft.tuner import zero


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes."""
    return isinstance(tensor, DTensor) or zero.is_split(tensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be split; it shares memory and version with it."""
    if zero.is_split(tensor):
        return zero.shard_of(tensor).values
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split, whole; every process has to call it."""
    if zero.is_split(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def packed_masks_of_shards(scores: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """The packed masks of split scores, whole on every process; every process has to call it.

    They are those of :func:`maskft.masks.select` over the whole scores, bit for bit; scores stay where they are, and
    one bit a weight is sent.

    Args:
        scores: (out_features, in_features), float32, split in the same way.
        settings: those of :func:`maskft.masks.select`.

    Returns:
        uint8, (out_features, ceil(in_features / 8)).
    """
    masks = select_sharded([_shard(tensor) for tensor in scores], all_reduce_sum(_group(scores[0])), **settings)
    return [
        zero.whole_packed(mask, tensor) if zero.is_split(tensor) else _gather_rows(pack_mask(mask), tensor)
        for mask, tensor in zip(masks, scores, strict=True)
    ]


def _group(tensor: Any) -> dist.ProcessGroup:
    """The processes that a tensor is split over."""
    if zero.is_split(tensor):
        return zero.group_of(tensor)
    split = [i for i, placement in enumerate(tensor.placements) if isinstance(placement, ShardPlacement)]
    if len(split) != 1 or tensor.placements[split[0]].dim != 0:
        raise MaskftError(
            f"Scores are split as {tensor.placements}, but only splitting by rows over one dimension of the mesh is "
            "supported; use fully_shard without tensor parallelism."
        )
    group: dist.ProcessGroup = tensor.device_mesh.get_group(split[0])
    return group


def _shard(tensor: Any) -> Shard:
    if zero.is_split(tensor):
        return zero.shard_of(tensor)
    _, (row, _) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(local_part(tensor), row * int(tensor.shape[1]), int(tensor.numel()))


def _gather_rows(packed: Tensor, tensor: Any) -> Tensor:
    """The packed rows of all processes, in order."""
    shape, stride = torch.Size((tensor.shape[0], packed.shape[1])), (packed.shape[1], 1)
    rows = DTensor.from_local(packed, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
    return rows.full_tensor()
