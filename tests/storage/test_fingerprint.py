import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import MaskftError
from maskft.storage import fingerprint as module
from maskft.storage.fingerprint import fingerprint, fingerprint_dtype


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(3, 5, generator=generator) for i in range(4)}


@given(st.sampled_from(list(tensors())), st.integers(0, 14))
def test_every_weight_matters(name: str, place: int) -> None:
    given = tensors()
    before = fingerprint(given)
    given[name].view(-1)[place] += 0.5
    assert fingerprint(given) != before


def test_names_and_shapes_matter_and_strides_do_not() -> None:
    weight = torch.zeros(2, 6)
    given = {"a": weight}, {"b": weight}, {"a": weight.view(3, 4)}, {"a": weight, "b": weight}
    assert len({fingerprint(each) for each in given}) == 4
    weight = torch.arange(12.0).view(3, 4)
    assert fingerprint({"a": weight.T.contiguous().T}) == fingerprint({"a": weight})


def test_bfloat16_values_in_float32_are_known_again() -> None:
    weights = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    wide = {name: tensor.float() for name, tensor in weights.items()}
    assert fingerprint(weights, torch.float32) == fingerprint(wide)
    assert fingerprint(wide, torch.bfloat16) == fingerprint(weights)
    assert fingerprint(weights).startswith("bfloat16:")


def test_definition() -> None:
    weight = torch.arange(6, dtype=torch.float32).view(2, 3)
    of_tensor = xxhash.xxh3_128(b"a|(2, 3)|torch.float32|" + weight.numpy().tobytes()).digest()
    assert module.tensor_digest("a", weight, torch.float32) == of_tensor
    assert fingerprint({"a": weight}) == f"float32:xxh3_128:{xxhash.xxh3_128(of_tensor).hexdigest()}"
    given = tensors()
    digests = {name: module.tensor_digest(name, given[name], torch.float32) for name in reversed(list(given))}
    assert module.combine_digests(digests, torch.float32) == fingerprint(given)
    assert fingerprint_dtype(fingerprint(given)) is torch.float32


@pytest.mark.parametrize(
    "value", ["", "nonsense", "float32:" + 32 * "0", *(f"{t}:xxh3_128:{32 * '0'}" for t in ("Tensor", "qint8", "int1"))]
)
def test_what_is_no_fingerprint_is_refused(value: str) -> None:
    with pytest.raises(MaskftError, match=f"got '{value}'"):
        fingerprint_dtype(value)


def test_difference_is_told_with_both() -> None:
    ours, other = fingerprint(tensors()), fingerprint({"a": torch.ones(1)})
    module.check_fingerprint(ours, ours, how_to_ignore="do this")
    with pytest.raises(MaskftError, match=rf"{other}.*{ours}.*or do this"):
        module.check_fingerprint(ours, other, how_to_ignore="do this")
