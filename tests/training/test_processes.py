"""`torchrun -m maskft train` on two CPU processes: one run, whose mask is that of one process with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import as_flags
from safetensors.torch import load_file

from maskft.cli import main, parse
from maskft.errors import MaskftError
from maskft.masks import num_flipped_bits
from maskft.training.arguments import TrainingSettings
from maskft.training.engines import check_deepspeed, check_part, require_deepspeed, require_same_engine

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "maskft"]


def train(model: Path, rows: Path, output: Path, batch_size: int, launcher: list[str] | None = None) -> dict:
    """Train in this process, or in those that a launcher starts."""
    flags = {"model_name_or_path": model, "dataset_name": rows, "validation_split_percentage": 33}
    flags |= {"output_dir": output, "per_device_train_batch_size": batch_size, "learning_rate": "1e-2"}
    flags |= {"num_train_epochs": 1, "max_length": 64, "logging_steps": 1, "disable_tqdm": True}
    command = ["train", *as_flags(flags)]
    if launcher is None:
        assert main(command) == 0
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    report: dict = json.loads((output / "report.json").read_text())
    return report


def test_two_processes_learn_the_mask_of_one(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    alone = train(tiny_model, sums, tmp_path / "one", batch_size=8)
    together = train(tiny_model, sums, tmp_path / "two", batch_size=4, launcher=TORCHRUN)
    losses = [[e["loss"] for e in report["log_history"] if "loss" in e] for report in (alone, together)]
    assert together["best"]["step"] == alone["best"]["step"] == 5, "each process would make 10 steps by itself"
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # A mean over batches, which hold other rows.
    assert together["without_mask"]["eval_loss"] == pytest.approx(alone["without_mask"]["eval_loss"], abs=0.02)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    num_bits = 8 * sum(mask.numel() for mask in one.values())
    differing = sum(num_flipped_bits(one[name], two[name]) for name in one)
    # Sums of gradients are rounded in another order.
    assert differing <= 0.002 * num_bits


def test_flags_and_python_have_the_same_defaults(tmp_path: Path) -> None:
    (parsed,) = parse("train", [TrainingSettings], ["--output_dir", str(tmp_path)])
    assert parsed.use_cpu is not torch.cuda.is_available()
    assert parsed.to_dict() == TrainingSettings(output_dir=str(tmp_path)).to_dict()


def test_deepspeed_is_refused_where_it_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    flags = ["--model_name_or_path", "none", "--dataset_name", "none", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("maskft.training.engines.is_deepspeed_available", lambda: False)
    assert main(["train", *flags, "--deepspeed", "zero3.json"]) == 2
    assert "DeepSpeed is set but not installed" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch sets it
    assert main(["train", *flags]) == 2
    assert "DeepSpeed is set but not installed" in capsys.readouterr().err
    monkeypatch.setattr("maskft.training.engines.is_deepspeed_available", lambda: True)
    with pytest.raises(MaskftError, match="Transformers starts --deepspeed on GPUs alone; on CPUs use accelerate"):
        require_deepspeed("zero3.json", has_gpu=False)
    require_deepspeed("zero3.json", has_gpu=True)


@pytest.mark.parametrize(
    ("config", "in_half", "match"),
    [
        ({"bf16": {"enabled": True}}, False, "round the scores"),
        ({"bf16": {"enabled": "auto"}}, True, "round the scores"),
        ({"zero_optimization": {"stage": 3}}, False, "holds no adapter unless `stage3_gather_16bit"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, False, "parameters on a disk"),
    ],
)
def test_settings_of_deepspeed_that_make_other_masks_are_refused(config: dict, in_half: bool, match: str) -> None:
    with pytest.raises(MaskftError, match=match):
        check_deepspeed(config, in_half)
    saving = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    check_deepspeed({"bf16": {"enabled": "auto"}, "zero_optimization": saving}, in_half=False)


def zero_checkpoint(folder: Path, scores: list[torch.Tensor]) -> Path:
    """What DeepSpeed writes of its optimizer, one file a process."""
    (folder / "global_step4").mkdir(parents=True)
    for rank, part in enumerate(scores):
        state = {"optimizer_state_dict": {"zero_stage": 3, "fp32_flat_groups": [part]}}
        torch.save(state, folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_parts_that_deepspeed_saves_are_read_back(tmp_path: Path) -> None:
    parts = list(torch.arange(12.0).chunk(2))
    checkpoint = zero_checkpoint(tmp_path, [parts[0], torch.zeros(6)])
    optimizers = [SimpleNamespace(optimizer=SimpleNamespace(fp32_partitioned_groups_flat=[part])) for part in parts]
    check_part(checkpoint, optimizers[0], rank=0)
    with pytest.raises(MaskftError, match=r"rank_1_mp_rank_00_optim_states\.pt was read back after it was saved"):
        check_part(checkpoint, optimizers[1], rank=1)
    with pytest.raises(MaskftError, match="does not hold the scores that are in memory"):
        check_part(zero_checkpoint(tmp_path / "empty", [parts[0][:0]]), optimizers[0], rank=0)


@pytest.mark.parametrize(
    ("engine", "written_by", "match"),
    [
        ("", "deepspeed", "was written under DeepSpeed, and training would go on without FSDP and"),
        (
            "",
            "fsdp",
            "under FSDP, and training would go on without FSDP and DeepSpeed, .*; start it under FSDP",
        ),
        (
            "fsdp",
            "",
            "was written without FSDP and DeepSpeed, and training would go on under FSDP, which",
        ),
        ("deepspeed", "fsdp", "was written under FSDP, and training would go on under DeepSpeed"),
        ("deepspeed", "deepspeed", "was written by 3 processes under DeepSpeed, which reads it with as many only"),
    ],
)
def test_checkpoints_of_another_engine_are_refused(engine: str, written_by: str, match: str, tmp_path: Path) -> None:
    checkpoint = zero_checkpoint(tmp_path, [torch.zeros(2)] * 3 * (written_by == "deepspeed"))
    if written_by == "fsdp":
        (checkpoint / "pytorch_model_fsdp.bin").touch()
    args = SimpleNamespace(world_size=2)
    trainer = SimpleNamespace(is_deepspeed_enabled=engine == "deepspeed", is_fsdp_enabled=engine == "fsdp", args=args)
    with pytest.raises(MaskftError, match=match):
        require_same_engine(trainer, checkpoint)
