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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskft.masks.acceleration import kernels_for
from maskft.masks.packing import unpack_mask
from maskft.masks.selection import ScoreTransform

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# By size of a weight in bytes: what a byte of a packed mask stands for, eight weights of all ones or all zeros.
_EIGHT_OF_BYTE = 0 - np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little")
_WORDS_OF_BYTE = {size: np.repeat(_EIGHT_OF_BYTE, size).view(np.uint64).reshape(256, size) for size in _BITS}


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
        # A backward that still needs the old values has to notice, as with PyTorch's own operations.
        torch.autograd.graph.increment_version(masked)
        return masked
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return masked.copy_(apply_mask(weight, unpack_mask(packed, weight.shape[1]), reference))
    dtype, words = _BITS[weight.element_size()], _WORDS_OF_BYTE[weight.element_size()]
    # A quarter of the time of unpacking (4096 x 4096 in bf16, one thread: 7 and 27 ms). The weights are not shown to
    # NumPy: FSDP could not free their storage any more.
    kept = torch.from_numpy(np.take(words, packed.numpy(), axis=0)).view(dtype)
    kept = kept.view(len(packed), -1)[:, : weight.shape[1]]
    bits, result = weight.detach().view(dtype), masked.view(dtype)
    if reference is None:
        torch.bitwise_and(bits, kept, out=result)
    else:
        others = reference.view(dtype)
        torch.bitwise_xor(bits, others, out=result)
        result.bitwise_and_(kept).bitwise_xor_(others)
    return masked


def straight_through_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None = None, *, abs_: bool
) -> Tensor:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), the result of the dtype of `scores`.

    A `grad_weight` of that dtype is overwritten. With `abs_`, a score of exactly zero counts as negative: with
    `sign(0) = 0` it would stay where it is for ever.
    """
    kernels = kernels_for(grad_weight, weight, scores, reference)
    if kernels is not None and scores.dtype == torch.float32:
        result = grad_weight if grad_weight.dtype == scores.dtype else torch.empty_like(scores)
        kernels.score_gradient(grad_weight, weight, scores, reference, result, abs_=abs_)
        return result
    # A product that casts the weight itself: on a CPU a fifth faster than with a copy of it in float32.
    grad = grad_weight.to(scores.dtype).mul_(weight if reference is None else weight.to(scores.dtype) - reference)
    # With a slope of -1 this is `where(scores > 0, grad, -grad)` in one pass.
    return torch.ops.aten.leaky_relu_backward(grad, scores, -1.0, False) if abs_ else grad


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    masked_weight: Tensor | None,
    bias: Tensor | None,
    score_transform: ScoreTransform,
    packed: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """`x @ masked_weight.T + bias`, with the straight-through gradient for `scores`.

    Args:
        x: (..., in_features), of the dtype of `masked_weight`.
        weight: the frozen weight (out_features, in_features); it gets no gradient.
        scores: (out_features, in_features), float32 (float64 in tests); its gradient has its dtype.
        masked_weight: `weight` times the mask of `scores`, computed once for each optimizer step. None computes it from
            `packed` in the forward and again in the backward, so that nothing of its size is kept in between.
        bias: (out_features,) of the dtype of `x`, or None.
        score_transform: "abs" where the mask ranks `|S|`, else "none".
        packed: the mask as uint8 (out_features, ceil(in_features / 8)); used where `masked_weight` is None.
        reference: what stands in the left-out places, of the shape and dtype of `weight`; None is zero. Frozen.

    Returns:
        (..., out_features), of the dtype of `x`; it can be differentiated once.
    """
    shape = x.shape
    if bias is not None:
        # The product with a bias is a view of a matrix, which could not be changed in place (`nn.ReLU(inplace=True)`)
        # if it were made inside the function.
        x = x.reshape(-1, shape[-1])
    output: Tensor = _MaskedLinear.apply(
        x, weight, scores, masked_weight, bias, packed, reference, score_transform == "abs"
    )
    return output if bias is None else output.view(*shape[:-1], output.shape[-1])


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
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scores, masked_weight, packed, reference)
        ctx.abs_ = abs_
        return F.linear(x, _masked(weight, masked_weight, packed, reference, x.dtype), bias)

    @staticmethod
    @once_differentiable  # scores pass a gradient on by decree, which has no derivative of its own
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, weight, scores, masked_weight, packed, reference = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ _masked(weight, masked_weight, packed, reference, grad_output.dtype)
        grad_scores = None
        if ctx.needs_input_grad[2]:
            grad_weight = grad_output.reshape(-1, len(scores)).T @ x.reshape(-1, scores.shape[1])
            grad_scores = straight_through_gradient(grad_weight, weight, scores, reference, abs_=ctx.abs_)
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, None, grad_scores, None, grad_bias, None, None, None


def _masked(
    weight: Tensor, masked_weight: Tensor | None, packed: Tensor | None, reference: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if masked_weight is not None:
        return masked_weight
    assert packed is not None
    # Laid out in memory as the weight is, so that the product rounds as it does for the weight itself.
    return apply_packed(weight, packed, reference).to(dtype)
