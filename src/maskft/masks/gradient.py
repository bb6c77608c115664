"""The straight-through gradient of the scores.

`dL/dS` is `dL/d(W * M)` times what does not change until the scores are stepped (arXiv 2503.22764, section 3).
"""

import torch
from torch import Tensor

from maskft.masks.acceleration import kernels_for

CHUNK_BYTES = 1 << 18
"""What stays in a core's cache."""


def straight_through_gradient(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, reference: Tensor | None = None, *, abs_: bool
) -> Tensor:
    """`dL/dS` from `dL/d(W * M)`; all (out_features, in_features), the result of the dtype of `scores`.

    A `grad_weight` of that dtype is overwritten. With `abs_`, a score of exactly zero counts as negative: with
    `sign(0) = 0` it would stay where it is for ever.
    """
    is_fit = grad_weight.dtype == scores.dtype
    kernels = kernels_for(grad_weight, weight, scores, reference)
    if kernels is not None and scores.dtype == torch.float32:
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
