import math
import struct
from contextlib import suppress

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import pack_mask
from maskft.storage import memory
from maskft.storage.coding import decode_masks, encode_mask

masks = arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 40))).map(torch.from_numpy)


def decode_mask(coded: Tensor, name: str, **shapes: tuple[int, int]) -> Tensor:
    return decode_masks({name: coded}, shapes)[name]


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@given(mask=masks)
def test_a_mask_comes_back(mask: Tensor) -> None:
    packed = pack_mask(mask)
    assert torch.equal(decode_mask(encode_mask(packed), "layer"), packed)


@pytest.mark.parametrize(
    ("num_rows", "densities", "tolerance"),
    [
        *((4 * 1100, [density], 1.03) for density in (0.0, 0.0004, 0.001, 0.5, 0.9, 0.9996, 1.0)),
        (4096, [0.5, 1.0, 0.001, 0.0, 0.97], 1.01),  # each block with its own
    ],
)
def test_several_blocks_come_back_at_about_their_entropy(num_rows, densities, tolerance) -> None:
    parts = [random_mask(num_rows, 1024, density, seed) for seed, density in enumerate(densities)]
    packed = pack_mask(torch.cat(parts))
    coded = encode_mask(packed)
    assert torch.equal(decode_mask(coded, "layer"), packed)
    shares = [share for part in parts for share in (part.float().mean().item(), 1 - part.float().mean().item())]
    entropy = sum(-p * math.log2(p) for p in shares if 0 < p < 1)
    least = 32 * (3 + 2 * 5)  # the header, and eight bytes for each million of weights
    assert 8 * coded.numel() <= max(tolerance * entropy * num_rows * 1024, least)


@settings(deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_gives_some_mask_of_the_declared_shape(data) -> None:
    coded = encode_mask(pack_mask(random_mask(40, 50, 0.8)))
    place = data.draw(st.integers(0, coded.numel() - 1))
    damaged = coded.clone()
    damaged[place] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, coded.numel()))]
    # Any other exception than ours fails the test.
    with suppress(MaskftError):
        packed = decode_mask(damaged, "layer")
        assert packed.dtype == torch.uint8
        assert 8 * packed.numel() <= 1 << 20, "no more than what a file of its size pays for"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((7, 40, 7), "has the format 7, and this version of maskft reads format 2"),
        # More than a file of this size pays for.
        *(((2, *shape), "is damaged") for shape in [(2**31, 2**31), (2**32 - 1, 8), (2**22, 1), (0, 5), (5, 0)]),
        ((2, 40, 7), r"needs up to 0\.0 GB of memory, and 0\.0 GB are free"),
    ],
)
def test_what_cannot_be_decoded_is_refused(header: tuple[int, ...], message: str, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    coded = encode_mask(pack_mask(random_mask(40, 50, 0.8)))
    coded[:12] = torch.frombuffer(bytearray(struct.pack("<3I", *header)), dtype=torch.uint8)
    with pytest.raises(MaskftError, match=message):
        decode_mask(coded, "layer")


def of_shape(rows: int, columns: int, num_numbers: int) -> Tensor:
    """A coded mask of zeros that has a header alone."""
    data = struct.pack("<3I", 2, rows, columns) + bytes(4 * num_numbers)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_64_kb_that_stand_for_a_gibibyte_are_refused_before_anything_is_made(monkeypatch) -> None:
    monkeypatch.setattr(np, "empty", None)
    bomb = of_shape(2**15, 2**15, 2**14)
    assert bomb.numel() < 66_000
    with pytest.raises(MaskftError, match=r"32768 rows of 32768 bytes, and the layer has the shape \(40, 50\)"):
        decode_mask(bomb, "layer", layer=(40, 50))
    with pytest.raises(MaskftError, match=r"its layer has 8\.6e\+09 weights"):
        decode_mask(bomb, "layer")
    # Each fits, and all together do not.
    monkeypatch.setattr(memory, "free_memory", lambda: 3 * 2**27)
    part = of_shape(2**14, 2**14, 2**12)
    with pytest.raises(MaskftError, match=r"needs up to 1\.1 GB of memory, and 0\.4 GB are free"):
        decode_masks(dict.fromkeys("abcd", part), {})
