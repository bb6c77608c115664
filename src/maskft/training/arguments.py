"""What `maskft sft` and `maskft train` can be told; names as in Transformers, TRL and PEFT."""

import os
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import torch
from pydantic import Field
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from maskft.errors import MaskftError, first_line, nearest, require_flags
from maskft.storage.json_text import parse_json, plain
from maskft.training.engines import check_deepspeed, require_deepspeed
from maskft.tuner.config import MaskConfig
from maskft.values import check_value

NLL_PREFIX = "nll:"
# What the trainer's evaluation gives beside the tasks; an auxiliary loss for mixtures of experts alone.
RESTORED = "eval_restored"  # of maskft restore
_METRICS = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_aux_loss", RESTORED)
_HAS_GPU = torch.cuda.is_available()


def flag(default: Any, help: str) -> Any:
    """A field of a dataclass that is a flag of a command, with what its help says."""
    return field(default=default, metadata={"help": help})


def metric_name(task: str) -> str:
    """The name of a task among the trainer's metrics: `eval_` and the task's name in word characters.

    A YAML file's task has the name that its line `task:` gives; the file is not parsed, for lm-eval's tags are its own.
    """
    path = Path(task)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        named = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        task = named[1] if named else task
    return "eval_" + re.sub(r"\W+", "_", task).strip("_")


def split_tasks(names: str | None) -> list[str]:
    """The tasks that `--eval_tasks` names, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(","))) if names else []


@dataclass
class DataArguments:
    """Where model and data come from."""

    _argument_group_name = "Model and data"

    model_name_or_path: str | None = flag(None, "Folder or hub name of the model to start from.")
    dataset_name: str | None = flag(
        None,
        "A file (.jsonl, .json, .csv, .parquet, .arrow; plain, .gz or .zst), a folder of such files, a folder that "
        "datasets saved, or a hub name.",
    )
    dataset_mixer: dict[str, Any] | str | None = flag(  # noqa: RUF009
        None,
        'Several data sets in place of one, and the share of each that is drawn: {"a.jsonl": 1.0, "b.jsonl": 0.2}.',
    )
    dataset_config: str | None = flag(None, "Configuration of a hub dataset.")
    dataset_train_split: str = flag("train", "Split to train on.")
    dataset_prompt_field: str | None = flag(None, "Column of the prompts, where it is not called prompt.")
    dataset_completion_field: str | None = flag(None, "Column of the answers, where it is not called completion.")
    on_bad_row: str = flag("refuse", "What to do about a row that cannot be used: refuse the run, or skip it and tell.")
    dry_run: bool = flag(False, "Show what would be trained, of which rows and tokens, load no weights, write nothing.")
    eval_dataset_name: str | None = flag(None, "Validation data. Default: a part of the training data is held out.")
    validation_split_percentage: int = flag(5, "Share of the training data held out for validation, in percent.")
    dtype: str = flag("float32", "Dtype the weights are loaded in: float32, bfloat16, float16 or auto.")
    overwrite_output_dir: bool = flag(False, "Write into an output folder that already holds a run.")

    def __post_init__(self) -> None:
        require_flags(self, "model_name_or_path", "dataset_mixer" if self.dataset_mixer else "dataset_name")
        if isinstance(self.dataset_mixer, str):
            self.dataset_mixer = parse_json(self.dataset_mixer.encode(), "--dataset_mixer")
        share = Annotated[float, Field(gt=0, le=1)]
        check_value("dataset_mixer", self.dataset_mixer, Annotated[dict[str, share], Field(min_length=1)] | None)
        if self.dataset_mixer and self.dataset_name:
            raise MaskftError("`dataset_mixer` names the data sets, and --dataset_name one more; give one of the two.")
        if (self.dataset_prompt_field is None) != (self.dataset_completion_field is None):
            raise MaskftError("`dataset_prompt_field` and `dataset_completion_field` go together; give both or none.")
        check_value("on_bad_row", self.on_bad_row, Literal["refuse", "skip"])
        check_value("validation_split_percentage", self.validation_split_percentage, Annotated[int, Field(ge=1, le=90)])
        check_value("dtype", self.dtype, Literal["auto", "float32", "bfloat16", "float16"])


@dataclass
class TrainingSettings(SFTConfig):
    """TRL's `SFTConfig`, with the published recipe's schedule, and validation that keeps the best checkpoint."""

    _argument_group_name = "Training"

    output_dir: str = flag("output", "Folder to write: the result, its report, and checkpoint-STEP folders.")
    resume_from_checkpoint: str | None = flag(
        None,
        "auto: the newest complete checkpoint in --output_dir, from the start where there is none; or the folder of "
        "one. Default: a new run.",
    )
    learning_rate: float = flag(2e-5, "Highest learning rate of the schedule.")
    warmup_steps: float = flag(0.03, "Steps of the warm-up from 0; a value below 1 is a share of all steps.")
    eval_strategy: str = flag("epoch", "When validation is scored: epoch, steps (each --eval_steps) or no.")
    save_strategy: str = flag(
        "epoch",
        "When checkpoints are saved: epoch, steps (each --save_steps), best or no; as --eval_strategy for the best.",
    )
    save_total_limit: int | None = flag(2, "Checkpoints kept, of which the best is one; 0 keeps all.")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint, not the last.")
    metric_for_best_model: str | None = flag(
        "eval_loss",
        "What the best is chosen by: eval_loss, eval_mean_token_accuracy, eval_entropy, or eval_TASK of --eval_tasks; "
        "eval_ may be left out.",
    )
    greater_is_better: bool | None = flag(None, "Whether higher is better. Default: not for losses and nll: tasks.")
    ddp_backend: str | None = flag(None, "Backend of several processes. Default: gloo on CPUs, nccl on GPUs.")
    # Without a GPU, TRL's defaults (bf16, pinned memory) are refused or warn; that of checkpointing warns anywhere.
    # Plain values, for the parser of flags takes no factory's.
    use_cpu: bool = flag(not _HAS_GPU, "Train on the CPU. The default is True where there is no GPU.")
    bf16: bool = flag(_HAS_GPU, "Compute in bfloat16, with weights in --dtype. The default is True on a GPU.")
    dataloader_pin_memory: bool = flag(_HAS_GPU, "Load batches into pinned memory. The default is True on a GPU.")
    activation_checkpointing: bool | None = flag(False, "Compute activations again in the backward, to save memory.")
    eval_tasks: str | None = flag(
        None, "Tasks of maskft eval, comma-separated, to score at each evaluation as eval_TASK."
    )
    eval_tasks_limit: int = flag(32, "Items of each task of --eval_tasks.")
    eval_data_dir: str | None = flag(None, "Local task data, as --data_dir of maskft eval.")
    early_stopping_patience: int | None = flag(
        None, "Evaluations without a better one after which a run ends. Default: it runs on."
    )
    push_to_hub: bool = flag(
        False,
        "Push the result with its card, and no checkpoints, to the repository --hub_model_id of the hub (HF_ENDPOINT).",
    )
    hub_strategy: str = flag("end", "Only end: the result is pushed, and no checkpoint.")
    low_memory: bool = flag(
        False,
        "Step each score in the backward, and keep neither gradients nor masked weights: 4.1 bytes a masked weight "
        "instead of 18. One backward makes a step, and gradients are not clipped.",
    )
    temperature_scaling: bool = flag(
        False,
        "Divide the logits, while scores learn, by the temperature that suits the training rows best at the start. "
        "Lower confidence then gains a mask nothing.",
    )
    optim: str | None = flag(None, "Optimizer of Transformers. Default: adamw_torch_fused; adafactor for --low_memory.")
    max_grad_norm: float | None = flag(
        None, "Norm that gradients are clipped to; 0 is no clipping. Default: 1.0; 0 for --low_memory."
    )

    def __post_init__(self) -> None:
        """Fill in what follows from other settings; MaskftError for a value that no run, or not this one, can use."""
        if self.optim is None:
            self.optim = "adafactor" if self.low_memory else "adamw_torch_fused"
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if self.low_memory else 1.0
        for name, hint in _HINTS.items():
            setattr(self, name, check_value(name, getattr(self, name), hint))
        if conflict := _conflict(self):
            raise MaskftError(conflict)
        self._resolve_metric()
        with_deepspeed = _has_deepspeed(self)
        if with_deepspeed:
            require_deepspeed(self.deepspeed, has_gpu=_HAS_GPU)
        if self.use_cpu and self.ddp_backend is None and _num_processes() > 1:
            # Without one, processes that torchrun starts on a CPU would each train alone.
            self.ddp_backend = "gloo"
        if with_deepspeed:
            self.use_cpu = False  # which would mean without DeepSpeed; it finds out by itself
        super().__post_init__()
        if with_deepspeed:
            check_deepspeed(self.deepspeed_plugin.hf_ds_config.config, self.bf16 or self.fp16)
        self._check_mappings()

    def _check_mappings(self) -> None:
        """What a model, an optimizer and a schedule are given: read once super() has made mappings of them."""
        loading, schedule = self.model_init_kwargs, SchedulerType(self.lr_scheduler_type)
        if not isinstance(loading, dict | None):
            raise MaskftError(f"`model_init_kwargs` must be a mapping, got {loading!r}; correct it, or leave it out.")
        for name, instead in _NOT_AT_LOADING.items():
            if name in (loading or {}):
                raise MaskftError(f"`model_init_kwargs` may not hold {name!r}; {instead}.")
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except ImportError as error:
            what = f"`optim` {OptimizerNames(self.optim).value} needs a package that is not installed"
            raise MaskftError(f"{what} ({first_line(error)}); install it, or set another one.") from error
        except ValueError:
            pass  # some ask for the model, which is not loaded yet
        given = self.lr_scheduler_kwargs or {}
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        try:
            get_scheduler(schedule, optimizer, 0, 1, scheduler_specific_kwargs=given)
        except (TypeError, ValueError) as error:
            what = f"`lr_scheduler_kwargs` {given!r} does not go with `lr_scheduler_type` {schedule.value}"
            raise MaskftError(f"{what} ({first_line(error)}); correct one of them.") from error

    def _resolve_metric(self) -> None:
        """Give the metric its full name, and say which way it is better where that is left open."""
        given = self.metric_for_best_model or "eval_loss"
        metric = metric_name(given.removeprefix("eval_"))
        tasks = {metric_name(task): task for task in split_tasks(self.eval_tasks)}
        known = [*_METRICS, *tasks]
        if metric not in known and self.eval_strategy != "no":
            what = f"`metric_for_best_model` is {given!r}, which no evaluation gives{nearest(metric, known)}"
            raise MaskftError(f"{what}; correct it, or name its task in --eval_tasks.")
        self.metric_for_best_model = metric
        if self.greater_is_better is None:
            self.greater_is_better = not (metric.endswith("loss") or tasks.get(metric, "").startswith(NLL_PREFIX))


_NOT_AT_LOADING = {
    "dtype": "set --dtype",
    "torch_dtype": "set --dtype",
    "revision": "download that revision (hf download REPO --revision R), and give its folder as the model",
    "trust_remote_code": "maskft runs no code that comes with a model",
    "quantization_config": "scores need the gradient of weights that are not quantized",
}
_FromOne = Annotated[int, Field(ge=1)]
_FromZero = Annotated[int, Field(ge=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_HINTS: dict[str, Any] = {
    **dict.fromkeys(("low_memory", "temperature_scaling"), bool),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _FromOne),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_tasks_limit"), _FromOne),
    **dict.fromkeys(("early_stopping_patience", "max_length"), _FromOne | None),
    **{"max_steps": Literal[-1] | _FromOne, "save_total_limit": _FromZero | None, "dataloader_num_workers": _FromZero},
    **{"seed": _Seed, "data_seed": _Seed | None},
    **dict.fromkeys(("num_train_epochs", "save_steps", "learning_rate"), _Positive),
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"), _Number),
    **{"logging_steps": _Number, "eval_steps": _Number | None, "eval_delay": _Number},
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Field(ge=0, lt=1)]),
    "label_smoothing_factor": Annotated[float, Field(ge=0, le=1)],
}


def _has_deepspeed(settings: Any) -> bool:
    return bool(settings.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _conflict(s: Any) -> str | None:
    """The sentence on the first setting that no run, or not this one, can keep."""
    for name in ("load_best_model_at_end", "early_stopping_patience", "eval_tasks"):
        if s.eval_strategy == "no" and (given := getattr(s, name)):
            return f"`{name}` is {given!r}, but nothing is evaluated; set --eval_strategy to epoch, or switch it off."
    if s.padding_free and not s.packing and s.max_length is not None:
        return f"`padding_free` does not cut rows to `max_length`, which is {s.max_length}; set it to none, or packing."
    if s.activation_offloading and s.use_cpu:
        return "`activation_offloading` moves what a GPU keeps to the CPU, and this run has no GPU; leave it out."
    if s.use_liger_kernel and not is_liger_kernel_available():
        return "`use_liger_kernel` needs a package that is not installed; pip install liger-kernel, or leave it out."
    if missing := _missing_logger(s.report_to):
        return missing
    if s.optim_args and not all("=" in pair for pair in s.optim_args.split(",")):
        return f"`optim_args` must be pairs, as NAME=VALUE,NAME=VALUE, got {s.optim_args!r}; correct them."
    if s.hub_always_push or s.hub_strategy != "end":
        return (
            "`hub_strategy` and `hub_always_push` push checkpoints, and maskft pushes the result alone; leave them out."
        )
    if s.hub_model_id and not s.push_to_hub:
        return f"`hub_model_id` is {s.hub_model_id!r}, and nothing is pushed; set --push_to_hub True, or leave it out."
    if s.trust_remote_code:
        return "`trust_remote_code` is for code that comes with a model, which maskft does not run; leave it out."
    if s.enable_jit_checkpoint:
        return "`enable_jit_checkpoint` does nothing here: a run saves after its step on SIGTERM anyway; leave it out."
    return _low_memory_conflict(s) if s.low_memory else None


def _missing_logger(report_to: Any) -> str | None:
    """The sentence on the first name of `report_to` that this machine cannot report to."""
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all", *get_available_reporting_integrations()):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            hint = nearest(name, INTEGRATION_TO_CALLBACK)
            return f"`report_to` names {name!r}, which Transformers does not know{hint}; correct it, or leave it out."
        how = "run `pip install 'maskft[log]'`" if name == "tensorboard" else "install it"
        return f"`report_to` names {name}, which is not installed; {how}, or leave it out."
    return None


def _low_memory_conflict(s: Any) -> str | None:
    """The same of `low_memory`, which steps each score as soon as its gradient is there."""
    if s.gradient_accumulation_steps > 1:
        num = s.gradient_accumulation_steps
        return f"`low_memory` keeps no gradients to sum over {num} backwards; raise --per_device_train_batch_size."
    if s.max_grad_norm:
        return f"`low_memory` keeps no gradients to clip by norm (--max_grad_norm {s.max_grad_norm}); set it to 0."
    if _has_deepspeed(s):
        return "`low_memory` steps the scores themselves, and DeepSpeed copies of them; leave it out."
    if s.fp16:
        return "`low_memory` steps at once, and --fp16 leaves a step out where any gradient overflows; use --bf16."
    if s.fsdp or _num_processes() > 1:
        return "`low_memory` steps before several processes sum their gradients; train in one process."
    if torch.cuda.device_count() > 1 and not s.use_cpu and "WORLD_SIZE" not in os.environ:
        return "`low_memory` works on one GPU, and Transformers would use all; set CUDA_VISIBLE_DEVICES to one of them."
    return None


_Kind = TypeVar("_Kind", bound=type)


def _with_mask_flags(kind: _Kind) -> _Kind:
    """Give a class the fields of `MaskConfig` that are flags, each None where it is not given, and a list of values."""
    hints = get_type_hints(MaskConfig)
    for name in (
        *("target_modules", "exclude_modules", "layers_to_transform", "density", "selection", "threshold"),
        *("init_scores", "init_std", "score_transform", "reference", "reference_model_name_or_path"),
    ):
        allowed = [hint for hint in get_args(hints[name]) or [hints[name]] if hint is not type(None)]
        kind.__annotations__[name] = allowed[0] | None
        setattr(kind, name, field(default=None, metadata=MaskConfig.__dataclass_fields__[name].metadata))
    return kind


@dataclass
@_with_mask_flags
class MaskArguments:
    """The mask's settings as flags; see :class:`maskft.MaskConfig`."""

    _argument_group_name = "Mask"

    preset: str | None = flag(None, "Where the settings start: paper, recommended, preferences or bmt. Default: paper.")
    mask_seed: int = field(default=0, metadata=MaskConfig.__dataclass_fields__["seed"].metadata)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def config(self) -> MaskConfig:
        """The mask's configuration, checked: the preset's settings, and over them those that were given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        preset, seed = given.pop("preset", "paper"), given.pop("mask_seed")
        config = MaskConfig.preset(preset, task_type="CAUSAL_LM", seed=seed, **given)
        is_free = config.selection == "threshold"  # the share kept
        unused, instead = ("density", "topk") if is_free else ("threshold", "threshold")
        if unused in given:
            what = f"`{unused}` = {given[unused]} has no effect under selection={config.selection!r}"
            raise MaskftError(f"{what}; leave it out, or set --selection {instead}.")
        return config


@dataclass
class GuardArguments:
    """Whether a mask without a gain is kept."""

    _argument_group_name = "Verdict"

    require_gain: bool = flag(
        False,
        "Judge the mask by paired tests on validation rows that chose nothing: half of them; for maskft crossfit all. "
        "Without a gain write no adapter, and end with status 3.",
    )


def training_flags(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that differ from their defaults, by their flags; not where to write, to push or to go on from."""
    defaults = TrainingSettings(output_dir=str(settings.output_dir)).to_dict()
    if settings.metric_for_best_model != defaults["metric_for_best_model"]:
        del defaults["greater_is_better"]  # its default follows from the metric
    free = ("resume_from_checkpoint", "push_to_hub", "hub_")
    flags = {f.name for f in fields(TrainingSettings) if f.init and not f.name.startswith(free)}
    given = settings.to_dict()
    return plain({key: given[key] for key in given if key in flags and given[key] != defaults.get(key, MISSING)})


def other_flags(*arguments: Any) -> dict[str, Any]:
    """The fields of dataclasses that differ from their defaults; not whether to write over a folder."""
    given = {f.name: (getattr(each, f.name), f.default) for each in arguments for f in fields(each)}
    return plain({n: v for n, (v, default) in given.items() if v != default and n != "overwrite_output_dir"})
