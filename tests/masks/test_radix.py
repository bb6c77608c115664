import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference import matrices_of_one_dtype
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import select
from maskft.masks.radix import Reduce, Shard
from maskft.masks.selection import Selection, select_sharded

RULES: tuple[Selection, ...] = ("topk", "global_topk")


def cut(tensor: Tensor, cuts: Sequence[float]) -> list[Shard]:
    """Parts of a tensor, cut anywhere (in shares of its length); some are empty."""
    ends = [0, *sorted(int(c * tensor.numel()) for c in cuts), tensor.numel()]
    flat = tensor.reshape(-1)
    return [Shard(flat[a:b], a, tensor.numel()) for a, b in itertools.pairwise(ends)]


def in_processes(num_processes: int, run: Callable[[int, Reduce], object]) -> list:
    """What `run(rank, reduce)` returns or raises in threads that stand for processes."""
    barrier = threading.Barrier(num_processes, timeout=60)
    given_in: list[Tensor] = [torch.empty(0)] * num_processes

    def work(rank: int) -> object:
        def reduce(counts: Tensor) -> Tensor:
            given_in[rank] = counts
            barrier.wait()
            total = torch.stack(given_in).sum(0)
            barrier.wait()
            return total

        try:
            return run(rank, reduce)
        except MaskftError as error:
            return error

    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(work, range(num_processes)))


@settings(deadline=None)
@given(
    scores=matrices_of_one_dtype(),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    selection=st.sampled_from(["topk", "global_topk", "threshold"]),
    density=st.floats(0.001, 1.0),
    score_transform=st.sampled_from(["abs", "none"]),
)
def test_shards_cut_anywhere_give_the_mask_of_the_whole(scores, cuts, selection, density, score_transform) -> None:
    rule = {"selection": selection, "density": density, "threshold": 0.5, "score_transform": score_transform}
    shards = [cut(tensor, cuts) for tensor in scores]
    parts = in_processes(len(cuts) + 1, lambda rank, reduce: select_sharded([s[rank] for s in shards], reduce, **rule))
    for i, expected in enumerate(select(scores, **rule)):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected.reshape(-1))


@pytest.mark.parametrize("selection", RULES)
def test_the_number_of_rounds_does_not_depend_on_the_number_of_tensors(selection) -> None:
    def num_rounds(scores: list[Tensor]) -> int:
        rounds = []

        def reduce(counts: Tensor) -> Tensor:
            rounds.append(counts.shape)
            return counts

        select_sharded([Shard(t, 0, t.numel()) for t in scores], reduce, selection=selection)
        return len(rounds)

    generator = torch.Generator().manual_seed(0)
    assert num_rounds([torch.randn(40, 50, generator=generator) for _ in range(9)]) == 4
    assert num_rounds([torch.ones(40, 50) for _ in range(9)]) == 6, "two rounds more for positions up to 2000"


def test_a_nan_on_one_process_stops_all_of_them() -> None:
    scores = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    shards = cut(scores, [0.5])
    results = in_processes(2, lambda rank, reduce: select_sharded([shards[rank]], reduce, selection="topk"))
    assert [str(error) for error in results] == [
        "1 of 4 mask scores are NaN, so no mask can be chosen; lower the learning rate or go back to an earlier "
        "checkpoint."
    ] * 2


def test_an_unknown_selection_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(MaskftError, match="must be one of topk, global_topk, threshold, got 'top'"):
        select_sharded([], lambda counts: pytest.fail("sent"), selection="top")  # type: ignore[arg-type]
