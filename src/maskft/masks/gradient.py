"""The straight-through gradient of the scores, and gradients of several micro-batches that are added up before it.

`dL/dS` is `dL/d(W * M)` times what does not change until the scores are stepped (arXiv 2503.22764, section 3). So over
the micro-batches of a step the masked weight's gradients can be added up as they are, and multiplied once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks.acceleration import kernels_for

CHUNK_BYTES = 1 << 18
"""What stays in a core's cache."""

_IS_SUM = "maskft_is_sum"


def straight_through_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None = None, *, abs_: bool
) -> Tensor:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), the result of the dtype of `scores`.

    A `grad_weight` of that dtype is overwritten. With `abs_`, a score of exactly zero counts as negative: with
    `sign(0) = 0` it would stay where it is for ever.
    """
    is_fit = grad_weight.dtype == scores.dtype
    kernels = kernels_for(grad_weight, weight, scores, reference)
    if kernels is not None and kernels.can_multiply(grad_weight, weight, scores, reference):
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
    num_rows = max(CHUNK_BYTES // (scores.element_size() * scores.shape[1]), 1)
    for start in range(0, scores.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        change = weight[rows].to(scores.dtype)
        if reference is not None:
            change = change - reference[rows]
        grad = (result[rows] if is_fit else result[rows].copy_(grad_weight[rows])).mul_(change)
        if abs_:
            torch.ops.aten.leaky_relu_backward.grad_input(grad, scores[rows], -1.0, False, grad_input=grad)
    return result


class GradientSum:
    """A masked weight as a leaf of autograd, which adds its gradients up over the micro-batches of a step.

    Autograd does that in C++ and in the dtype of the weight, as for a weight that is fine-tuned itself. Between
    micro-batches the sum lies in `scores.grad`, where whatever zeroes or frees gradients finds it; until
    :func:`finish_sum`, it is no gradient of the scores.

    Args:
        masked_weight: (out_features, in_features), in the dtype that the matrix product uses; its memory is shared.
        dtype: of the weight. Gradients of another dtype are added up in one that holds both.

    Attributes:
        leaf: what a forward multiplies by.
    """

    def __init__(self, masked_weight: Tensor, dtype: torch.dtype) -> None:
        self.leaf = masked_weight.detach().requires_grad_()
        self.leaf.grad_dtype = torch.promote_types(masked_weight.dtype, dtype)

    @staticmethod
    def takes(scores: Tensor) -> bool:
        """Whether the scores' gradient can be left out: neither autograd nor a hook waits for it."""
        return scores.is_leaf and not (scores._backward_hooks or scores._post_accumulate_grad_hooks)

    def begin(self, scores: Tensor) -> None:
        """Go on with the sum in `scores.grad`, where there is one.

        Raises:
            MaskftError: a gradient came in since :meth:`end`, and so is in no sum.
        """
        if self.leaf.grad is not None:
            self.leaf.grad = None
            raise MaskftError(
                "A backward ran after its micro-batch had ended, so its gradient is lost; call it inside "
                "`with group.micro_batch(...)`, beside its forward."
            )
        total = scores.grad
        fits = total is not None and total.dtype == self.leaf.grad_dtype and total.device == self.leaf.device
        if fits and _is_sum(total):
            delattr(total, _IS_SUM)
            scores.grad, self.leaf.grad = None, total

    def end(self, scores: Tensor, to_gradient: Callable[[Tensor], Tensor]) -> None:
        """Put the sum into `scores.grad`, or what follows from it where the gradient of the scores is there.

        `to_gradient` is :func:`straight_through_gradient` of a sum, for these scores.
        """
        total, self.leaf.grad = self.leaf.grad, None
        if total is None:
            return
        before = scores.grad
        if before is None:
            setattr(total, _IS_SUM, True)
            scores.grad_dtype = None  # any, also of a backward after the sum was dropped
            scores.grad = total
        elif _is_sum(before):
            before.add_(total.to(before))
        else:
            scores.grad = before + to_gradient(total.contiguous())


def finish_sum(scores: Tensor, to_gradient: Callable[[Tensor], Tensor]) -> None:
    """Make the scores' gradient of the sum in `scores.grad`, where it is one; `to_gradient` as in `GradientSum.end`."""
    total = scores.grad
    if total is not None and _is_sum(total):
        scores.grad = None
        scores.grad_dtype = scores.dtype
        delattr(total, _IS_SUM)  # for it may be overwritten with the result
        scores.grad = to_gradient(total.contiguous())


def _is_sum(total: Tensor | None) -> bool:
    return hasattr(total, _IS_SUM)
