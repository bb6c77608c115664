"""`maskft train` under DeepSpeed's ZeRO, on CPU processes, where DeepSpeed is installed; LoRA as a control."""

from pathlib import Path

import pytest
import torch
from runs import as_flags
from same import assert_close_files, log, loss_without_mask, losses, num_differing_bits

from maskft.adapters.read import read_adapter
from maskft.cli import main

pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency; it installs without a GPU by DS_BUILD_OPS=0")

# 48 rows to train on: 8 steps of 6 rows, by 1 or 2 processes.
STEPS = {"learning_rate": "1e-2", "num_train_epochs": 1, "logging_steps": 1, "save_total_limit": 9}
STEPS |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
ALONE = STEPS | {"per_device_train_batch_size": 6}


def optimizer_states(checkpoint: Path) -> list[torch.Tensor]:
    """The scores and Adam's moments of all processes, as DeepSpeed keeps them."""
    result = []
    for path in sorted(checkpoint.glob("global_step*/*optim_states.pt")):
        saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
        result += saved["fp32_flat_groups"]
        result += [state[name] for state in saved["optimizer_state_dict"]["state"].values() for name in sorted(state)]
    return result


@pytest.fixture(scope="module")
def alone(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    flags = ALONE | {"model_name_or_path": tiny_model, "dataset_name": sums, "output_dir": output}
    assert main(["train", *as_flags(flags | {"disable_tqdm": True, "validation_split_percentage": 20})]) == 0
    return output


def assert_equals(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    # A mean over batches, which hold other rows.
    assert loss_without_mask(run) == pytest.approx(loss_without_mask(alone), abs=0.02)
    # The adapters hold every process's part, and the masks are those of the scores; see check_saved.
    assert read_adapter(run / "checkpoint-8").has_scores
    for name in ("checkpoint-8", "."):
        num_differing, num_bits = num_differing_bits(run / name, alone / name)
        # Sums of gradients are rounded in another order.
        assert num_differing <= 0.002 * num_bits


def test_a_killed_run_of_stage_3_goes_on_exactly(start_ranks, command, alone, tmp_path, capsys) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = STEPS | {"per_device_train_batch_size": 3}
    for rank in start_ranks(*[["--zero", "3", *command(straight, **flags)]] * 2):
        assert rank.wait() == 0, rank.said()
    assert_equals(straight, alone)

    first, _ = start_ranks(*[["--zero", "3", "--kill", "1", "5", *command(killed, **flags)]] * 2)
    assert first.wait() == 1, first.said()  # gloo's connection to it breaks
    flags |= {"resume_from_checkpoint": "auto"}
    for rank in start_ranks(*[["--zero", "3", *command(killed, **flags)]] * 2):
        assert rank.wait() == 0, rank.said()
        assert f"Resuming from {killed / 'checkpoint-4'}" in rank.said()
    assert log(killed) == log(straight)
    assert loss_without_mask(killed) == loss_without_mask(straight)
    assert num_differing_bits(killed, straight)[0] == 0
    states = [optimizer_states(run / "checkpoint-8") for run in (killed, straight)]
    assert len(states[0]) == len(states[1]) == 8, "scores, two moments and the step of two processes"
    assert all(map(torch.equal, *states))

    # What DeepSpeed writes is read by it alone, and by as many processes.
    flags |= {"per_device_train_batch_size": 6}  # as many rows of a step
    (one,) = start_ranks(["--zero", "3", *command(killed, **flags)])
    assert one.wait() == 2
    assert "was written by 2 processes under DeepSpeed" in one.said()
    assert main(command(killed, **flags)) == 2
    assert "was written under DeepSpeed, and training would go on without FSDP and DeepSpeed" in capsys.readouterr().err
    (other,) = start_ranks(["--zero", "3", *command(alone, **flags)])
    assert other.wait() == 2
    assert "was written without FSDP and DeepSpeed, and training would go on under DeepSpeed" in other.said()


def test_stage_2_adds_micro_batches_up(start_ranks, command, alone, tmp_path) -> None:
    flags = STEPS | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    for rank in start_ranks(*[["--zero", "2", *command(tmp_path / "run", **flags)]] * 2):
        assert rank.wait() == 0, rank.said()
    assert_equals(tmp_path / "run", alone)


def test_lora_takes_the_same_path_as_far_from_one_process(start_ranks, command, tmp_path) -> None:
    flags = STEPS | {"max_steps": 4}
    (alone,) = start_ranks(["--lora", *command(tmp_path / "alone", **flags, per_device_train_batch_size=6)])
    arguments = ["--zero", "3", "--lora", *command(tmp_path / "split", **flags, per_device_train_batch_size=3)]
    for rank in (alone, *start_ranks(arguments, arguments)):
        assert rank.wait() == 0, rank.said()
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert_close_files(*(tmp_path / name / "adapter_model.safetensors" for name in ("split", "alone")))


def test_a_whole_model_is_trained_and_its_file_is_not_empty(start_ranks, command, tmp_path) -> None:
    flags = STEPS | {"max_steps": 4, "learning_rate": "1e-4"}

    def sft(output: Path, batch_size: int) -> list[str]:
        return ["sft", *command(output, **flags, per_device_train_batch_size=batch_size)[1:]]

    assert main(sft(tmp_path / "alone", 6)) == 0
    for rank in start_ranks(*[["--zero", "3", *sft(tmp_path / "split", 3)]] * 2):
        assert rank.wait() == 0, rank.said()
    assert_close_files(*(tmp_path / name / "model.safetensors" for name in ("split", "alone")))
