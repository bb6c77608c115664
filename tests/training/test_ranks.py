"""Ranks that differ or stall: they are named on every other one, which ends by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_ranks_of_different_settings_end_with_both_named(start_ranks, command, tmp_path) -> None:
    ranks = start_ranks(*(command(tmp_path / "run", learning_rate=rate) for rate in ("1e-2", "1e-3")))
    for rank in ranks:
        assert rank.wait() == 2
        assert "Rank 1 was started with `learning_rate` = 0.001 and rank 0 with 0.01; start all" in rank.said()
    assert not (tmp_path / "run").exists()


def test_a_rank_that_stalls_under_fsdp_is_named_by_the_other(start_ranks, command, tmp_path) -> None:
    arguments = ["--fsdp", "--freeze", "1", "2", *command(tmp_path / "run", ddp_timeout=16)]
    first, second = start_ranks(arguments, arguments)
    assert first.wait() == LostRankError.exit_status
    assert f"process {second.process.pid}, after step" in first.said()
    assert "no longer answers: the process is stopped, or its machine or network is gone" in first.said()
    assert "--resume_from_checkpoint auto" in first.said()
    assert "rank 0 (" not in first.said()


def test_a_rank_that_sleeps_under_ddp_is_named_by_the_other(start_ranks, command, tmp_path) -> None:
    arguments = ["--sleep", "1", "2", *command(tmp_path / "run", ddp_timeout=12)]
    first, second = start_ranks(arguments, arguments)
    assert first.wait() == LostRankError.exit_status, first.said()
    assert f"process {second.process.pid}, after step 2) is behind the others, at " in first.said()
    assert "(one_rank.py:" in first.said(), "where it sleeps"
    assert "rank 0 (" not in first.said()


@pytest.fixture
def two_disks(tiny_model: Path, sums: Path, tmp_path: Path) -> list[Path]:
    """Folders of two hosts, each with its own copy of model and data under the same names."""
    folders = [tmp_path / "host-a", tmp_path / "host-b"]
    for folder in folders:
        shutil.copytree(tiny_model, folder / "model")
        shutil.copy(sums, folder / "sums.jsonl")
    return folders


def ends_of(start_ranks, command, folders: list[Path]) -> list[str]:
    """What two ranks say that end with status 2."""
    arguments = command(Path("run"), model_name_or_path="model", dataset_name="sums.jsonl")
    ranks = start_ranks(*[["--folders", *map(str, folders), *arguments]] * 2)
    for rank in ranks:
        assert rank.wait() == 2, rank.said()
    return [rank.said() for rank in ranks]


def test_ranks_of_different_data_end_with_both_named(start_ranks, command, two_disks) -> None:
    with (two_disks[1] / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    for said in ends_of(start_ranks, command, two_disks):
        assert "Rank 1 was started with `hash of the train data` = '" in said
        assert "start all processes with the same settings, data" in said


def test_ranks_of_different_weights_end_with_both_named(start_ranks, command, two_disks) -> None:
    path = two_disks[1] / "model" / "model.safetensors"
    weights = load_file(path)
    with torch.no_grad():
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    for said in ends_of(start_ranks, command, two_disks):
        assert "Rank 1 was started with `hash of the masked weights` = '" in said
