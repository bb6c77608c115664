"""`maskft train` under FSDP2 through Transformers' trainer, on CPU processes; LoRA on the same path as a control."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same import (
    assert_close_files,
    assert_same_checkpoints,
    log,
    loss_without_mask,
    losses,
    num_differing_bits,
)

from maskft.adapters.read import read_adapter
from maskft.cli import main

# 48 rows to train on: 8 steps of 6 rows, by 1, 2 or 3 processes.
STEPS = {"learning_rate": "1e-2", "num_train_epochs": 1, "logging_steps": 1, "save_total_limit": 9}
STEPS |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def batch(num_processes: int) -> dict[str, int]:
    return {"per_device_train_batch_size": 6 // num_processes}


def test_a_killed_run_goes_on_exactly(start_ranks, command, tmp_path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for rank in start_ranks(*[["--fsdp", *command(straight, **STEPS, **batch(2))]] * 2):
        assert rank.wait() == 0, rank.said()
    # Each process's rows are in the file, and in the checkpoints the scores.
    assert all(tensor.dtype == torch.uint8 for tensor in load_file(straight / "adapter_model.safetensors").values())
    assert read_adapter(straight / "checkpoint-8").has_scores

    first, _ = start_ranks(*[["--fsdp", "--kill", "1", "5", *command(killed, **STEPS, **batch(2))]] * 2)
    assert first.wait() == 1, first.said()  # gloo's connection to it breaks
    assert not (killed / "checkpoint-6").exists()
    again = command(killed, **STEPS, **batch(2), resume_from_checkpoint="auto")
    for rank in start_ranks(*[["--fsdp", *again]] * 2):
        assert rank.wait() == 0, rank.said()
        assert f"Resuming from {killed / 'checkpoint-4'}" in rank.said()
    assert log(killed) == log(straight)
    assert loss_without_mask(killed) == loss_without_mask(straight) > 0
    assert num_differing_bits(killed, straight)[0] == 0
    assert_same_checkpoints(straight / "checkpoint-8", killed / "checkpoint-8")


def cut(run: Path, output: Path, step: int) -> Path:
    """A copy of a run as a kill after that step's checkpoint would have left it."""
    output.mkdir()
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) <= step:
            shutil.copytree(checkpoint, output / checkpoint.name)
    return output


def test_any_number_of_processes_goes_on_from_any_number(start_ranks, command, tmp_path) -> None:
    flags = STEPS | {"resume_from_checkpoint": "auto"}
    alone = tmp_path / "alone"
    assert main(command(alone, **flags, **batch(1))) == 0

    def compare(run: Path) -> None:
        assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
        num_differing, num_bits = num_differing_bits(run, alone)
        # Sums of gradients are rounded in another order.
        assert num_differing <= 0.002 * num_bits

    three = tmp_path / "three"
    for rank in start_ranks(*[["--fsdp", *command(three, **flags, **batch(3))]] * 3):
        assert rank.wait() == 0, rank.said()
    compare(three)

    three_then_two = cut(three, tmp_path / "two", step=4)
    for rank in start_ranks(*[["--fsdp", *command(three_then_two, **flags, **batch(2))]] * 2):
        assert rank.wait() == 0, rank.said()
        assert f"Resuming from {three_then_two / 'checkpoint-4'}" in rank.said()
    compare(three_then_two)

    # Without FSDP nothing goes on from there, nor the reverse.
    (one,) = start_ranks(command(cut(three, tmp_path / "one", step=4), **flags, **batch(1)))
    assert one.wait() == 2
    assert "checkpoint-4 was written under FSDP, and training would go on without FSDP" in one.said()
    (one,) = start_ranks(["--fsdp", *command(alone, **flags, **batch(1))])
    assert one.wait() == 2
    assert "was written without FSDP and DeepSpeed, and training would go on under FSDP, which" in one.said()


def test_lora_takes_the_same_path_as_far_from_one_process(start_ranks, command, tmp_path) -> None:
    flags = STEPS | {"max_steps": 4}
    arguments = ["--lora", *command(tmp_path / "alone", **flags, **batch(1))]
    (alone,) = start_ranks(arguments)
    ranks = start_ranks(*[["--fsdp", "--lora", *command(tmp_path / "split", **flags, **batch(2))]] * 2)
    for rank in (alone, *ranks):
        assert rank.wait() == 0, rank.said()
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert_close_files(*(tmp_path / name / "adapter_model.safetensors" for name in ("split", "alone")))
