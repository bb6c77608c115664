"""`torchrun -m maskft train` on two CPU processes: one run, whose mask is that of one process with the same batches."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from same import assert_close_losses, assert_close_masks, report_of

from maskft.cli import main, parse
from maskft.errors import MaskftError
from maskft.training.arguments import TrainingSettings
from maskft.training.engines import check_deepspeed, require_deepspeed, require_same_engine

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "maskft"]


def test_two_processes_learn_the_mask_of_one(command, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    flags = {"learning_rate": "1e-2", "num_train_epochs": 1, "max_length": 64, "logging_steps": 1}
    assert main(command(one, **flags, per_device_train_batch_size=8)) == 0
    told = [*TORCHRUN, *command(two, **flags, per_device_train_batch_size=4)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    # Each process would make 12 steps by itself.
    assert [report_of(run)["best"]["step"] for run in (one, two)] == [6, 6]
    assert_close_losses(two, one)
    assert_close_masks(two, one)


def test_flags_and_python_have_the_same_defaults(tmp_path: Path) -> None:
    (parsed,) = parse("train", [TrainingSettings], ["--output_dir", str(tmp_path)])
    assert parsed.use_cpu is not torch.cuda.is_available()
    assert parsed.to_dict() == TrainingSettings(output_dir=str(tmp_path)).to_dict()


def test_deepspeed_is_refused_where_it_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    flags = ["--model_name_or_path", "none", "--dataset_name", "none", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("maskft.training.engines.is_deepspeed_available", lambda: False)
    for more in (["--deepspeed", "zero3.json"], []):
        assert main(["train", *flags, *more]) == 2
        assert "DeepSpeed is set but not installed" in capsys.readouterr().err
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch sets it
    monkeypatch.setattr("maskft.training.engines.is_deepspeed_available", lambda: True)
    with pytest.raises(MaskftError, match="Transformers starts --deepspeed on GPUs alone; on CPUs use accelerate"):
        require_deepspeed("zero3.json", has_gpu=False)
    require_deepspeed("zero3.json", has_gpu=True)


def test_settings_of_deepspeed_that_make_other_masks_are_refused() -> None:
    auto, on_disk = {"bf16": {"enabled": "auto"}}, {"stage": 3, "offload_param": {"device": "nvme"}}
    for config, in_half, match in (
        ({"bf16": {"enabled": True}}, False, "round the scores"),
        (auto, True, "round the scores"),
        ({"zero_optimization": {"stage": 3}}, False, "holds no adapter unless `stage3_gather_16bit"),
        ({"zero_optimization": on_disk}, False, "parameters on a disk"),
    ):
        with pytest.raises(MaskftError, match=match):
            check_deepspeed(config, in_half)
    saving = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    check_deepspeed(auto | {"zero_optimization": saving}, in_half=False)


@pytest.mark.parametrize(
    ("engine", "written_by", "match"),
    [
        ("", "deepspeed", "was written under DeepSpeed, and training would go on without FSDP and"),
        ("", "fsdp", "under FSDP, and training would go on without FSDP and DeepSpeed, .*; start it under FSDP"),
        ("fsdp", "", "was written without FSDP and DeepSpeed, and training would go on under FSDP, which"),
        ("deepspeed", "fsdp", "was written under FSDP, and training would go on under DeepSpeed"),
        ("deepspeed", "deepspeed", "was written by 3 processes under DeepSpeed, which reads it with as many only"),
    ],
)
def test_checkpoints_of_another_engine_are_refused(engine: str, written_by: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "global_step4").mkdir()
    parts = [f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)]
    for name in {"": [], "fsdp": ["pytorch_model_fsdp.bin"], "deepspeed": parts}[written_by]:
        (tmp_path / name).touch()
    args = SimpleNamespace(world_size=2)
    trainer = SimpleNamespace(is_deepspeed_enabled=engine == "deepspeed", is_fsdp_enabled=engine == "fsdp", args=args)
    with pytest.raises(MaskftError, match=match):
        require_same_engine(trainer, tmp_path)
