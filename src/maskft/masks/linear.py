"""The masked linear operation and its straight-through gradient.

`y = x @ (W * M).T + b` with a frozen `W`. The selection `M = select(S)` has no derivative; the gradient is passed
straight through it: `dL/dS = dL/d(W * M) * W`, times `sign(S)` where the rule ranks `|S|` (arXiv 2503.22764,
section 3; the estimator is that of Bengio et al., arXiv 1308.3432).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.masks.packing import unpack_mask
from maskft.masks.selection import ScoreTransform

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` with the left-out places set to +0.0; exact in every dtype. Shapes (out_features, in_features)."""
    # An AND with all ones or all zeros; on a CPU several times faster than `where`.
    bits = _BITS[weight.element_size()]
    return (weight.view(bits) & mask.view(torch.int8).to(bits).neg_()).view(weight.dtype)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    masked_weight: Tensor | None,
    bias: Tensor | None,
    score_transform: ScoreTransform,
    packed: Tensor | None = None,
) -> Tensor:
    """`x @ masked_weight.T + bias`, with the straight-through gradient for `scores`.

    Args:
        x: (..., in_features), of the dtype of `masked_weight`.
        weight: the frozen weight (out_features, in_features); it gets no gradient.
        scores: (out_features, in_features), float32 (float64 in tests); its gradient has its dtype.
        masked_weight: `weight` times the mask of `scores`, computed once for each optimizer step. None computes it from
            `packed` in the forward and again in the backward, so that nothing of its size is kept in between.
        bias: (out_features,) of the dtype of `x`, or None; frozen.
        score_transform: "abs" where the mask ranks `|S|`, else "none".
        packed: the mask as uint8 (out_features, ceil(in_features / 8)); used where `masked_weight` is None.

    Returns:
        (..., out_features), of the dtype of `x`.
    """
    output: Tensor = _MaskedLinear.apply(x, weight, scores, masked_weight, bias, packed, score_transform == "abs")
    return output


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor,
        masked_weight: Tensor | None,
        bias: Tensor | None,
        packed: Tensor | None,
        abs_: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scores, masked_weight, packed)
        ctx.abs_ = abs_
        return F.linear(x, _masked(weight, masked_weight, packed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, weight, scores, masked_weight, packed = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ _masked(weight, masked_weight, packed, grad_output.dtype)
        grad_scores = None
        if ctx.needs_input_grad[2]:
            grad_weight = grad_output.flatten(0, -2).T @ x.flatten(0, -2)
            grad_scores = straight_through_gradient(grad_weight, weight, scores, abs_=ctx.abs_)
        return grad_x, None, grad_scores, None, None, None, None


def _masked(weight: Tensor, masked_weight: Tensor | None, packed: Tensor | None, dtype: torch.dtype) -> Tensor:
    if masked_weight is not None:
        return masked_weight
    assert packed is not None
    # Laid out in memory as the weight is, so that the product rounds as it does for the weight itself.
    masked = torch.empty_like(weight)
    return masked.copy_(apply_mask(weight, unpack_mask(packed, weight.shape[1]))).to(dtype)


def straight_through_gradient(grad_weight: Tensor, weight: Tensor, scores: Tensor, *, abs_: bool) -> Tensor:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), the result of the dtype of `scores`.

    With `abs_`, a score of exactly zero counts as negative: with `sign(0) = 0` it would stay where it is for ever.
    """
    grad = grad_weight.to(scores.dtype, copy=True).mul_(weight.to(scores.dtype))
    # With a slope of -1 this is `where(scores > 0, grad, -grad)` in one pass.
    return torch.ops.aten.leaky_relu_backward(grad, scores, -1.0, False) if abs_ else grad
