"""Sharpness of a loss: the largest eigenvalue of its Hessian, by ARPACK on Hessian-vector products."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch.nn.utils import parameters_to_vector

from maskft_lab.landscape.directions import Terms, Weights, random_direction

# ARPACK's own default of 20 vectors would need the memory of 20 copies of the weights.
_NUM_VECTORS = 8


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian and how well it is known.

    Attributes:
        eigenvalue: the largest by value, not by size; where the iteration has not settled, the largest v'Hv / v'v that
            it met, a lower bound. NaN where a product is not finite.
        num_iterations: Hessian-vector products spent.
        converged: whether the iteration settled: some eigenvalue is then within the tolerance's share of `eigenvalue`.
    """

    eigenvalue: float
    num_iterations: int
    converged: bool


def hessian_vector_product(terms: Terms, weights: Weights, vector: Weights) -> Weights:
    """The Hessian of the sum of `terms` with respect to the tensors that `vector` names, times `vector`.

    By differentiating the inner product of gradient and vector (Pearlmutter 1994); a term is dropped from memory
    before the next one is taken.
    """
    product = {name: torch.zeros_like(value) for name, value in vector.items()}
    for term in terms:
        moving = {name: weights[name].detach().requires_grad_() for name in vector}
        gradients = torch.autograd.grad(term(weights | moving), list(moving.values()), create_graph=True)
        inner = torch.stack([(g * v).sum() for g, v in zip(gradients, vector.values(), strict=True)]).sum()
        if not inner.requires_grad:  # a term that is linear in the weights
            continue
        parts = torch.autograd.grad(inner, list(moving.values()), materialize_grads=True)
        for total, part in zip(product.values(), parts, strict=True):
            total += part
    return product


def largest_eigenvalue(
    terms: Terms,
    weights: Weights,
    *,
    num_iterations: int = 50,
    tolerance: float = 0.01,
    seed: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> Sharpness:
    """The largest eigenvalue of the Hessian with respect to `weights`, where they are.

    That a settled eigenvalue is the largest is likely, not certain: a first vector nearly at right angles to the
    eigenvector of the largest can settle on the next.

    Args:
        num_iterations: most Hessian-vector products to spend.
        tolerance: stop when the residual is at most this share of |eigenvalue|.
        seed: of the first vector.
        advance: called with 1 after each product.
    """
    start = random_direction(weights, seed)
    met: list[float] = []

    def product(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(met) == num_iterations:
            raise ArpackNoConvergence("No products are left.", [], [])
        moved = hessian_vector_product(terms, weights, _shaped(flat, start))
        result: np.ndarray[Any, Any] = parameters_to_vector(moved.values()).cpu().numpy()
        advance(1)
        met.append(float(flat.ravel() @ result / (flat.ravel() @ flat.ravel())))
        if not math.isfinite(met[-1]):
            raise ArpackNoConvergence("A product is no finite number.", [], [])
        return result

    first = parameters_to_vector(start.values()).cpu().numpy()
    hessian = LinearOperator((first.size, first.size), matvec=product, dtype=first.dtype)
    try:
        limits = {"ncv": min(_NUM_VECTORS, first.size), "maxiter": num_iterations, "tol": tolerance}
        (value,) = eigsh(hessian, k=1, which="LA", v0=first, return_eigenvectors=False, **limits)
    except ArpackError:
        if met == [0.0]:  # no curvature at all, which ARPACK cannot start from
            return Sharpness(0.0, 1, True)
        return Sharpness(max(met) if math.isfinite(met[-1]) else math.nan, len(met), False)
    return Sharpness(float(value), len(met), True)


def _shaped(flat: np.ndarray[Any, Any], like: Weights) -> Weights:
    device = next(iter(like.values())).device
    parts = torch.from_numpy(flat.ravel().copy()).to(device).split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}
