"""Ranks that differ or stall: they are named on every other one, which ends by itself."""

from pathlib import Path

import pytest

from maskft.errors import LostRankError
from maskft.training.ranks import Sign, name_stalled


def sign(num_signs: int, num_events: int, where: str = "") -> Sign:
    return Sign("host", 100, num_signs, num_events, num_events, where)


def test_a_rank_that_tells_nothing_new_is_named() -> None:
    before = [sign(4, 7), sign(4, 6), None, None]
    after = [sign(7, 7), sign(4, 6), None, sign(1, 0)]
    words, is_certain = name_stalled(before, after)
    assert is_certain
    assert words.startswith("rank 1 (host host, process 100, after step 6) no longer answers: the process is stopped")
    assert "; rank 2, which never answered, no longer answers" in words
    assert "rank 0" not in words
    assert "rank 3" not in words


def test_the_rank_that_has_done_least_is_named_where_all_live() -> None:
    before = [sign(4, 7), sign(4, 5), sign(4, 7)]
    after = [sign(7, 7, "all_reduce (c10d.py:3)"), sign(6, 6, "read (disk.py:8)"), sign(5, 7)]
    words, is_certain = name_stalled(before, after)
    assert is_certain
    assert words == "rank 1 (host host, process 100, after step 6) is behind the others, at read (disk.py:8)"


def test_none_is_named_where_all_are_equally_far() -> None:
    words, is_certain = name_stalled([sign(4, 7)] * 2, [sign(7, 7, "a"), sign(6, 7, "b")])
    assert not is_certain, "a long step of all of them looks the same"
    assert "rank 0 (host host, process 100, after step 7) is at a; rank 1" in words


def train(model: Path, rows: Path, output: Path, **flags: object) -> list[str]:
    flags = {"model_name_or_path": model, "dataset_name": rows, "output_dir": output, "disable_tqdm": True} | flags
    return ["train", *(str(v) for k, f in flags.items() for v in (f"--{k}", f))]


def test_ranks_of_different_settings_end_with_both_named(start_ranks, tiny_model, sums, tmp_path) -> None:
    rates = ("1e-2", "1e-3")
    ranks = start_ranks([train(tiny_model, sums, tmp_path / "run", learning_rate=rate) for rate in rates])
    for rank in ranks:
        assert rank.wait() == 2
        assert "Rank 1 was started with `learning_rate` = 0.001 and rank 0 with 0.01; start all" in rank.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["freeze", "kill"])
def test_a_rank_that_stops_is_named_by_the_other(fault, start_ranks, tiny_model, sums, tmp_path) -> None:
    command = train(tiny_model, sums, tmp_path / "run", ddp_timeout=20)
    engine = ["--fsdp"] if fault == "freeze" else []
    first, second = start_ranks([[*engine, f"--{fault}", "1", "2", *command]] * 2)
    # Within the timeout of the test, not of the machine: how fast it starts is not what is asked.
    assert first.wait() == LostRankError.exit_status
    name = f"rank 1 (host {{}}, process {second.process.pid}, after step"
    assert name.partition("{}")[2] in first.said()
    assert "no longer answers: the process is stopped, or its machine or network is gone" in first.said()
    assert "--resume_from_checkpoint auto" in first.said()
