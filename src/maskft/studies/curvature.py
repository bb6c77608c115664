"""Sharpness of a loss: the largest eigenvalue of its Hessian, by power iteration on Hessian-vector products."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskft.studies.directions import Terms, Weights, dot, random_direction


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian and how well it is known.

    Attributes:
        eigenvalue: the Rayleigh quotient v.Hv of the last vector; the largest by value, not by size.
        num_iterations: Hessian-vector products spent.
        residual: ||Hv - eigenvalue v||, v of unit length: some eigenvalue lies within this distance of `eigenvalue`.
        converged: whether the iteration settled to its tolerance.
        history: the Rayleigh quotients of all iterations.
    """

    eigenvalue: float
    num_iterations: int
    residual: float
    converged: bool
    history: tuple[float, ...]


def hessian_vector_product(terms: Terms, weights: Weights, vector: Weights) -> Weights:
    """The Hessian of the sum of `terms` with respect to the tensors that `vector` names, times `vector`.

    By differentiating the inner product of gradient and vector (Pearlmutter 1994); a term is dropped from memory
    before the next one is taken.
    """
    product = {name: torch.zeros_like(value) for name, value in vector.items()}
    for term in terms:
        moving = {name: weights[name].detach().requires_grad_() for name in vector}
        gradients = torch.autograd.grad(term(weights | moving), list(moving.values()), create_graph=True)
        inner = _dot(gradients, list(vector.values()))
        if not inner.requires_grad:  # a term that is linear in the weights
            continue
        parts = torch.autograd.grad(inner, list(moving.values()), allow_unused=True)
        for total, part in zip(product.values(), parts, strict=True):
            if part is not None:
                total += part
    return product


def largest_eigenvalue(
    terms: Terms,
    weights: Weights,
    names: list[str],
    *,
    num_iterations: int = 50,
    tolerance: float = 0.01,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> Sharpness:
    """The largest eigenvalue of the Hessian with respect to the tensors `names`, at `weights`.

    Power iteration finds the eigenvalue that is largest by size. Where it settles on a negative one, its vector is
    taken out of the space and the iteration begins anew, until it settles on one that is not negative, or the products
    are spent. (Shifting the Hessian instead would lift its many eigenvalues near zero to the size of the negative one,
    which slows the iteration down a lot.)

    Args:
        terms: the loss.
        weights: where the Hessian is taken.
        names: tensors of `weights` that it is taken over.
        num_iterations: most Hessian-vector products to spend.
        tolerance: stop when the residual, within the space that is left, is at most this share of |eigenvalue|.
        seed: of the first vector.
        advance: called with 1 after each product.
    """
    taken_out: list[Weights] = []
    settled: Sharpness | None = None
    history: list[float] = []
    shape = {name: weights[name] for name in names}
    vector = _unit(random_direction(shape, seed))
    eigenvalue, residual = 0.0, math.inf
    while len(history) < num_iterations:
        product = hessian_vector_product(terms, weights, vector)
        eigenvalue = dot(vector, product)
        history.append(eigenvalue)
        residual = _norm({name: value - eigenvalue * vector[name] for name, value in product.items()})
        if advance is not None:
            advance(1)
        if not math.isfinite(eigenvalue):
            break
        product = _without(product, taken_out)
        inside = _norm({name: value - eigenvalue * vector[name] for name, value in product.items()})
        if inside <= tolerance * abs(eigenvalue):
            found = Sharpness(eigenvalue, len(history), residual, True, tuple(history))
            if eigenvalue >= 0:
                return found
            settled = found
            taken_out.append(vector)
            product = _without(random_direction(shape, seed + len(taken_out)), taken_out)
        if _norm(product) < 1e-6:  # nothing is left, or the loss has no curvature there
            break
        vector = _unit(product)
    if settled and math.isfinite(eigenvalue) and settled.eigenvalue >= eigenvalue:
        used_up = len(history) == num_iterations
        return Sharpness(settled.eigenvalue, len(history), settled.residual, not used_up, tuple(history))
    return Sharpness(eigenvalue, len(history), residual, False, tuple(history))


def _dot(a: tuple[Tensor, ...], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(vector: Weights) -> float:
    return math.sqrt(dot(vector, vector))


def _without(vector: Weights, taken_out: list[Weights]) -> Weights:
    for other in taken_out:
        along = dot(vector, other)
        vector = {name: value - along * other[name] for name, value in vector.items()}
    return vector


def _unit(vector: Weights) -> Weights:
    size = _norm(vector)
    return {name: value / size for name, value in vector.items()}
