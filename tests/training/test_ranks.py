"""Ranks that differ are named on every one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


def test_ranks_of_different_settings_end_with_both_named(start_ranks, command, tmp_path) -> None:
    ranks = start_ranks(*(command(tmp_path / "run", learning_rate=rate) for rate in ("1e-2", "1e-3")))
    for rank in ranks:
        assert rank.wait() == 2
        assert "Rank 1 was started with `learning_rate` = 0.001 and rank 0 with 0.01; start all" in rank.said()
    assert not (tmp_path / "run").exists()


def add_a_row(host: Path) -> None:
    with (host / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")


def change_a_weight(host: Path) -> None:
    path = host / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"), [(add_a_row, "hash of the train rows"), (change_a_weight, "hash of the masked weights")]
)
def test_hosts_of_different_files_end_with_both_named(change, told, run_ranks, command, tiny_model, sums, tmp_path):
    hosts = [tmp_path / "host-a", tmp_path / "host-b"]  # with files of the same names
    for host in hosts:
        shutil.copytree(tiny_model, host / "model")
        shutil.copy(sums, host / "sums.jsonl")
    change(hosts[1])
    arguments = command(Path("run"), model_name_or_path="model", dataset_name="sums.jsonl")
    for said in run_ranks(2, ["--folders", *map(str, hosts), *arguments], ends=2):
        assert f"Rank 1 was started with `{told}` = '" in said
        assert "start all processes with the same settings, data" in said
