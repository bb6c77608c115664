"""Directions in the space of weights, and a loss along them.

Nothing here knows of models: weights are a dict of tensors, a loss is a list of functions of that dict (its terms)
whose sum is the loss, so that a loss over many batches needs the memory of one.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Term = Callable[[Weights], Tensor]
Terms = Sequence[Term]


def random_direction(weights: Mapping[str, Tensor], seed: int) -> Weights:
    """A filter-normalised random direction (Li et al., arXiv 1712.09913, section 4).

    Each tensor is drawn from a generator of its own, seeded by `seed` and the tensor's name, so that the order of
    the tensors does not matter.

    Args:
        weights: tensors by name; a filter is what has the same first index.
        seed: of the draw.

    Returns:
        float32 tensors of the same shapes, on the same devices.
    """
    drawn = {}
    for name, weight in weights.items():
        value = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(value)
        drawn[name] = torch.randn(weight.shape, generator=generator).to(weight.device)
    return filter_normalised(drawn, weights)


def filter_normalised(direction: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Weights:
    """`direction` with each filter (row) scaled to the norm of the same row of `weights`; biases and norms get zeros.

    Tensors with fewer than two dimensions are not moved: the loss does not change when their scale and that of the
    weights beside them change together, so their share of a direction means nothing.
    """
    scaled = {}
    for name, values in direction.items():
        if values.dim() < 2:
            scaled[name] = torch.zeros_like(values)
            continue
        axes = tuple(range(1, values.dim()))
        size = torch.linalg.vector_norm(values, dim=axes, keepdim=True)
        wanted = torch.linalg.vector_norm(weights[name].float(), dim=axes, keepdim=True)
        scaled[name] = values * (wanted / size.clamp_min(torch.finfo(values.dtype).tiny))
    return scaled


def moved(weights: Weights, directions: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
    """`weights + sum_i coefficients[i] * directions[i]`, added in float32 and cast back; others stay as they are."""
    result = dict(weights)
    for name in directions[0]:
        weight = weights[name]
        total = weight.float() if weight.dtype.itemsize < 4 else weight
        for coefficient, direction in zip(coefficients, directions, strict=True):
            total = total + float(coefficient) * direction[name]
        result[name] = total.to(weight.dtype)
    return result


@torch.no_grad()
def losses_at(
    terms: Terms, weights: Weights, directions: Sequence[Weights], points: Iterable[Sequence[float]]
) -> list[float]:
    """The sum of `terms` at points of the plane through `weights` that `directions` span.

    Args:
        terms: the loss.
        weights: where the plane has its origin.
        directions: its axes, over some or all of the weights.
        points: as many numbers each as there are directions, in units of the directions.
    """
    places = (moved(weights, directions, point) for point in points)
    return [sum(float(term(place)) for term in terms) for place in places]
