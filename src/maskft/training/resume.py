"""Which checkpoint a run goes on from, and whether it can go on from there to the result it would have had."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from maskft.adapters.read import WEIGHTS_FILE
from maskft.errors import MaskftError
from maskft.storage.files import LOCK
from maskft.storage.json_text import read_object

AUTO = "auto"
ANSWERS = "general.jsonl"
_UNFINISHED = ".*.partial"  # what a kill leaves of a result that was being written

# Settings that may be others where a run goes on, by how their names begin: where its rows and models lie and how rows
# are read (tokens and weights are compared instead), what it writes, and how the same steps are computed.
_FREE = (
    *("model_name_or_path", "reference_model_name_or_path", "base_model_name_or_path", "dataset_", "eval_dataset_name"),
    *("retain_dataset_name", "eval_data_dir", "validation_split_percentage", "on_bad_row", "dry_run"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "log", "report_to", "run_name", "project"),
    *("trackio_", "hub_", "push_to_hub", "disable_tqdm", "debug", "skip_memory_metrics", "include_", "do_"),
    *("save_total_limit", "save_only_model", "save_on_each_node", "save_scores", "enable_jit_checkpoint"),
    *("use_cpu", "local_rank", "ddp_", "fsdp", "deepspeed", "parallelism_config", "accelerator_config"),
    *("dataloader_num", "dataloader_p", "dataloader_multi", "prediction_loss_only"),
    *("eval_accumulation_steps", "eval_do_", "eval_use_", "gradient_checkpointing", "activation_", "torch_", "tf32"),
    *("use_cache", "use_liger_kernel", "liger_", "full_determinism", "restore_callback_states"),
    *("peft_", "auto_mapping", "revision", "inference_mode", "base_fingerprint", "reference_fingerprint"),
    "mask_digest",
    # Of which the rows of a step are compared.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),
)
_STATE, _NO_STATE = "trainer_state.json", "remove that checkpoint, and go on from the one before"
# Those that choose a checkpoint, where one is chosen.
_CHOOSING = ("eval_", "save_", "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size")


def remove_run(output_dir: Path) -> None:
    """Remove what an earlier run left that could be taken for a later one's: checkpoints, weights, reports."""
    configs, reports = ("config.json", "generation_config.json"), ("report.*", "README.md")
    for pattern in (_UNFINISHED, "checkpoint-*", "adapter_*", "model*.safetensors", "*.index.json", *configs, *reports):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_complete(checkpoint: Path) -> bool:
    """Whether a `checkpoint-N` folder was written to its end."""
    try:
        # Transformers writes it after everything else. The header of weights tells a file that was cut.
        read_object(checkpoint / _STATE, _NO_STATE)
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights)


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The last complete `checkpoint-N` in a run's folder, by N, or None."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    complete = {int(step): path for path, step in steps.items() if step.isdigit() and is_complete(path)}
    return complete[max(complete)] if complete else None


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the newest complete one for auto.

    With auto, so that a launcher can repeat one command, it is None where the folder is absent or holds only what a
    killed run leaves before its first checkpoint is complete. MaskftError where there is no complete checkpoint.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != AUTO:
        if not is_complete(Path(resume_from_checkpoint)):
            raise MaskftError(f"{resume_from_checkpoint} is no complete checkpoint; give a checkpoint-N, or auto.")
        return Path(resume_from_checkpoint)
    folder = Path(output_dir)
    if folder.is_file():
        raise MaskftError(f"The output folder {folder} is a file; give another --output_dir.")
    newest = newest_complete_checkpoint(folder)
    # TRL's trainer writes a model card before its checkpoints, and maskft restore asks the model before fine-tuning.
    begun = ("checkpoint-*", "README.md", ANSWERS, LOCK, _UNFINISHED)
    if newest is None and not all(any(map(path.match, begun)) for path in folder.glob("*")):
        raise MaskftError(f"{folder} holds no complete checkpoint to resume from; start without resuming.")
    return newest


def require_resumable(checkpoint: Path, *, is_mask: bool) -> None:
    """Refuse a complete checkpoint that is of the other kind of run, or holds no state of the optimizer."""
    holds_mask = (checkpoint / WEIGHTS_FILE).exists()
    if holds_mask != is_mask:
        held, other = ("a mask", "sft") if holds_mask else ("a whole model", "train")
        raise MaskftError(f"{checkpoint} holds {held}, from which maskft {other} cannot go on; give another folder.")
    state = read_object(checkpoint / _STATE, _NO_STATE)
    is_done = state.get("global_step", 0) >= state.get("max_steps", 0)
    if not is_done and not any(any(checkpoint.glob(pattern)) for pattern in ("optimizer*", "global_step*")):
        raise MaskftError(
            f"{checkpoint} holds no state of the optimizer, without which no run goes on exactly; start anew in "
            "another --output_dir, without --save_only_model."
        )


def deciding(resolved: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Those of a run's settings, with the mask's under `mask`, that decide its result, by the names of their flags."""
    mask = {"mask_seed" if name == "seed" else name: value for name, value in resolved.get("mask", {}).items()}
    free = _FREE if resolved["load_best_model_at_end"] else (*_FREE, *_CHOOSING)
    named = {
        name: value for name, value in {**resolved, **mask}.items() if name != "mask" and not name.startswith(free)
    }
    rows = resolved["per_device_train_batch_size"] * resolved["gradient_accumulation_steps"] * world_size
    return named | {"rows of a step": rows}


class RunNotes(TrainerCallback, ExportableState):
    """What each checkpoint keeps of a run for the one that goes on from it.

    Attributes:
        facts: what decides the run's result, values that JSON can hold by name, for :meth:`require_same`.
        without_mask: metrics of the validation rows without the mask; empty until they are known.
    """

    def __init__(self, checkpoint: Path | None, facts: dict[str, Any]) -> None:
        state = read_object(checkpoint / _STATE, _NO_STATE) if checkpoint else {}
        kept = state.get("stateful_callbacks", {}).get(type(self).__name__, {}).get("attributes", {})
        self.facts = facts
        self.without_mask: dict[str, float] = kept.get("without_mask", {})
        self._checkpoint, self._facts_before = checkpoint, kept.get("facts", {})
        self._seconds_before, self._started = kept.get("seconds", 0.0), time.perf_counter()

    def seconds(self) -> float:
        """Those of a run over all its starts; what was lost after the last checkpoint is not among them."""
        return round(float(self._seconds_before) + time.perf_counter() - self._started, 1)

    def state(self) -> dict[str, Any]:
        notes = {"facts": self.facts, "seconds": self.seconds(), "without_mask": self.without_mask}
        return {"args": {}, "attributes": notes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Transformers cannot save the state of a callback that the checkpoint it goes on from does not know.
        state.stateful_callbacks[type(self).__name__] = self.state()

    def require_same(self) -> None:
        """Refuse a checkpoint whose run was to have another result; an earlier maskft's may not know every fact."""
        for name, value in self.facts.items():
            before = self._facts_before.get(name, value)
            if before != value:
                raise MaskftError(
                    f"{self._checkpoint} was written with `{name}` = {before!r} and the run would go on with "
                    f"{value!r}, which gives another result; set it as it was, or give another --output_dir."
                )
