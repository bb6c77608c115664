"""The masked linear operation and its straight-through gradient.

`y = x @ (W * M).T + b` with a frozen `W`; or, given a reference `R`, `y = x @ (W * M + R * (1 - M)).T + b`. The
selection `M = select(S)` has no derivative; the gradient is passed straight through it: `dL/dS = dL/d(W * M) * W` (with
a reference `* (W - R)`), times `sign(S)` where the rule ranks `|S|` (arXiv 2503.22764, section 3; the estimator is that
of Bengio et al., arXiv 1308.3432).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskft.masks.acceleration import kernels_for
from maskft.masks.packing import unpack_mask
from maskft.masks.selection import ScoreTransform

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# By size of a weight in bytes: what a byte of a packed mask stands for, eight weights of all ones or all zeros.
_WORDS_OF_BYTE = {
    size: np.repeat(0 - np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little"), size)
    .view(np.uint64)
    .reshape(256, size)
    for size in _BITS
}
_CHUNK_BYTES = 1 << 18  # what stays in a core's cache


def apply_mask(weight: Tensor, mask: Tensor, reference: Tensor | None = None) -> Tensor:
    """`weight` with the left-out places set to +0.0, or to `reference`; exact in every dtype.

    Shapes (out_features, in_features); `reference` has the dtype of `weight`.
    """
    # An AND with all ones or all zeros; on a CPU several times faster than `where`.
    dtype = _BITS[weight.element_size()]
    bits, kept = weight.view(dtype), mask.view(torch.int8).to(dtype, copy=True).neg_()
    if reference is None:
        return (bits & kept).view(weight.dtype)
    others = reference.view(dtype)
    return (others ^ ((bits ^ others) & kept)).view(weight.dtype)


def apply_packed(weight: Tensor, packed: Tensor, reference: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """:func:`apply_mask` with a packed mask (uint8, (out_features, ceil(in_features / 8))); laid out as `weight` is.

    `out`, of the shape, dtype and layout of `weight`, takes the result.
    """
    masked = torch.empty_like(weight) if out is None else out
    kernels = kernels_for(weight, packed, reference, masked) if weight.shape[1] % 8 == 0 else None
    if kernels is not None:
        kernels.apply_packed(weight, packed, reference, masked)
        return masked
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.is_contiguous()
    if torch.compiler.is_compiling() or not is_plain:
        return masked.copy_(apply_mask(weight, unpack_mask(packed, weight.shape[1]), reference))
    num_rows = max(_CHUNK_BYTES // max(weight.element_size() * weight.shape[1], 1), 1)
    dtype, words = _BITS[weight.element_size()], _WORDS_OF_BYTE[weight.element_size()]
    # The weights themselves are not shown to NumPy: FSDP could not free their storage any more.
    values, result, packed_bytes = weight.detach().view(dtype), masked.view(dtype), packed.numpy()
    others = None if reference is None else reference.view(dtype)
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        kept = torch.from_numpy(np.take(words, packed_bytes[rows], axis=0)).view(dtype)
        kept = kept.view(len(kept), -1)[:, : weight.shape[1]]
        if others is None:
            torch.bitwise_and(values[rows], kept, out=result[rows])
        else:
            torch.bitwise_xor(values[rows], others[rows], out=result[rows])
            result[rows].bitwise_and_(kept).bitwise_xor_(others[rows])
    return masked


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    masked_weight: Tensor | None,
    bias: Tensor | None,
    score_transform: ScoreTransform,
    packed: Tensor | None = None,
    reference: Tensor | None = None,
    summed: "WeightGradientSum | None" = None,
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
        reference: what stands in the left-out places, of the shape and dtype of `weight`; None is zero. Frozen.
        summed: where the gradients of several micro-batches are added up; None leaves that to autograd.

    Returns:
        (..., out_features), of the dtype of `x`.
    """
    output: Tensor = _MaskedLinear.apply(
        x, weight, scores, masked_weight, bias, packed, reference, score_transform == "abs", summed
    )
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
        reference: Tensor | None,
        abs_: bool,
        summed: "WeightGradientSum | None",
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scores, masked_weight, packed, reference)
        ctx.abs_, ctx.summed = abs_, summed
        return F.linear(x, _masked(weight, masked_weight, packed, reference, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, weight, scores, masked_weight, packed, reference = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ _masked(weight, masked_weight, packed, reference, grad_output.dtype)
        grad_scores = None
        if ctx.needs_input_grad[2]:
            rows, columns, summed = grad_output.flatten(0, -2).T, x.flatten(0, -2), ctx.summed
            if summed is None or summed.is_last or not summed.add(rows, columns):
                grad_weight = rows @ columns if summed is None else summed.take(rows, columns)
                grad_scores = straight_through_gradient(grad_weight, weight, scores, reference, abs_=ctx.abs_)
        return grad_x, None, grad_scores, None, None, None, None, None, None


class WeightGradientSum:
    """The gradient of a masked weight, added up over micro-batches until the last one of a step.

    `dL/dS` is `dL/d(W * M)` times what does not change until the scores are stepped, so the sum is multiplied by it
    once and not each addend, and the products are added up where they are made. Until then the sum is the scores'
    `.grad`, so that what frees or zeroes gradients finds it there.

    Attributes:
        scores: the parameter (out_features, in_features) whose gradient it becomes.
        is_last: whether the backward to come is the step's last; as long as it is true nothing is kept here.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.is_last = True
        self._total: Tensor | None = None

    def add(self, rows: Tensor, columns: Tensor) -> bool:
        """Add `rows @ columns`; False where the scores have a gradient of their own, which autograd adds to."""
        if self._total is not None and self.scores.grad is self._total:
            _add_product(self._total, rows, columns)
            return True
        if self.scores.grad is not None:
            return False
        self._total = self.scores.grad = _product(rows, columns, self.scores.dtype)
        return True

    def take(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The sum and `rows @ columns`; nothing is kept of it here."""
        total, self._total = self._total, None
        if total is None or self.scores.grad is not total:
            return rows @ columns
        self.scores.grad = None
        _add_product(total, rows, columns)
        return total


def _product(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_added_up_wider(rows, dtype):
        return torch.mm(rows, columns, out_dtype=dtype)
    return (rows @ columns).to(dtype)


def _add_product(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    if _is_added_up_wider(rows, total.dtype):
        torch.addmm(total, rows, columns, out_dtype=total.dtype, out=total)
    else:
        total.add_(rows @ columns)


def _is_added_up_wider(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether the matrix product itself can have and add to a wider dtype."""
    return rows.is_cuda and dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)


def _masked(
    weight: Tensor,
    masked_weight: Tensor | None,
    packed: Tensor | None,
    reference: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if masked_weight is not None:
        return masked_weight
    assert packed is not None
    # Laid out in memory as the weight is, so that the product rounds as it does for the weight itself.
    return apply_packed(weight, packed, reference).to(dtype)


def straight_through_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None = None, *, abs_: bool
) -> Tensor:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), the result of the dtype of `scores`.

    A `grad_weight` of that dtype is overwritten. With `abs_`, a score of exactly zero counts as negative: with
    `sign(0) = 0` it would stay where it is for ever.
    """
    is_fit = grad_weight.dtype == scores.dtype
    kernels = kernels_for(grad_weight, weight, scores, reference) if scores.dtype == torch.float32 else None
    if kernels is not None:
        result = grad_weight if is_fit else torch.empty_like(scores)
        kernels.score_gradient(grad_weight, weight, scores, reference, result, abs_=abs_)
        return result
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or type(grad_weight) is not Tensor:
        change = weight.to(scores.dtype)
        if reference is not None:
            change = change - reference
        grad = grad_weight.to(scores.dtype).mul_(change)
        # With a slope of -1 this is `where(scores > 0, grad, -grad)` in one pass.
        return torch.ops.aten.leaky_relu_backward(grad, scores, -1.0, False) if abs_ else grad
    result = grad_weight if is_fit else torch.empty_like(scores)
    # In the cache of a core, so that memory is read and written once.
    num_rows = max(_CHUNK_BYTES // (scores.element_size() * scores.shape[1]), 1)
    for start in range(0, scores.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        change = weight[rows].to(scores.dtype)
        if reference is not None:
            change = change - reference[rows]
        grad = (result[rows] if is_fit else result[rows].copy_(grad_weight[rows])).mul_(change)
        if abs_:
            torch.ops.aten.leaky_relu_backward.grad_input(grad, scores[rows], -1.0, False, grad_input=grad)
    return result
