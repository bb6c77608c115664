import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft_lab.study.controls import control_masks


def masks_of(seed: int, shares: list[float]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    of_each = zip("012", [(3, 5), (4, 7), (1, 1)], shares, strict=True)
    masks = {name: torch.rand(shape, generator=generator) < share for name, shape, share in of_each}
    return masks, {name: torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), shares=st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=3, max_size=3))
def test_controls_leave_out_as_many_weights(seed: int, shares: list[float]) -> None:
    masks, weights = masks_of(seed, shares)
    for kind in ("shuffled", "magnitude"):
        control = control_masks(kind, masks, weights, seed)
        assert {n: int(m.sum()) for n, m in control.items()} == {n: int(m.sum()) for n, m in masks.items()}
    control = control_masks("random", masks, weights, seed)
    assert sum(int(m.sum()) for m in control.values()) == sum(int(m.sum()) for m in masks.values())
    assert {n: m.shape for n, m in control.items()} == {n: m.shape for n, m in masks.items()}


def test_magnitude_leaves_out_the_smallest() -> None:
    masks, weights = masks_of(0, [0.5, 0.5, 1.0])
    for name, mask in control_masks("magnitude", masks, weights, 0).items():
        left_out, kept = weights[name][~mask].abs(), weights[name][mask].abs()
        assert not len(left_out) or left_out.max() <= kept.min()


def test_the_seed_decides_the_places() -> None:
    masks, weights = masks_of(0, [0.5, 0.5, 1.0])
    for kind in ("random", "shuffled"):
        first, again, other = (control_masks(kind, masks, weights, seed) for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in masks)
        assert any(not torch.equal(first[name], other[name]) for name in masks)
