"""Gradients that are added up over micro-batches before they are multiplied, beside those of autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.masks import GradientSum, masked_linear


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 7, generator=generator, dtype=dtype)
    weight = torch.randn(11, 7, generator=generator, dtype=dtype)
    return x, weight, torch.randn(11, 7, generator=generator, dtype=torch.float64, requires_grad=True)


def plainly(x: Tensor, weight: Tensor, scores: Tensor) -> None:
    masked_linear(x, weight, scores, weight, None, "abs").square().sum().backward()


def in_a_sum(x: Tensor, weight: Tensor, scores: Tensor, summed: GradientSum, *, is_last: bool) -> None:
    summed.begin(scores)
    F.linear(x, summed.leaf).square().sum().backward()
    summed.end(scores, weight, abs_=True, is_last=is_last)


@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_a_sum_becomes_the_gradient_of_autograd(num_batches: int) -> None:
    x, weight, scores = make()
    plain, summed = scores.detach().clone().requires_grad_(), GradientSum(weight, weight.dtype)
    for _ in range(2):  # the second time there are gradients already
        for i in range(num_batches):
            plainly(x * (i + 1), weight, plain)
            in_a_sum(x * (i + 1), weight, scores, summed, is_last=i + 1 == num_batches)
        torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)
    for both in (plain, scores):  # what follows is added by autograd
        plainly(x, weight, both)
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_sum_is_gone_once_gradients_are_zeroed(set_to_none: bool) -> None:
    x, weight, scores = make()
    plain, summed = scores.detach().clone().requires_grad_(), GradientSum(weight, weight.dtype)
    in_a_sum(x * 7, weight, scores, summed, is_last=False)
    torch.optim.SGD([scores], lr=1.0).zero_grad(set_to_none)
    for i in range(2):
        plainly(x, weight, plain)
        in_a_sum(x, weight, scores, summed, is_last=i == 1)
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)


def test_a_sum_goes_on_in_another_masked_weight() -> None:
    x, weight, scores = make()
    plain = scores.detach().clone().requires_grad_()
    for i in range(2):
        plainly(x, weight, plain)
        in_a_sum(x, weight, scores, GradientSum(weight, weight.dtype), is_last=i == 1)
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_has_its_dtype_whatever_the_product_has(dtype: torch.dtype) -> None:
    x, weight, scores = make(torch.bfloat16)
    summed = GradientSum(weight, dtype)
    for _ in range(2):
        in_a_sum(x, weight, scores, summed, is_last=False)
        assert scores.grad is not None
        assert scores.grad.dtype == dtype
    in_a_sum(x, weight, scores, summed, is_last=True)
    exact = 3 * (2 * F.linear(x.double(), weight.double())).flatten(0, 1).T @ x.double().flatten(0, 1)
    assert scores.grad.dtype == torch.float64
    torch.testing.assert_close(scores.grad, exact * weight * scores.sign(), rtol=0.02, atol=0.05)


def test_a_gradient_that_others_wait_for_is_no_sum() -> None:
    _, _, scores = make()
    assert GradientSum.takes(scores)
    assert not GradientSum.takes(scores * 1.0)
    handle = scores.register_hook(lambda gradient: gradient * 2)
    assert not GradientSum.takes(scores)
    handle.remove()
    assert GradientSum.takes(scores)
    scores.register_post_accumulate_grad_hook(lambda parameter: None)
    assert not GradientSum.takes(scores)
