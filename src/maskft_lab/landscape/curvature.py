"""Sharpness of a loss: the largest eigenvalue of its Hessian, by Lanczos' method on Hessian-vector products."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from maskft_lab.landscape.directions import Terms, Weights, dot, random_direction

# Of float32, in a product with the largest eigenvalue by size.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian and how well it is known.

    Attributes:
        eigenvalue: the largest Ritz value; the largest by value, not by size, and up to rounding no larger than the
            largest eigenvalue. NaN where a product is not finite.
        num_iterations: Hessian-vector products spent.
        residual: ||Hv - eigenvalue v||, v of unit length: some eigenvalue lies within this distance of `eigenvalue`.
        converged: whether the iteration settled to its tolerance.
        history: the largest Ritz values after each product.
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

    By Lanczos' method (its products in the order of Paige 1972), which holds three vectors of the tensors' size. That a
    settled eigenvalue is the largest is likely, not certain: a first vector nearly at right angles to the eigenvector
    of the largest can settle on the next.

    Args:
        terms: the loss.
        weights: where the Hessian is taken.
        names: tensors of `weights` that it is taken over.
        num_iterations: most Hessian-vector products to spend.
        tolerance: stop when the residual is at most this share of |eigenvalue|, after two products in a row.
        seed: of the first vector.
        advance: called with 1 after each product.
    """
    vector = random_direction({name: weights[name] for name in names}, seed)
    length = _norm(vector)
    vector = {name: value / length for name, value in vector.items()}
    previous = {name: torch.zeros_like(value) for name, value in vector.items()}
    diagonal: list[float] = []
    beside: list[float] = [0.0]
    history: list[float] = []
    residual, was_within, converged = math.inf, False, False
    while len(history) < num_iterations:
        product = hessian_vector_product(terms, weights, vector)
        if advance is not None:
            advance(1)
        for name, value in product.items():
            value.sub_(previous[name], alpha=beside[-1])
        diagonal.append(dot(vector, product))
        for name, value in product.items():
            value.sub_(vector[name], alpha=diagonal[-1])
        beside.append(_norm(product))
        if not math.isfinite(beside[-1]):
            history.append(math.nan)
            residual = math.nan
            break
        # Rounding makes the vectors lose their right angles to those before the last two, which nothing restores. That
        # adds copies of extreme eigenvalues that were found already; it makes none of them wrong.
        values, ritz_vectors = eigh_tridiagonal(diagonal, beside[1:-1])
        history.append(float(values[-1]))
        residual = beside[-1] * abs(float(ritz_vectors[-1, -1]))
        # All that the first vector holds has been found, and what is left is rounding.
        is_spent = beside[-1] <= _ROUNDING * float(np.abs(values).max())
        is_within = residual <= tolerance * abs(history[-1])
        # Twice, as a first vector that is nearly at right angles to the top one settles on the next for a moment.
        converged = is_spent or (is_within and was_within)
        if converged:
            break
        was_within = is_within
        previous, vector = vector, product
        for value in vector.values():
            value.div_(beside[-1])
    return Sharpness(history[-1], len(history), residual, converged, tuple(history))


def _dot(a: tuple[Tensor, ...], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _norm(vector: Weights) -> float:
    return math.sqrt(dot(vector, vector))
