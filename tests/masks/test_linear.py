import pytest
import torch
from torch.nn import functional as F

from maskft.masks import apply_mask, apply_packed, masked_linear, pack_mask, select, straight_through_gradient


def make(dtype: torch.dtype = torch.float64, bias: bool = True):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 7, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 7, generator=generator, dtype=dtype)
    scores = torch.randn(11, 7, generator=generator, dtype=dtype, requires_grad=True)
    return x, weight, scores, torch.randn(11, generator=generator, dtype=dtype) if bias else None


@pytest.mark.parametrize("score_transform", ["abs", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_is_that_of_the_masked_weight_times_the_weight(score_transform, bias: bool) -> None:
    x, weight, scores, b = make(bias=bias)
    (mask,) = select([scores.detach()], selection="topk", density=0.6, score_transform=score_transform)
    masked = apply_mask(weight, mask)
    output = masked_linear(x, weight, scores, masked, b, score_transform)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (output * target).sum().backward()

    plain_x = x.detach().clone().requires_grad_()
    leaf = masked.clone().requires_grad_()  # autograd's own dL/d(W * M)
    plain = F.linear(plain_x, leaf, b)
    (plain * target).sum().backward()
    expected = leaf.grad * weight * (torch.sign(scores.detach()) if score_transform == "abs" else 1)

    assert torch.equal(output, plain)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-12, atol=0)
    assert (scores.grad[~mask] != 0).all(), "left-out weights must get a gradient too, or none could come back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_masking_is_exact_and_leaves_positive_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.5, 2.0], [float("inf"), -0.0]], dtype=dtype)
    mask = torch.tensor([[False, True], [False, True]])
    masked = apply_mask(weight, mask)
    assert masked.dtype == dtype
    assert masked[:, 0].tolist() == [0.0, 0.0]
    assert not masked[:, 0].signbit().any()
    assert torch.equal(masked[:, 1], weight[:, 1])
    assert masked[1, 1].signbit()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_applied_anew_in_the_backward_gives_the_same_bits(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, scores = (torch.randn(shape, generator=generator) for shape in [(4, 13), (6, 13), (6, 13)])
    if transposed:
        weight = weight.T.contiguous().T
    (mask,) = select([scores], selection="topk", density=0.5)
    results = []
    for masked, packed in [(torch.empty_like(weight).copy_(apply_mask(weight, mask)), None), (None, pack_mask(mask))]:
        leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        output = masked_linear(leaves[0], weight, leaves[1], masked, None, "abs", packed)
        output.square().sum().backward()
        results.append((output, leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (37, 123), (600, 1030)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_mask_gives_the_same_bytes(shape: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, reference = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if transposed:
        weight = weight.T.contiguous().T
    mask = torch.rand(shape, generator=generator) < 0.7
    for others in (None, reference):
        expected = apply_mask(weight, mask, others)
        found = apply_packed(weight, pack_mask(mask), others)
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert found.stride() == weight.stride()


def test_memory_of_a_weight_that_was_masked_can_be_freed() -> None:
    weight = torch.randn(256, 256)
    apply_packed(weight, pack_mask(weight > 0))
    weight.untyped_storage().resize_(0)  # as FSDP does; PyTorch refuses it for memory that NumPy was shown


@pytest.mark.parametrize("abs_", [True, False])
@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_grad", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_reference", [False, True])
def test_a_gradient_is_that_of_the_formula_in_every_dtype(
    abs_: bool, of_weight: torch.dtype, of_grad: torch.dtype, has_reference: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (30, 103)
    grad, weight, other, scores = (torch.randn(shape, generator=generator) for _ in range(4))
    grad, weight, reference = grad.to(of_grad), weight.to(of_weight), other.to(of_weight) if has_reference else None
    for special in (grad, weight, scores):
        special.view(-1)[torch.randint(3090, (9,), generator=generator)] = torch.tensor(
            [float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-40, -1e-40, 3e38, -3e38]
        ).to(special)
    change = weight.float() - reference.float() if reference is not None else weight.float()
    expected = grad.float() * change
    expected = torch.where(scores > 0, expected, -expected) if abs_ else expected
    found = straight_through_gradient(grad, weight, scores, reference, abs_=abs_)
    assert found.dtype == torch.float32
    assert not (scores == 0).logical_and(found == 0).any(), "a score of zero would stay where it is"
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_bias_that_learns_gets_its_gradient() -> None:
    x, weight, scores, bias = make()
    bias.requires_grad_()
    masked_linear(x, weight, scores, weight, bias, "abs").sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 10))  # 2 x 5 inputs


def test_an_input_may_be_one_vector_that_needs_no_gradient() -> None:
    x, weight, scores, bias = make()
    frozen = x.detach()[0, 0]
    masked_linear(frozen, weight, scores, weight, bias, "none").sum().backward()
    torch.testing.assert_close(scores.grad, frozen * weight)
    assert frozen.grad is None


def test_a_second_derivative_is_refused() -> None:
    x, weight, scores, bias = make()
    output = masked_linear(x, weight, scores, weight, bias, "abs").square().sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
