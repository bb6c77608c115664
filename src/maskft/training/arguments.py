"""What `maskft sft` and `maskft train` can be told; names as in Transformers, TRL and PEFT."""

import os
from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from maskft.errors import MaskftError, require_flags
from maskft.training.engines import check_deepspeed, require_deepspeed
from maskft.tuner.config import MaskConfig


@dataclass
class DataArguments:
    """Where model and data come from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the model to start from."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A .jsonl, .json or .parquet file, a folder of one kind of these, or a hub name."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Validation data. Default: a part of the training data is held out."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training data held out for validation, in percent."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Dtype the weights are loaded in: float32, bfloat16, float16 or auto."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output folder that already holds a run."}
    )

    def __post_init__(self) -> None:
        require_flags(self, "model_name_or_path", "dataset_name")
        if not 1 <= self.validation_split_percentage <= 90:
            raise MaskftError(
                f"`validation_split_percentage` must be from 1 to 90, got {self.validation_split_percentage}."
            )
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise MaskftError(f"`dtype` must be float32, bfloat16, float16 or auto, got {self.dtype!r}.")


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's `SFTConfig`, with the published recipe's schedule, and validation that keeps the best checkpoint."""

    # Without a GPU, TRL's defaults (bf16, pinned memory) are refused or warn. Plain values, for the parser of flags
    # takes no factory's.
    use_cpu: bool = not torch.cuda.is_available()
    bf16: bool = torch.cuda.is_available()
    dataloader_pin_memory: bool = torch.cuda.is_available()
    activation_checkpointing: bool | None = False  # TRL's own default warns with transformers 5.23
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_loss"
    greater_is_better: bool | None = False
    report_to: str = "none"
    output_dir: str = "output"
    ddp_backend: str | None = field(
        default=None, metadata={"help": "Backend of several processes. Default: gloo on CPUs, nccl on GPUs."}
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Tasks of maskft eval, comma-separated, to score at each evaluation, as eval_TASK."},
    )
    eval_tasks_limit: int = field(default=32, metadata={"help": "Items of each task of --eval_tasks."})
    eval_data_dir: str | None = field(default=None, metadata={"help": "Local task data, as --data_dir of maskft eval."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without a better --metric_for_best_model after which a run ends."},
    )
    low_memory: bool = field(
        default=False,
        metadata={
            "help": "Step each score in the backward and keep neither gradients nor masked weights: 4.1 bytes a masked "
            "weight instead of 18. One backward makes a step, and gradients are not clipped."
        },
    )
    temperature_scaling: bool = field(
        default=False,
        metadata={
            "help": "Learn a mask with the logits divided by the temperature that suits the training rows best at the "
            "start, so that making the model less sure of itself gains nothing."
        },
    )
    optim: str | None = field(
        default=None,
        metadata={"help": "Optimizer, by Transformers' names. Default: adamw_torch_fused; adafactor for --low_memory."},
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Norm that gradients are clipped to; 0 is no clipping. Default: 1.0; 0 for --low_memory."},
    )

    def __post_init__(self) -> None:
        if self.optim is None:
            self.optim = "adafactor" if self.low_memory else "adamw_torch_fused"
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if self.low_memory else 1.0
        with_deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if self.low_memory:
            self._check_low_memory(bool(with_deepspeed))
        if with_deepspeed:
            require_deepspeed(self.deepspeed, has_gpu=torch.cuda.is_available())
        if self.use_cpu and self.ddp_backend is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Without one, processes that torchrun starts on a CPU would each train alone.
            self.ddp_backend = "gloo"
        if with_deepspeed:
            self.use_cpu = False  # which would mean without DeepSpeed; it finds out by itself
        super().__post_init__()
        if with_deepspeed:
            check_deepspeed(self.deepspeed_plugin.hf_ds_config.config, self.bf16 or self.fp16)

    def _check_low_memory(self, with_deepspeed: bool) -> None:
        reason = None
        if self.gradient_accumulation_steps > 1:
            reason = (
                f"gradients are summed over {self.gradient_accumulation_steps} backwards, so they are kept; leave "
                "--gradient_accumulation_steps out, and raise --per_device_train_batch_size instead"
            )
        elif self.max_grad_norm:
            reason = (
                f"gradients are clipped by the norm of all of them (--max_grad_norm {self.max_grad_norm}), so they are "
                "kept; set it to 0"
            )
        elif with_deepspeed:
            reason = "DeepSpeed steps copies of them; leave it out"
        elif self.fp16:
            reason = "under --fp16 a step is left out where any gradient overflows; use --bf16"
        elif self.fsdp or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            reason = "several processes sum their gradients after the backward; train in one process"
        elif torch.cuda.device_count() > 1 and not self.use_cpu and "WORLD_SIZE" not in os.environ:
            reason = "Transformers would use several GPUs; set CUDA_VISIBLE_DEVICES to one of them"
        if reason is not None:
            raise MaskftError(f"`low_memory` steps each score as soon as its gradient is there, but {reason}.")


@dataclass
class MaskArguments:
    """The mask's settings as flags; see :class:`maskft.MaskConfig`."""

    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to mask. Default: every linear layer of attention and MLP."},
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of modules to leave as they are."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers to mask, from 0. Default: all."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Where the settings below start: paper, or recommended by our own studies. Default: paper; for "
            "maskft crossfit it is always recommended."
        },
    )
    density: float | None = field(default=None, metadata={"help": "Share of weights kept, in (0, 1]. Default: 0.9."})
    selection: str | None = field(
        default=None, metadata={"help": "topk (the paper's), global_topk, or threshold (recommended)."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Lowest score kept under --selection threshold. Default: 0."}
    )
    init_scores: str | None = field(
        default=None, metadata={"help": "normal (the paper's), keep_all, uniform or magnitude."}
    )
    init_std: float | None = field(default=None, metadata={"help": "Scale of the scores at the start. Default: 0.02."})
    score_transform: str | None = field(default=None, metadata={"help": "abs or none."})
    reference: str | None = field(
        default=None,
        metadata={"help": "What stands in the place of a weight left out: zero (the paper's) or pretrained."},
    )
    reference_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before fine-tuning, for --reference pretrained."}
    )
    mask_seed: int = field(default=0, metadata={"help": "Seed of the scores drawn at the start."})

    def config(self) -> MaskConfig:
        """The mask's configuration, checked: the preset's settings, and over them those that were given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        preset, seed = given.pop("preset", "paper"), given.pop("mask_seed")
        config = MaskConfig.preset(preset, task_type="CAUSAL_LM", seed=seed, **given)
        if config.selection == "threshold" and "density" in given:
            raise MaskftError(
                f"`density` = {self.density} has no effect under selection='threshold', where the share kept is free; "
                "leave it out, or set --selection topk."
            )
        return config


@dataclass
class GuardArguments:
    """Whether a mask without a gain is kept."""

    require_gain: bool = field(
        default=False,
        metadata={
            "help": "Judge the mask by paired tests on validation rows that chose nothing: half of them, which then do "
            "not; for maskft crossfit all. Without a gain write no adapter and end with status 3."
        },
    )
