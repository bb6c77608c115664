"""Short runs, and what they are told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from maskft import MaskConfig
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.trainer import MaskTrainer


def every(num_steps: int) -> dict[str, object]:
    """Settings of a run that evaluates and saves so often."""
    steps = {"eval_steps": num_steps, "save_steps": num_steps, "save_total_limit": 9}
    return {"eval_strategy": "steps", "save_strategy": "steps"} | steps


def settings(output_dir: Path, **changes) -> TrainingSettings:
    values = {"num_train_epochs": 2, "learning_rate": 5e-3, "logging_steps": 2, "disable_tqdm": True, "bf16": False}
    return TrainingSettings(output_dir=str(output_dir), **(values | changes))


def data(model: Path, rows: Path, **changes) -> DataArguments:
    return DataArguments(model_name_or_path=str(model), dataset_name=str(rows), **changes)


def mask(**changes) -> MaskConfig:
    return MaskConfig(layers_to_transform=[1, 2], task_type="CAUSAL_LM", **changes)


# What the trainers of TRL are told.
OF_TRL = {"learning_rate": 5e-3, "report_to": [], "bf16": False, "disable_tqdm": True, "use_cpu": True}


def as_flags(given: dict[str, object]) -> list[str]:
    """The arguments of a command."""
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)]


def before_step(step: int, act: Callable[[], object]) -> Any:
    """A patch under which something is done before the step of that number (from 0) begins."""
    plain = MaskTrainer.training_step

    def training_step(self: MaskTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            act()
        return plain(self, *args, **kwargs)

    return mock.patch.object(MaskTrainer, "training_step", training_step)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 30).view(1, -1)).logits


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
