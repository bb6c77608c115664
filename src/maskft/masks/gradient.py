"""The straight-through gradient of the scores, and gradients of several micro-batches that are added up before it.

`dL/dS` is `dL/d(W * M)` times what does not change until the scores are stepped (arXiv 2503.22764, section 3). So over
the micro-batches of a step the masked weight's gradients can be added up, where they are made, and multiplied once.
"""

import torch
from torch import Tensor

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


def add_to_sum(scores: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Add `rows @ columns`, of the shape of `scores`, to the sum in `scores.grad`.

    Until :func:`finish_sum`, that is no gradient of the scores, and what frees or zeroes gradients finds it there.

    Returns:
        False where it cannot be kept there: autograd or a hook waits for the gradient itself.
    """
    if not scores.is_leaf or scores._backward_hooks or scores._post_accumulate_grad_hooks:
        return False
    total = scores.grad
    if total is None:
        total = _product(rows, columns, scores.dtype)
        setattr(total, _IS_SUM, True)
        scores.grad = total
        return True
    if not hasattr(total, _IS_SUM):
        return False
    if _is_added_up_wider(rows, total.dtype):
        torch.addmm(total, rows, columns, out_dtype=total.dtype, out=total)
    else:
        total.add_(rows @ columns)
    return True


def finish_sum(scores: Tensor, weight: Tensor, reference: Tensor | None = None, *, abs_: bool) -> None:
    """Make the scores' gradient of the sum in `scores.grad`, where it is one; see :func:`straight_through_gradient`."""
    total = scores.grad
    if total is not None and hasattr(total, _IS_SUM):
        delattr(total, _IS_SUM)
        scores.grad = straight_through_gradient(total, weight, scores.detach(), reference, abs_=abs_)


def _product(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_added_up_wider(rows, dtype):
        return torch.mm(rows, columns, out_dtype=dtype)
    return (rows @ columns).to(dtype)


def _is_added_up_wider(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether the matrix product itself can have and add to a wider dtype."""
    return rows.is_cuda and dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)
