"""The largest eigenvalue against quadratics whose Hessian is known, and against a Hessian built whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskft_lab.landscape.curvature import hessian_vector_product, largest_eigenvalue
from maskft_lab.landscape.directions import Weights


def with_eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed)))
    return basis @ torch.diag(torch.tensor(values)) @ basis.T


def quadratic(matrix: Tensor, weights: Weights) -> Tensor:
    flat = torch.cat([value.flatten() for value in weights.values()])
    return flat @ matrix @ flat / 2


@pytest.mark.parametrize(
    ("values", "num_iterations", "tolerance"),
    [
        ([6.0, 3, 1, 0.5, 0, 0, 0, 0], 2000, 1e-4),
        ([2.0, 1, 0, 0, 0, 0, 0, -9], 2000, 1e-4),
        ([-1.0, -2, -3, -4, -5, -6, -7, -9], 2000, 1e-4),
        # More products than dimensions find no other eigenvalue.
        ([3.0, 2.9, 1.0, 0.1, 0.1, 0.1, 0.1, -7.0], 60, 0.0),
    ],
)
def test_the_eigenvalue_of_a_quadratic(values: list[float], num_iterations: int, tolerance: float) -> None:
    matrix = with_eigenvalues(values)
    weights = {"a": torch.randn(2, 3), "b": torch.randn(1, 2)}
    # In two terms, that add up to it.
    terms = [lambda w: 0.25 * quadratic(matrix, w), lambda w: 0.75 * quadratic(matrix, w)]
    found = largest_eigenvalue(terms, weights, num_iterations=num_iterations, tolerance=tolerance)
    assert found.converged
    assert found.eigenvalue == pytest.approx(max(values), abs=1e-3)
    assert found.num_iterations <= num_iterations


class Network:
    """Two layers and a loss, small enough for a whole Hessian over their weights `a` and `b`."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(16, 5, generator=generator)
        self.y = torch.randint(4, (16,), generator=generator)
        self.weights = {n: torch.randn(shape, generator=generator) for n, shape in (("a", (6, 5)), ("b", (4, 6)))}
        flat = torch.cat([value.flatten() for value in self.weights.values()])
        self.hessian = torch.autograd.functional.hessian(
            lambda v: self.loss({"a": v[:30].view(6, 5), "b": v[30:].view(4, 6)}), flat
        )

    def loss(self, weights: Weights) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(self.x @ weights["a"].T) @ weights["b"].T, self.y)


def test_a_product_is_that_of_the_whole_hessian() -> None:
    network = Network(0)
    vector = {name: torch.randn_like(weight) for name, weight in network.weights.items()}
    product = hessian_vector_product([network.loss], network.weights, vector)
    wanted = network.hessian @ torch.cat([vector["a"].flatten(), vector["b"].flatten()])
    torch.testing.assert_close(torch.cat([v.flatten() for v in product.values()]), wanted, rtol=1e-4, atol=1e-5)
    # Over some of the tensors: that block alone.
    block = hessian_vector_product([network.loss], network.weights, {"b": vector["b"]})["b"].flatten()
    torch.testing.assert_close(block, network.hessian[30:, 30:] @ vector["b"].flatten(), rtol=1e-4, atol=1e-5)


def test_a_positive_eigenvalue_among_many_zeros_is_found_below_a_larger_negative_one() -> None:
    """As in a language model: the negative one is larger, and nearly all others are zero."""
    diagonal = torch.zeros(300, 300)
    diagonal[0, 0], diagonal[7, 9], diagonal[200, 1] = -10.0, 5.0, 1.0
    terms = [lambda w: (diagonal * w["a"] ** 2).sum() / 2]
    found = largest_eigenvalue(terms, {"a": torch.ones(300, 300)}, num_iterations=30)
    assert found.converged
    assert found.eigenvalue == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_the_top_of_a_network_s_hessian_below_a_larger_negative_one(seed: int) -> None:
    network = Network(seed)
    bottom, *_, top = torch.linalg.eigvalsh(network.hessian).tolist()
    assert -bottom > top > 0
    found, *cuts = (
        largest_eigenvalue([network.loss], network.weights, num_iterations=n, seed=seed) for n in (30, 1, 4, 7)
    )
    assert found.converged
    assert found.eigenvalue == pytest.approx(top, rel=1e-3)
    assert found.num_iterations < 20
    # What an iteration that was cut says is a lower bound, and no worse than that of a shorter one.
    assert [(cut.converged, cut.num_iterations) for cut in cuts] == [(False, 1), (False, 4), (False, 7)]
    bounds = [cut.eigenvalue for cut in cuts]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= top + 1e-5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.integers(0, 1000))
def test_some_eigenvalue_lies_within_the_tolerance(values: list[float], seed: int) -> None:
    weights = {"a": torch.ones(2, 2)}
    matrix = with_eigenvalues(values, seed)
    found = largest_eigenvalue([lambda w: quadratic(matrix, w)], weights, num_iterations=30, seed=seed)
    if not found.converged:
        assert found.eigenvalue <= max(values) + 1e-4
        return
    assert np.abs(np.array(values) - found.eigenvalue).min() <= 0.01 * abs(found.eigenvalue) + 1e-4


def test_a_loss_without_curvature_and_one_that_is_no_number() -> None:
    weights = {"a": torch.ones(2, 2)}
    flat = largest_eigenvalue([lambda w: w["a"].sum()], weights)
    assert (flat.eigenvalue, flat.num_iterations, flat.converged) == (0, 1, True)
    broken = largest_eigenvalue([lambda w: (w["a"] * float("nan")).square().sum()], weights)
    assert not broken.converged
    assert broken.num_iterations == 1
