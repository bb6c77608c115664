"""Filter-normalised directions, and losses along them, against plain references."""

import pytest
import torch
from torch import Tensor

from maskft_lab.landscape.directions import Weights, filter_normalised, losses_at, moved, random_direction


def test_each_row_has_the_norm_of_the_weight_s_row() -> None:
    weights = {"w": torch.randn(5, 7), "conv": torch.randn(3, 2, 4), "bias": torch.randn(5)}
    direction = random_direction(weights, seed=3)
    for name in ("w", "conv"):
        for drawn, row in zip(direction[name], weights[name], strict=True):
            assert float(drawn.norm()) == pytest.approx(float(row.norm()), rel=1e-5)
    assert not direction["bias"].any()
    # A row of zeros is not moved, and a row of zeros drawn stays one.
    normalised = filter_normalised({"w": torch.zeros(1, 3)}, {"w": torch.ones(1, 3)})
    assert not normalised["w"].any()


def test_a_direction_depends_on_seed_and_name_alone() -> None:
    weights = {"a": torch.randn(4, 4), "b": torch.randn(4, 4)}
    first = random_direction(weights, seed=0)
    turned = random_direction(dict(reversed(weights.items())), seed=0)
    assert all(torch.equal(first[name], turned[name]) for name in weights)
    assert not torch.equal(first["a"], random_direction(weights, seed=1)["a"])
    # Two draws are nearly at right angles in many dimensions.
    many = {"a": torch.randn(300, 300)}
    one, two = (random_direction(many, seed)["a"].double() for seed in (0, 1))
    assert (one * two).sum().abs() < 0.02 * one.square().sum()


def test_losses_of_a_quadratic_are_its_values() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 6)
    weights = {"w": torch.randn(2, 3), "still": torch.ones(2)}
    directions = [{"w": torch.randn(2, 3)}, {"w": torch.randn(2, 3)}]

    def loss(w: Weights) -> Tensor:
        flat = w["w"].flatten()
        return flat @ matrix @ flat * w["still"].sum()

    points = torch.randn(7, 2, dtype=torch.float64).tolist()
    for value, (a, b) in zip(losses_at([loss, loss], weights, directions, points), points, strict=True):
        place = weights["w"].double() + a * directions[0]["w"].double() + b * directions[1]["w"].double()
        wanted = 4 * float(place.flatten() @ matrix.double() @ place.flatten())
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_narrow_weights_are_moved_in_float32() -> None:
    weights = {"w": torch.full((1, 2), 256.0, dtype=torch.bfloat16)}
    step = {"w": torch.full((1, 2), 0.75)}
    # In bfloat16, 256 + 0.75 would round back each time.
    there = moved(weights, [step, step], [1.0, 1.0])["w"]
    assert there.dtype == torch.bfloat16
    assert there.tolist() == [[258.0, 258.0]]
    assert weights["w"].tolist() == [[256.0, 256.0]]
