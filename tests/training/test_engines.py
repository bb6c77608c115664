"""`maskft train` on CPU processes under FSDP2, and under DeepSpeed's ZeRO where it is installed."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs import every
from safetensors.torch import load_file
from same import (
    assert_close_files,
    assert_close_losses,
    assert_close_masks,
    assert_same_checkpoints,
    log_of,
    num_differing_bits,
    report_of,
)

from maskft.adapters.read import read_adapter
from maskft.cli import main

# 48 rows to train on: 8 steps of 6 rows, by 1, 2 or 3 processes.
FLAGS = every(2) | {"learning_rate": "1e-2", "num_train_epochs": 1, "logging_steps": 1}
AUTO = {"resume_from_checkpoint": "auto"}

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="DeepSpeed is no dependency; it installs without a GPU by DS_BUILD_OPS=0",
)
FSDP, ZERO = ["--fsdp"], ["--zero", "3"]
engines = pytest.mark.parametrize("engine", [FSDP, pytest.param(ZERO, marks=needs_deepspeed)], ids=["fsdp", "zero"])


def batch(num_processes: int) -> dict[str, int]:
    return {"per_device_train_batch_size": 6 // num_processes}


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(output, **FLAGS, **batch(1))) == 0
    return output


def assert_close_runs(run: Path, alone: Path) -> None:
    assert_close_losses(run, alone)
    # The adapters hold every process's part, and the masks are those of the scores; see check_saved.
    assert read_adapter(run / "checkpoint-8").score_shapes
    assert all(tensor.dtype == torch.uint8 for tensor in load_file(run / "adapter_model.safetensors").values())
    for name in ("checkpoint-8", "."):
        assert_close_masks(run / name, alone / name)


def optimizer_states(checkpoint: Path) -> list[torch.Tensor]:
    """The scores and Adam's moments of all processes, as DeepSpeed keeps them."""
    states = []
    for path in sorted(checkpoint.glob("global_step*/*optim_states.pt")):
        saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
        states += saved["fp32_flat_groups"]
        states += [state[name] for state in saved["optimizer_state_dict"]["state"].values() for name in sorted(state)]
    return states


def assert_same_states(*checkpoints: Path) -> None:
    first, second = map(optimizer_states, checkpoints)
    assert len(first) == len(second) == 8, "scores, two moments and the step of two processes"
    assert all(map(torch.equal, first, second))


@engines
def test_a_killed_run_goes_on_exactly(engine, start_ranks, run_ranks, command, alone, tmp_path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ranks(2, [*engine, *command(straight, **FLAGS, **batch(2))])
    assert_close_runs(straight, alone)

    first, _ = start_ranks(*[[*engine, "--kill", "1", "5", *command(killed, **FLAGS, **batch(2))]] * 2)
    assert first.wait() == 1, first.said()  # gloo's connection to it breaks
    assert not (killed / "checkpoint-6").exists()
    for said in run_ranks(2, [*engine, *command(killed, **FLAGS, **batch(2), **AUTO)]):
        assert f"Resuming from {killed / 'checkpoint-4'}" in said
    reports = [report_of(run) for run in (killed, straight)]
    assert log_of(reports[0]["log_history"]) == log_of(reports[1]["log_history"])
    assert reports[0]["without_mask"]["eval_loss"] == reports[1]["without_mask"]["eval_loss"] > 0
    assert num_differing_bits(killed, straight)[0] == 0
    is_same = assert_same_checkpoints if engine == FSDP else assert_same_states
    is_same(straight / "checkpoint-8", killed / "checkpoint-8")

    # What an engine writes is read by it alone, and what is written without one by none.
    name, flags = ("FSDP" if engine == FSDP else "DeepSpeed"), FLAGS | batch(1) | AUTO
    (said,) = run_ranks(1, command(killed, **flags), ends=2)
    assert f"checkpoint-8 was written under {name}, and training would go on without FSDP and DeepSpeed" in said
    (said,) = run_ranks(1, [*engine, *command(alone, **flags)], ends=2)
    assert f"was written without FSDP and DeepSpeed, and training would go on under {name}" in said
    if engine == ZERO:
        (said,) = run_ranks(1, [*engine, *command(killed, **flags)], ends=2)
        assert "was written by 2 processes under DeepSpeed" in said


def test_any_number_of_processes_goes_on_from_any_number(run_ranks, command, alone, tmp_path) -> None:
    three, two = tmp_path / "three", tmp_path / "two"
    run_ranks(3, [*FSDP, *command(three, **FLAGS, **batch(3))])
    assert_close_runs(three, alone)
    for step in (2, 4):  # as a kill after that step's checkpoint would have left it
        shutil.copytree(three / f"checkpoint-{step}", two / f"checkpoint-{step}")
    for said in run_ranks(2, [*FSDP, *command(two, **FLAGS, **batch(2), **AUTO)]):
        assert f"Resuming from {two / 'checkpoint-4'}" in said
    assert_close_runs(two, alone)


@needs_deepspeed
def test_stage_2_adds_micro_batches_up(run_ranks, command, alone, tmp_path) -> None:
    flags = FLAGS | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    run_ranks(2, ["--zero", "2", *command(tmp_path / "run", **flags)])
    assert_close_runs(tmp_path / "run", alone)


@needs_deepspeed
def test_a_whole_model_is_trained_and_its_file_is_not_empty(run_ranks, command, tmp_path) -> None:
    flags = FLAGS | {"max_steps": 4, "learning_rate": "1e-4"}
    assert main(["sft", *command(tmp_path / "alone", **flags, **batch(1))[1:]]) == 0
    run_ranks(2, [*ZERO, "sft", *command(tmp_path / "split", **flags, **batch(2))[1:]])
    assert_close_files(*(tmp_path / name / "model.safetensors" for name in ("split", "alone")))
