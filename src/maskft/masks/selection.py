"""Selection rules: which weights a tensor of scores keeps.

One function, :func:`select`, makes every mask: in training, on export and on merge, so that no two of them
can differ. It is exact and deterministic: `topk` keeps precisely :func:`num_kept` weights, and equal scores
are resolved by position (the earlier one is kept). Nothing is sorted, and several tensors are ranked without being
joined: see :mod:`maskft.masks.selection_cpu` and, for accelerators and shards, :mod:`maskft.masks.radix`.

The method is Mask Fine-Tuning (arXiv 2503.22764, section 3); its mask keeps the top share of `|S|`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks.acceleration import kernels_for
from maskft.masks.packing import pack_mask, unpack_mask
from maskft.masks.radix import Reduce, Shard, alone, top_of_shards
from maskft.masks.selection_cpu import top_on_cpu

Selection = Literal["topk", "global_topk", "threshold"]
ScoreTransform = Literal["abs", "none"]


def num_kept(num_weights: int, density: float) -> int:
    """Number of weights that `topk` keeps of `num_weights`: `n - floor((1 - density) * n)`.

    The density is taken as the decimal number its shortest representation shows, so that 0.9 of 10 weights
    drops one and not, through binary rounding, none.
    """
    return num_weights - math.floor((1 - Fraction(repr(float(density)))) * num_weights)


def transform_scores(scores: Tensor, score_transform: ScoreTransform) -> Tensor:
    """What the rules rank: `|S|` for "abs" (the paper's), `S` for "none". Same shape and dtype."""
    return scores.abs() if score_transform == "abs" else scores


def select(
    scores: Sequence[Tensor],
    *,
    selection: Selection,
    density: float = 0.9,
    threshold: float = 0.0,
    score_transform: ScoreTransform = "abs",
) -> list[Tensor]:
    """Binary masks of `scores`, one for each tensor.

    Args:
        scores: float32 tensors of any shape; float64 and bfloat16 are accepted.
        selection: "topk" keeps the share `density` of each tensor, "global_topk" that share of all tensors
            together, "threshold" every weight whose transformed score is at least `threshold`.
        density: share kept, in (0, 1]; not used by "threshold".
        threshold: lowest transformed score that is kept; used by "threshold" only.
        score_transform: "abs" ranks `|S|`, "none" ranks `S`.

    Returns:
        Boolean tensors of the shapes of `scores`; True is kept.

    Raises:
        MaskftError: a score is NaN, so that no order exists.
    """
    refuse_nan(num_nan(scores), sum(t.numel() for t in scores))
    return _select(scores, _Rule(selection, density, threshold, score_transform))


@dataclass(frozen=True)
class _Rule:
    """The settings of :func:`select`."""

    selection: Selection
    density: float = 0.9
    threshold: float = 0.0
    score_transform: ScoreTransform = "abs"

    def __post_init__(self) -> None:
        if self.selection not in (known := get_args(Selection)):
            raise MaskftError(f"`selection` must be one of {', '.join(known)}, got {self.selection!r}.")

    def ks(self, sizes: Sequence[int]) -> list[int]:
        """How many are kept of each tensor of these sizes, or one number for all of them together."""
        return [num_kept(size, self.density) for size in ([sum(sizes)] if self.selection == "global_topk" else sizes)]


def num_nan(scores: Sequence[Tensor]) -> Tensor:
    """Number of scores that are NaN; a scalar on their device, for which nobody has to wait on an accelerator."""
    if all(t.device.type == "cpu" for t in scores):
        # The sum is one cheap read, and NaN wherever a score is.
        return torch.tensor(sum(int(t.isnan().sum()) for t in scores if t.sum().isnan()))
    return torch.stack([t.isnan().sum() for t in scores]).sum()


def refuse_nan(num: Tensor, num_scores: int) -> None:
    """Raise MaskftError where :func:`num_nan` found any of `num_scores`; this waits for an accelerator."""
    if num.item():
        raise MaskftError(
            f"{int(num)} of {num_scores} mask scores are NaN, so no mask can be chosen; "
            "lower the learning rate or go back to an earlier checkpoint."
        )


def _select(scores: Sequence[Tensor], rule: _Rule) -> list[Tensor]:
    """Masks of scores without NaN; on an accelerator the host never waits for it."""
    if rule.selection == "threshold":
        return [transform_scores(tensor, rule.score_transform) >= rule.threshold for tensor in scores]
    pools = [scores] if rule.selection == "global_topk" else [[tensor] for tensor in scores]
    ks = rule.ks([t.numel() for t in scores])
    return [mask for pool, k in zip(pools, ks, strict=True) for mask in select_top(pool, k, rule.score_transform)]


def select_top(scores: Sequence[Tensor], k: int, score_transform: ScoreTransform) -> list[Tensor]:
    """Masks of the k largest transformed scores over all tensors, k from 0; of equal ones the earlier.

    Raises:
        MaskftError: so many scores on a CPU are NaN that fewer than k have an order.
    """
    if k in (0, sum(t.numel() for t in scores)):
        return [torch.full_like(t, k > 0, dtype=torch.bool) for t in scores]
    abs_ = score_transform == "abs"
    if scores[0].device.type == "cpu":
        return top_on_cpu(scores, k, abs_=abs_)
    return top_of_shards([Shard(t, 0, t.numel()) for t in scores], [k], alone, abs_=abs_)


def select_packed(scores: Sequence[Tensor], **settings: Any) -> tuple[list[Tensor], Tensor]:
    """The masks of :func:`select` packed, for scores (out_features, in_features), and :func:`num_nan` of the scores.

    On an accelerator the host never waits for it, and the masks have no meaning where any score is NaN.

    Raises:
        MaskftError: a score on a CPU is NaN.
    """
    rule, sizes = _Rule(**settings), [t.numel() for t in scores]
    kernels = kernels_for(*scores)
    if kernels is not None and kernels.can_choose(scores, merge=rule.selection == "global_topk"):
        border = rule.threshold if rule.selection == "threshold" else None
        abs_ = rule.score_transform == "abs"
        masks, found = kernels.choose_packed(scores, rule.ks(sizes), abs_=abs_, threshold=border)
        return masks, found
    found = num_nan(scores)
    if found.device.type == "cpu":
        refuse_nan(found, sum(sizes))
    return [pack_mask(mask) for mask in _select(scores, rule)], found


def select_sharded(shards: Sequence[Shard], reduce: Reduce, **settings: Any) -> list[Tensor]:
    """This process's parts of the masks that :func:`select` makes of the whole tensors, bit for bit.

    No score leaves its process: every process of `reduce` calls it with the same settings and with its parts of the
    same tensors, in one order. It costs 4 all-reduces in float32, or some 3 more where scores tie at the border.

    Args:
        shards: this process's part of each tensor, all of one dtype: float32, float64 or bfloat16.
        reduce: sums counts over the processes.
        settings: those of :func:`select`.

    Returns:
        Boolean tensors of the shapes of the parts; True is kept.

    Raises:
        MaskftError: a score of any process is NaN; raised on all of them.
    """
    rule = _Rule(**settings)
    if not shards:
        return []
    values, sizes = [shard.values for shard in shards], [shard.num_total for shard in shards]
    refuse_nan(reduce(num_nan(values).to(torch.int64)), sum(sizes))
    if rule.selection == "threshold":
        return [transform_scores(part, rule.score_transform) >= rule.threshold for part in values]
    return top_of_shards(shards, rule.ks(sizes), reduce, abs_=rule.score_transform == "abs")


def hold_back(
    scores: Sequence[Tensor], masks: Sequence[Tensor], limit: int, threshold: float, score_transform: ScoreTransform
) -> None:
    """Have selection="threshold" flip at most `limit` weights: scores that passed the threshold least go back to it.

    They stand on the side where they were, next to the threshold, so that scores alone go on saying what the mask is.
    Among equal ones the earlier weights flip.

    Args:
        scores: float32 (out_features, in_features), changed in place.
        masks: the packed masks in use, which were chosen before the scores moved.
        limit: number of weights, in all tensors together.
    """
    flipped = [
        (transform_scores(tensor, score_transform) >= threshold) != unpack_mask(packed, tensor.shape[1])
        for tensor, packed in zip(scores, masks, strict=True)
    ]
    passed = [(transform_scores(t[f], score_transform) - threshold).abs() for t, f in zip(scores, flipped, strict=True)]
    order = torch.cat([part.to(passed[0].device) for part in passed]).sort(descending=True, stable=True).indices
    is_held = torch.ones_like(order, dtype=torch.bool)
    is_held[order[:limit]] = False
    for tensor, flips, held in zip(scores, flipped, is_held.split([len(part) for part in passed]), strict=True):
        places = flips.masked_scatter(flips, held.to(flips.device))
        values = tensor[places]
        border = torch.full_like(values, threshold)
        is_above = transform_scores(values, score_transform) >= threshold
        border = torch.where(is_above, border.nextafter(torch.full_like(border, -torch.inf)), border)
        tensor[places] = border.copysign(values) if score_transform == "abs" else border
