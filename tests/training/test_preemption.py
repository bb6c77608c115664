"""SIGTERM in the middle of a run: a checkpoint, the signal's status, and the same mask once the run goes on."""

import os
import signal
from typing import Any

import pytest
from runs import as_flags
from safetensors.torch import load_file

from maskft.cli import main
from maskft.training.trainer import MaskTrainer


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize("step", [0, 2])
def test_a_preempted_run_saves_and_goes_on_to_the_same_mask(
    step, tiny_model, sums, tmp_path, monkeypatch, capsys
) -> None:
    flags = {"model_name_or_path": tiny_model, "dataset_name": sums, "learning_rate": "1e-2", "num_train_epochs": 1}
    arguments = ["train", *as_flags(flags), "--disable_tqdm", "true"]
    assert main([*arguments, "--output_dir", str(tmp_path / "straight")]) == 0

    plain = MaskTrainer.training_step

    def preempted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(MaskTrainer, "training_step", preempted)
        assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"SIGTERM ended the run after step {step + 1} of" in capsys.readouterr().err
    assert (tmp_path / "run" / f"checkpoint-{step + 1}" / "trainer_state.json").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()

    assert main([*arguments, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "auto"]) == 0
    straight, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "run"))
    assert all(straight[name].equal(resumed[name]) for name in straight)
