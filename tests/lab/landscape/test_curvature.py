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
    settings = {"num_iterations": num_iterations, "tolerance": tolerance}
    found = largest_eigenvalue(terms, weights, ["a", "b"], **settings)
    assert found.converged
    assert found.eigenvalue == pytest.approx(max(values), abs=1e-3)
    assert found.num_iterations <= num_iterations


def test_a_product_is_that_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randn(6, 2)

    def loss(weights: Weights) -> Tensor:
        return ((torch.tanh(x @ weights["a"].T) @ weights["b"].T - y) ** 2).mean()

    weights = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}

    def flat(vector: Tensor) -> Tensor:
        return loss({"a": vector[:12].view(4, 3), "b": vector[12:].view(2, 4)})

    start = torch.cat([weights["a"].flatten(), weights["b"].flatten()])
    hessian = torch.autograd.functional.hessian(flat, start)
    vector = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
    product = hessian_vector_product([loss], weights, vector)
    wanted = hessian @ torch.cat([vector["a"].flatten(), vector["b"].flatten()])
    torch.testing.assert_close(torch.cat([v.flatten() for v in product.values()]), wanted, rtol=1e-4, atol=1e-5)
    # Over some of the tensors: that block alone.
    block = hessian_vector_product([loss], weights, {"b": vector["b"]})["b"].flatten()
    torch.testing.assert_close(block, hessian[12:, 12:] @ vector["b"].flatten(), rtol=1e-4, atol=1e-5)


def test_a_positive_eigenvalue_among_many_zeros_is_found_below_a_larger_negative_one() -> None:
    """As in a language model: the negative one is larger, and nearly all others are zero."""
    diagonal = torch.zeros(300, 300)
    diagonal[0, 0], diagonal[7, 9], diagonal[200, 1] = -10.0, 5.0, 1.0
    found = largest_eigenvalue(
        [lambda w: (diagonal * w["a"] ** 2).sum() / 2], {"a": torch.ones(300, 300)}, ["a"], num_iterations=30
    )
    assert found.converged
    assert found.eigenvalue == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_the_top_of_a_network_s_hessian_below_a_larger_negative_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, y = draw(16, 5), torch.randint(4, (16,), generator=generator)
    weights = {"a": draw(6, 5), "b": draw(4, 6)}

    def loss(weights: Weights) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(x @ weights["a"].T) @ weights["b"].T, y)

    def flat(vector: Tensor) -> Tensor:
        return loss({"a": vector[:30].view(6, 5), "b": vector[30:].view(4, 6)})

    hessian = torch.autograd.functional.hessian(flat, torch.cat([value.flatten() for value in weights.values()]))
    bottom, *_, top = torch.linalg.eigvalsh(hessian).tolist()
    assert -bottom > top > 0
    found = largest_eigenvalue([loss], weights, ["a", "b"], num_iterations=30, seed=seed)
    assert found.converged
    assert found.eigenvalue == pytest.approx(top, rel=1e-3)
    assert found.num_iterations < 20
    # What an iteration that was cut says is a lower bound, and no worse than that of a shorter one.
    cuts = [largest_eigenvalue([loss], weights, ["a", "b"], num_iterations=n, seed=seed) for n in (1, 4, 7)]
    assert not any(cut.converged for cut in cuts)
    assert [cut.num_iterations for cut in cuts] == [1, 4, 7]
    bounds = [cut.eigenvalue for cut in cuts]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= top + 1e-5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.integers(0, 1000))
def test_some_eigenvalue_lies_within_the_residual(values: list[float], seed: int) -> None:
    weights = {"a": torch.ones(2, 2)}
    matrix = with_eigenvalues(values, seed)
    found = largest_eigenvalue([lambda w: quadratic(matrix, w)], weights, ["a"], num_iterations=30, seed=seed)
    if not found.converged:
        assert found.eigenvalue <= max(values) + 1e-4
        return
    assert np.abs(np.array(values) - found.eigenvalue).min() <= found.residual + 1e-4


def test_a_loss_without_curvature_and_one_that_is_no_number() -> None:
    weights = {"a": torch.ones(2, 2)}
    flat = largest_eigenvalue([lambda w: w["a"].sum()], weights, ["a"])
    assert (flat.eigenvalue, flat.num_iterations, flat.converged) == (0, 1, True)
    broken = largest_eigenvalue([lambda w: (w["a"] * float("nan")).square().sum()], weights, ["a"])
    assert not broken.converged
    assert broken.num_iterations == 1
