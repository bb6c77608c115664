"""Gradients that are added up over micro-batches before they are multiplied, beside those of autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.errors import MaskftError
from maskft.masks import GradientSum, finish_sum, masked_linear, straight_through_gradient


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 7, generator=generator, dtype=dtype)
    weight = torch.randn(11, 7, generator=generator, dtype=dtype)
    return x, weight, torch.randn(11, 7, generator=generator, dtype=torch.float64, requires_grad=True)


def plainly(x: Tensor, weight: Tensor, scores: Tensor) -> None:
    masked_linear(x, weight, scores, weight, None, "abs").square().sum().backward()


def of(weight: Tensor, scores: Tensor):
    return lambda total: straight_through_gradient(total, weight, scores.detach(), abs_=True)


def in_a_sum(x: Tensor, weight: Tensor, scores: Tensor, summed: GradientSum, *, is_last: bool) -> None:
    summed.begin(scores)
    F.linear(x, summed.leaf).square().sum().backward()
    summed.end(scores, of(weight, scores))
    if is_last:
        finish_sum(scores, of(weight, scores))


@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_a_sum_becomes_the_gradient_of_autograd(num_batches: int) -> None:
    x, weight, scores = make()
    plain, summed = scores.detach().clone().requires_grad_(), GradientSum(weight, weight.dtype)
    for _ in range(2):  # the second time there are gradients already
        for i in range(num_batches):
            plainly(x * (i + 1), weight, plain)
            in_a_sum(x * (i + 1), weight, scores, summed, is_last=i + 1 == num_batches)
        torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)
    finish_sum(scores, of(weight, scores))  # a second time it is no sum any more
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


@pytest.mark.parametrize("other", [torch.float64, torch.float32])
def test_a_sum_goes_on_in_another_masked_weight(other: torch.dtype) -> None:
    x, weight, scores = make()
    plain = scores.detach().clone().requires_grad_()
    for i, dtype in enumerate((torch.float64, other, torch.float64)):
        plainly(x, weight, plain)
        in_a_sum(x.to(dtype), weight, scores, GradientSum(weight.to(dtype), dtype), is_last=i == 2)
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12 if other == torch.float64 else 1e-4, atol=0)


def test_two_masked_weights_are_added_up_beside_each_other() -> None:
    x, weight, scores = make()
    plain = scores.detach().clone().requires_grad_()
    both = [GradientSum(weight, weight.dtype) for _ in range(2)]
    for _ in range(2):  # micro-batches
        for summed in both:
            plainly(x, weight, plain)
            summed.begin(scores)
            F.linear(x, summed.leaf).square().sum().backward()
        for summed in both:
            summed.end(scores, of(weight, scores))
    finish_sum(scores, of(weight, scores))
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-12, atol=0)


def test_a_backward_outside_of_its_micro_batch_is_refused() -> None:
    x, weight, scores = make()
    summed = GradientSum(weight, weight.dtype)
    summed.begin(scores)
    loss = F.linear(x, summed.leaf).square().sum()
    summed.end(scores, of(weight, scores))
    loss.backward()
    with pytest.raises(MaskftError, match="backward ran after its micro-batch had ended"):
        summed.begin(scores)
    in_a_sum(x, weight, scores, summed, is_last=True)


@pytest.mark.parametrize(
    ("of_weight", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_a_sum_is_in_a_dtype_that_holds_weight_and_product(of_weight: torch.dtype, dtype: torch.dtype) -> None:
    x, weight, scores = make(torch.bfloat16)
    summed = GradientSum(weight, of_weight)
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
