"""What follows an optimizer's step: the masks of the scores that it stepped are chosen, whatever the optimizer is."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

live: weakref.WeakSet[Any] = weakref.WeakSet()
"""The owners of masks, each with a method `after_step` that takes the ids of the stepped parameters."""
_inside_backward: set[int] = set()


def step_in_backward(optimizer: Optimizer) -> None:
    """Step each parameter of `optimizer` as soon as its gradient is there, and free that gradient.

    So no more than one gradient lives at a time. Call `optimizer.step()` after the backward all the same: it finds no
    gradients left, and has the masks chosen. The scores are bit for bit those of a step after the backward, as long as
    the optimizer looks at each parameter alone, one backward makes a step, and no gradients are clipped together.
    """

    def step(parameter: Tensor) -> None:
        # The others have no gradients at this time, and an optimizer passes over those.
        _inside_backward.add(id(optimizer))
        try:
            optimizer.step()
        finally:
            _inside_backward.discard(id(optimizer))
        parameter.grad = None

    for settings in optimizer.param_groups:
        for parameter in settings["params"]:
            parameter.register_post_accumulate_grad_hook(step)


def _choose_after_step(optimizer: Optimizer, *_: object) -> None:
    if id(optimizer) in _inside_backward:  # all masks of a step are chosen together, when the backward is done
        return
    stepped = {id(parameter) for settings in optimizer.param_groups for parameter in settings["params"]}
    for masks in list(live):
        masks.after_step(stepped)


# `_version` alone would not do: fused optimizers (Transformers' default) change scores without counting it up, and a
# compiled forward cannot read it. So masks are chosen right after each step.
register_optimizer_step_post_hook(torch.compiler.disable(_choose_after_step))
