"""Ranks that differ are named on every one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def test_ranks_of_different_settings_end_with_both_named(start_ranks, command, tmp_path) -> None:
    ranks = start_ranks(*(command(tmp_path / "run", learning_rate=rate) for rate in ("1e-2", "1e-3")))
    for rank in ranks:
        assert rank.wait() == 2
        assert "Rank 1 was started with `learning_rate` = 0.001 and rank 0 with 0.01; start all" in rank.said()
    assert not (tmp_path / "run").exists()


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
        assert "Rank 1 was started with `hash of the train rows` = '" in said
        assert "start all processes with the same settings, data" in said


def test_ranks_of_different_weights_end_with_both_named(start_ranks, command, two_disks) -> None:
    path = two_disks[1] / "model" / "model.safetensors"
    weights = load_file(path)
    with torch.no_grad():
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    for said in ends_of(start_ranks, command, two_disks):
        assert "Rank 1 was started with `hash of the masked weights` = '" in said
