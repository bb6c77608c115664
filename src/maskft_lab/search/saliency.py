"""How much a mask over each layer could change the loss, from one pass of gradients."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"\.(\d+)\.")


def layer_saliency(
    model: nn.Module,
    names: Iterable[str],
    terms: Iterable[Callable[[dict[str, Tensor]], Tensor]],
    reference: nn.Module | None = None,
) -> dict[int, float]:
    """`sum |g * (W - W_reference)|` over the masked weights of each layer, g being the gradient of the whole loss.

    To first order, leaving out a weight changes the loss by `-g * (W - W_reference)`, so the sum is the change that the
    best and the worst mask of the layer lie apart.

    Args:
        model: its parameters are left as they are.
        names: modules that would be masked.
        terms: the loss, as functions of moved parameters that add up to it; kept gradients need as much memory as the
            weights of `names`.
        reference: a model of the same modules, on any device, whose weights stand where a mask leaves one out; None is
            zeros.

    Returns:
        The sum by index of the layer, in units of the loss.
    """
    names = list(names)
    moving = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().requires_grad_() for name in names}
    gradients = {name: torch.zeros_like(weight) for name, weight in moving.items()}
    for term in terms:
        # Not `backward`, which would leave gradients on the model's other parameters.
        parts = torch.autograd.grad(term(moving), list(moving.values()), allow_unused=True)
        for total, part in zip(gradients.values(), parts, strict=True):
            if part is not None:
                total += part
    totals: dict[int, float] = {}
    for name, weight in moving.items():
        found = _LAYER.search(name)
        if found is None:
            continue
        layer = int(found.group(1))
        change = weight.detach()
        if reference is not None:
            change = change - reference.get_parameter(name).detach().to(weight)
        totals[layer] = totals.get(layer, 0.0) + float((gradients[name] * change).abs().sum(dtype=torch.float64))
    return totals


def layer_groups(num_layers: int, layers_per_group: int) -> list[tuple[int, ...]]:
    """Neighbouring layers in groups; the last holds what is left."""
    return [
        tuple(range(start, min(start + layers_per_group, num_layers)))
        for start in range(0, num_layers, layers_per_group)
    ]
