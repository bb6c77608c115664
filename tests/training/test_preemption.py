"""SIGTERM in the middle of a run: a checkpoint, the signal's status, and the same mask once the run goes on."""

import os
import signal

import pytest
from runs import before_step
from same import assert_same_files

from maskft.cli import main


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize("step", [0, 2])
def test_a_preempted_run_saves_and_goes_on_to_the_same_mask(step, command, tmp_path, capsys) -> None:
    flags = {"learning_rate": "1e-2", "num_train_epochs": 1}
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
