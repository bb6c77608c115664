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
        converged: whether the residual is at most the tolerance times |eigenvalue|.
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

    Power iteration finds the eigenvalue that is largest by size. Where the iteration settles on a negative one, it goes
    on with the Hessian shifted by that value, whose dominant eigenvector is that of the largest eigenvalue.

    Args:
        terms: the loss.
        weights: where the Hessian is taken.
        names: tensors of `weights` that it is taken over.
        num_iterations: most Hessian-vector products to spend.
        tolerance: stop when the residual is at most this share of |eigenvalue|.
        seed: of the first vector.
        advance: called with 1 after each product.
    """
    vector = _unit(random_direction({name: weights[name] for name in names}, seed))
    shift = 0.0
    eigenvalue, residual = 0.0, math.inf
    history: list[float] = []
    for _ in range(num_iterations):
        product = hessian_vector_product(terms, weights, vector)
        eigenvalue = dot(vector, product)
        history.append(eigenvalue)
        rest = {name: value - eigenvalue * vector[name] for name, value in product.items()}
        residual = math.sqrt(dot(rest, rest))
        if advance is not None:
            advance(1)
        if not math.isfinite(eigenvalue):
            break
        if residual <= tolerance * abs(eigenvalue):
            if eigenvalue >= 0 or shift:
                return Sharpness(eigenvalue, len(history), residual, True, tuple(history))
            shift = eigenvalue
            vector = _unit(random_direction({name: weights[name] for name in names}, seed + 1))
            continue
        step = {name: value - shift * vector[name] for name, value in product.items()}
        if dot(step, step) == 0:
            break
        vector = _unit(step)
    return Sharpness(eigenvalue, len(history), residual, False, tuple(history))


def _dot(a: tuple[Tensor, ...], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _unit(vector: Weights) -> Weights:
    size = math.sqrt(dot(vector, vector))
    return {name: value / size for name, value in vector.items()}
