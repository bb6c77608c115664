"""Selection rules: which weights a tensor of scores keeps.

One function, :func:`select`, makes every mask: in training, on export and on merge, so that no two of them
can differ. It is exact and deterministic: `topk` keeps precisely :func:`num_kept` weights, and equal scores
are resolved by position (the earlier one is kept). The k-th largest score is found by counting around a sampled
guess, not by sorting, and over several tensors without concatenating them.

The method is Mask Fine-Tuning (arXiv 2503.22764, section 3); its mask keeps the top share of `|S|`.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from maskft.errors import MaskftError

Selection = Literal["topk", "global_topk", "threshold"]
ScoreTransform = Literal["abs", "none"]

SELECTIONS: tuple[str, ...] = get_args(Selection)
SCORE_TRANSFORMS: tuple[str, ...] = get_args(ScoreTransform)

_SAMPLE_SIZE = 1 << 15
_CHUNK_SIZE = 1 << 18  # the temporaries of one chunk stay in a CPU's cache


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
    for tensor in scores:
        if tensor.sum().isnan() and tensor.isnan().any():  # the sum alone is one cheap read
            raise MaskftError(
                f"{int(tensor.isnan().sum())} of {tensor.numel()} mask scores are NaN, so no mask can be chosen; "
                "lower the learning rate or go back to an earlier checkpoint."
            )
    if selection == "threshold":
        return [transform_scores(tensor, score_transform) >= threshold for tensor in scores]
    if selection == "global_topk":
        return select_top(scores, num_kept(sum(t.numel() for t in scores), density), score_transform)
    if selection == "topk":
        return [select_top([t], num_kept(t.numel(), density), score_transform)[0] for t in scores]
    raise MaskftError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {selection!r}.")


def kth_largest(scores: Sequence[Tensor], k: int, score_transform: ScoreTransform) -> Tensor:
    """The k-th largest transformed score over all tensors (k counts from 1); a scalar of their dtype.

    A sample of the scores brackets the answer; one pass counts what lies above the bracket and collects what lies
    inside. Where the bracket missed, it is widened, so the answer is exact whatever the sample was.
    """
    num_scores = sum(t.numel() for t in scores)
    stride = max(num_scores // _SAMPLE_SIZE, 1) | 1  # odd, so that it does not walk down one column
    sample = torch.cat([transform_scores(t.reshape(-1)[::stride], score_transform) for t in scores])
    sample = sample.sort(descending=True).values
    place = k * len(sample) // num_scores
    slack = 4 * math.isqrt(len(sample))
    while True:
        first, last = place - slack, place + slack
        high = sample[first] if first >= 0 else sample.new_tensor(math.inf)
        low = sample[last] if last < len(sample) else sample.new_tensor(-math.inf)
        num_above = 0
        inside = []
        for tensor in scores:
            for chunk in tensor.reshape(-1).split(_CHUNK_SIZE):
                values = transform_scores(chunk, score_transform)
                above = values > high
                num_above += int(above.sum())
                inside.append(values[(values >= low) & ~above])
        candidates = torch.cat(inside)
        if num_above < k <= num_above + len(candidates):
            return candidates.kthvalue(len(candidates) - (k - num_above) + 1).values
        slack *= 8


def select_top(scores: Sequence[Tensor], k: int, score_transform: ScoreTransform) -> list[Tensor]:
    """Masks of the k largest transformed scores over all tensors, k from 0; of equal ones the earlier are kept."""
    if k in (0, sum(t.numel() for t in scores)):
        return [torch.full_like(t, k > 0, dtype=torch.bool) for t in scores]
    kth = kth_largest(scores, k, score_transform)
    values = [transform_scores(t, score_transform) for t in scores]
    masks = [v >= kth for v in values]
    num_surplus = sum(int(m.sum()) for m in masks) - k
    for value, mask in zip(reversed(values), reversed(masks), strict=True):
        if num_surplus == 0:
            break
        ties = (value == kth).reshape(-1).nonzero().squeeze(1)
        dropped = ties[max(len(ties) - num_surplus, 0) :]
        mask.view(-1)[dropped] = False
        num_surplus -= len(dropped)
    return masks
