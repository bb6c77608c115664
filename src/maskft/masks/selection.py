"""Selection rules: which weights a tensor of scores keeps.

One function, :func:`select`, makes every mask: in training, on export and on merge, so that no two of them
can differ. It is exact and deterministic: `topk` keeps precisely :func:`num_kept` weights, and equal scores
are resolved by position (the earlier one is kept). Nothing is sorted, and several tensors are ranked without being
joined: see :mod:`maskft.masks.selection_cpu` and, for accelerators, :mod:`maskft.masks.selection_device`.

The method is Mask Fine-Tuning (arXiv 2503.22764, section 3); its mask keeps the top share of `|S|`.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks.acceleration import kernels_for
from maskft.masks.packing import pack_mask
from maskft.masks.selection_cpu import NotANumberError, kth_largest_on_cpu, top_on_cpu
from maskft.masks.selection_device import kth_largest_on_device, top_on_device

Selection = Literal["topk", "global_topk", "threshold"]
ScoreTransform = Literal["abs", "none"]

SELECTIONS: tuple[str, ...] = get_args(Selection)
SCORE_TRANSFORMS: tuple[str, ...] = get_args(ScoreTransform)


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
    return select_unchecked(
        scores, selection=selection, density=density, threshold=threshold, score_transform=score_transform
    )


def num_nan(scores: Sequence[Tensor]) -> Tensor:
    """Number of scores that are NaN; a scalar on their device, for which nobody has to wait on an accelerator."""
    device = scores[0].device if scores else None
    if device is None or device.type == "cpu":
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


def select_unchecked(
    scores: Sequence[Tensor],
    *,
    selection: Selection,
    density: float = 0.9,
    threshold: float = 0.0,
    score_transform: ScoreTransform = "abs",
) -> list[Tensor]:
    """:func:`select` for scores without NaN; on an accelerator the host never waits for it."""
    if selection == "threshold":
        return [transform_scores(tensor, score_transform) >= threshold for tensor in scores]
    if selection == "global_topk":
        return select_top(scores, num_kept(sum(t.numel() for t in scores), density), score_transform)
    if selection == "topk":
        return [select_top([t], num_kept(t.numel(), density), score_transform)[0] for t in scores]
    raise MaskftError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {selection!r}.")


def select_packed(
    scores: Sequence[Tensor],
    *,
    selection: Selection,
    density: float = 0.9,
    threshold: float = 0.0,
    score_transform: ScoreTransform = "abs",
) -> tuple[list[Tensor], Tensor]:
    """The masks of :func:`select` packed, for scores (out_features, in_features), and :func:`num_nan` of the scores.

    On an accelerator the host never waits for it, and the masks have no meaning where any score is NaN.

    Raises:
        MaskftError: a score on a CPU is NaN.
    """
    abs_ = score_transform == "abs"
    kernels = kernels_for(*scores)
    if kernels is not None and kernels.can_choose(scores, merge=selection == "global_topk"):
        sizes = [t.numel() for t in scores]
        pools = {"topk": sizes, "global_topk": [sum(sizes)], "threshold": []}[selection]
        ks = [num_kept(size, density) for size in pools]
        border = threshold if selection == "threshold" else None
        chosen, found = kernels.choose_packed(scores, ks, abs_=abs_, threshold=border)
        if found.device.type == "cpu":
            refuse_nan(found, sum(sizes))
        return chosen, found
    found = num_nan(scores)
    if found.device.type == "cpu":
        refuse_nan(found, sum(t.numel() for t in scores))
    masks = select_unchecked(
        scores, selection=selection, density=density, threshold=threshold, score_transform=score_transform
    )
    return [pack_mask(mask) for mask in masks], found


def kth_largest(scores: Sequence[Tensor], k: int, score_transform: ScoreTransform) -> Tensor:
    """The k-th largest transformed score over all tensors (k from 1); a scalar, at least float32.

    Raises:
        MaskftError: a score on a CPU is NaN.
    """
    abs_, is_on_cpu = score_transform == "abs", scores[0].device.type == "cpu"
    kernels = kernels_for(*scores)
    if kernels is not None and kernels.can_choose(scores, merge=True):
        with suppress(NotANumberError):
            found: Tensor = kernels.kth_largest(scores, k, abs_=abs_)
            return found
    if is_on_cpu:
        refuse_nan(num_nan(scores), sum(t.numel() for t in scores))
    return (kth_largest_on_cpu if is_on_cpu else kth_largest_on_device)(scores, k, abs_=abs_)


def select_top(scores: Sequence[Tensor], k: int, score_transform: ScoreTransform) -> list[Tensor]:
    """Masks of the k largest transformed scores over all tensors, k from 0; of equal ones the earlier are kept."""
    if k in (0, sum(t.numel() for t in scores)):
        return [torch.full_like(t, k > 0, dtype=torch.bool) for t in scores]
    top = top_on_cpu if scores[0].device.type == "cpu" else top_on_device
    return top(scores, k, abs_=score_transform == "abs")
