"""Signals in the middle of a run: a checkpoint or none, the signal's status, and the same mask once the run goes on."""

import os
import signal
from pathlib import Path

import pytest
from runs import before_step
from same import assert_same_files

from maskft.cli import main
from maskft.training.trainer import MaskTrainer

# Of one checkpoint to keep, Transformers keeps the best at a run's end, which here is that of step 2.
ONE_KEPT = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
# Of a step with an evaluation, it saves a better one alone; step 4 is worse, where a higher loss is the better.
BEST_SAVED = {"eval_strategy": "steps", "save_strategy": "best", "eval_steps": 2, "greater_is_better": "true"}


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize(("step", "saving"), [(0, {}), (2, {}), (2, ONE_KEPT), (3, BEST_SAVED)])
def test_a_preempted_run_saves_and_goes_on_to_the_same_mask(step, saving, command, tmp_path, capsys) -> None:
    flags = {"learning_rate": "1e-2", "num_train_epochs": 1} | saving
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert main(command(straight, **flags)) == 0

    before = signal.getsignal(signal.SIGTERM)
    with before_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main(command(run, **flags)) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"SIGTERM ended the run after step {step + 1} of" in capsys.readouterr().err
    assert (run / f"checkpoint-{step + 1}" / "trainer_state.json").exists()
    assert not (run / "adapter_model.safetensors").exists()

    assert main(command(run, **flags, resume_from_checkpoint="auto")) == 0
    assert_same_files(straight / "adapter_model.safetensors", run / "adapter_model.safetensors")


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize(("step", "kept"), [(1, "nothing is kept"), (3, "kept in {}: checkpoint-2; --resume")])
def test_ctrl_c_is_one_sentence_and_leaves_whole_checkpoints_alone(step, kept, command, tmp_path, capsys) -> None:
    flags = {"learning_rate": "1e-2", "num_train_epochs": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    flags |= {"eval_steps": 2, "save_steps": 2}
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert main(command(straight, **flags)) == 0
    with before_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert main(command(run, **flags)) == 130
    words = capsys.readouterr().err.splitlines()[-1]
    assert words.startswith(f"maskft train: stopped by Ctrl-C; {kept.format(run)}")
    assert not list(tmp_path.glob(".*"))
    assert main(command(run, **flags, resume_from_checkpoint="auto")) == 0
    assert_same_files(straight / "adapter_model.safetensors", run / "adapter_model.safetensors")


@pytest.mark.usefixtures("undrawn_reports")
def test_ctrl_c_leaves_no_checkpoint_that_is_half_written(command, tmp_path, monkeypatch, capsys) -> None:
    save = MaskTrainer._save_optimizer_and_scheduler
    saved = []

    def interrupted(self: MaskTrainer, folder: str) -> None:
        saved.append(Path(folder))
        save(self, folder)
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MaskTrainer, "_save_optimizer_and_scheduler", interrupted)
    flags = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    assert main(command(tmp_path / "run", **flags)) == 130
    assert [path.exists() for path in saved] == [True, False]
    assert "; kept in" in capsys.readouterr().err.splitlines()[-1]


def test_sigterm_before_training_is_one_sentence_too(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("maskft.training.run.check_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(tmp_path / "run")) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "maskft train: stopped by SIGTERM; nothing is kept."


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize("command_name", ["train", "sft"])
def test_a_result_that_a_kill_left_half_written_goes_when_the_run_goes_on(
    command_name, command, tmp_path, monkeypatch
) -> None:
    """The temporary folder of a whole model would stay for good beside the result."""
    run = tmp_path / "run"

    def arguments(**flags: object) -> list[str]:
        return [command_name, *command(run, num_train_epochs=1, **flags)[1:]]

    assert main(arguments()) == 0
    for name in ("report.json", "adapter_config.json", "config.json"):
        (run / name).unlink(missing_ok=True)
    for stale in (run / ".run.0123456789ab.partial", tmp_path / ".run.0123456789ab.partial"):
        stale.mkdir()
        (stale / "model.safetensors").write_text("half of it")
    assert main(arguments(resume_from_checkpoint="auto")) == 0
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".cache"]
