import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import (
    check_packed,
    majority_mask,
    num_flipped_bits,
    num_kept_bits,
    pack_mask,
    packed_shape,
    shuffled_mask,
    unpack_mask,
)

masks = arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 40))).map(torch.from_numpy)


@given(mask=masks)
def test_packing_is_numpys_little_bit_order_and_comes_back(mask: Tensor) -> None:
    packed = pack_mask(mask)
    assert torch.equal(packed, torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little")))
    assert tuple(packed.shape) == packed_shape(tuple(mask.shape))
    assert torch.equal(unpack_mask(packed, mask.shape[1]), mask)
    assert num_kept_bits(packed) == int(mask.sum())
    check_packed(packed, tuple(mask.shape), "layer")


@given(mask=masks, seed=st.integers(0, 1000))
def test_flips_are_counted_as_differing_places(mask: Tensor, seed: int) -> None:
    other = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    assert num_flipped_bits(pack_mask(mask), pack_mask(other)) == int((mask != other).sum())


@given(st.data(), st.integers(1, 7), st.integers(1, 6), st.integers(1, 40))
def test_a_majority_keeps_what_at_least_half_of_the_masks_keep(data, num_masks: int, rows: int, columns: int) -> None:
    each = [torch.from_numpy(data.draw(arrays(bool, (rows, columns)))) for _ in range(num_masks)]
    found = majority_mask([pack_mask(mask) for mask in each], columns)
    check_packed(found, (rows, columns), "layer")
    share = torch.stack(each).double().mean(0)
    assert torch.equal(unpack_mask(found, columns), share >= 0.5)


def test_wrong_shape_dtype_and_padding_are_refused() -> None:
    packed = pack_mask(torch.ones(3, 10, dtype=torch.bool))
    damaged = packed.clone()
    damaged[1, 1] |= 0b100
    for given_, columns, message in (
        (packed, 17, r"mask of `q_proj` is uint8 \(3, 2\).*needs uint8 \(3, 3\)"),
        (packed.float(), 10, r"is float32 \(3, 2\)"),
        (damaged, 10, "bits set past its 10 columns"),
    ):
        with pytest.raises(MaskftError, match=message):
            check_packed(given_, (3, columns), "q_proj")


def test_a_choice_on_a_gpu_is_packed_and_counted_without_waiting_for_it() -> None:
    # A meta tensor has no values: whatever would bring one to the host raises.
    packed = pack_mask(torch.empty(6, 21, dtype=torch.bool, device="meta"))
    assert packed.shape == (6, 3)
    assert unpack_mask(packed, 21).shape == (6, 21)
    assert num_flipped_bits(packed, packed).device.type == "meta"


@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 99))
def test_shuffling_keeps_the_count_elsewhere(shape: tuple[int, int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    shuffled = shuffled_mask(mask, torch.Generator().manual_seed(seed + 1))
    assert shuffled.shape == mask.shape
    assert shuffled.sum() == mask.sum()
    places = torch.arange(64).view(8, 8) < 32
    assert not torch.equal(shuffled_mask(places, torch.Generator().manual_seed(seed)), places)
