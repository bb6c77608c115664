"""The two stages: `run_sft` fine-tunes every weight, `run_train` learns a mask over the result."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.read import load_scores
from maskft.data.model_files import load_model
from maskft.data.preview import show_rows
from maskft.data.rows import answered, count_and_hash, tokenise_rows
from maskft.errors import MaskftError, NoGainError
from maskft.scoring.verdict import GainVerdict, judge_gain, split_guard_rows
from maskft.storage.files import atomic_folder, disk_errors, require_free_space
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.engines import require_same_engine, require_whole_checkpoints
from maskft.training.prepare import check_model, check_output, load_splits, load_tokeniser
from maskft.training.ranks import on_first_rank, require_equal_ranks
from maskft.training.report import begin_report, comparison, write_reports, write_result
from maskft.training.resume import RunNotes, deciding, remove_run
from maskft.training.task_eval import load_eval_tasks, watch_tasks
from maskft.training.trainer import MaskTrainer, build_trainer, mask_group
from maskft.tuner import MaskConfig
from maskft.tuner.zero import loading_whole

logger = logging.getLogger(__name__)

# What a checkpoint holds for a trained value: itself and Adam's two moments, in float32.
_CHECKPOINT_BYTES = 12


def run_sft(
    data: DataArguments, settings: TrainingSettings, *, splits: tuple[Dataset, Dataset] | None = None
) -> dict[str, Any]:
    """Stage one: fine-tune all weights, keep the best checkpoint on validation, save it to `settings.output_dir`.

    Args:
        splits: training and validation rows. Default: those that `data` names.

    Returns:
        The run's report, as in `report.json`.

    Raises:
        MaskftError: bad settings or data, a loss that is no number, or a disk that refuses.
    """
    for name in ("low_memory", "temperature_scaling"):
        if getattr(settings, name):
            raise MaskftError(f"`{name}` is for learning masks (maskft train); leave it out of maskft sft.")
    return _run(data, settings, None, splits=splits)


def run_train(
    data: DataArguments,
    settings: TrainingSettings,
    mask: MaskConfig,
    *,
    require_gain: bool = False,
    splits: tuple[Dataset, Dataset] | None = None,
    scores_from: Path | None = None,
) -> dict[str, Any]:
    """Stage two: learn a mask over a fine-tuned model, keep the best on validation, save the adapter.

    The validation loss is that of the hard mask, as it will be used.

    Args:
        require_gain: judge the mask on half of the validation rows, as :mod:`maskft.scoring.verdict` does, and write
            the reports alone where it shows no gain.
        splits: training and validation rows. Default: those that `data` names.
        scores_from: a training checkpoint, whose scores this run begins with.

    Returns:
        The run's report, as in `report.json`.

    Raises:
        NoGainError: `require_gain`, and the mask shows no gain.
        MaskftError: bad settings or data, a loss that is no number, or a disk that refuses.
    """
    return _run(data, settings, mask, require_gain=require_gain, splits=splits, scores_from=scores_from)


def _run(
    data: DataArguments,
    settings: TrainingSettings,
    mask: MaskConfig | None,
    *,
    require_gain: bool = False,
    splits: tuple[Dataset, Dataset] | None = None,
    scores_from: Path | None = None,
) -> dict[str, Any]:
    """Check what was given, read the rows, compare the processes; load, train, judge, save."""
    name, output_dir = str(data.model_name_or_path), Path(str(settings.output_dir))
    checkpoint = None if data.dry_run else check_output(data, settings, mask)
    num_trained = check_model(name, mask, temperature_scaling=settings.temperature_scaling)

    tokenise, found, is_stage = load_tokeniser(name, settings), None, splits is not None
    if splits is None:
        splits, found = load_splits(data, settings, tokenise, require_gain=require_gain)
    train_rows, validation_rows = (answered(tokenise_rows(rows, tokenise)) for rows in splits)
    if data.dry_run:
        return show_rows({"train": train_rows, "validation": validation_rows}, tokenise.tokenizer)
    guard_rows = None
    if require_gain:
        validation_rows, guard_rows = split_guard_rows(validation_rows, settings.seed)

    command = "sft" if mask is None else "train"
    rows = {"train": train_rows, "validation": validation_rows}
    report = begin_report(command, name, _resolved(data, settings, mask), rows, found)
    notes = RunNotes(checkpoint, _facts(report, settings) | {"require_gain": require_gain})
    require_equal_ranks(report["settings"] | notes.facts | {"checkpoint": str(checkpoint)} | report["versions"])
    notes.require_same()

    tokenizer = tokenise.tokenizer
    eval_tasks = load_eval_tasks(settings, tokenizer)
    num_bytes = num_trained * _CHECKPOINT_BYTES * (1 + (settings.save_total_limit or 2))
    require_free_space(output_dir, num_bytes, "the run's checkpoints")

    model = _load(data, settings, mask, scores_from)
    notes.facts |= _masked_weights(model)
    with disk_errors(f"begin the run in {output_dir}"):
        trainer = build_trainer(model, tokenizer, train_rows, validation_rows, settings)
    watch_tasks(trainer, tokenizer, eval_tasks, settings)

    _train(trainer, notes, checkpoint)
    report |= _ended(trainer, notes)
    if guard_rows is not None:
        _require_gain(trainer, guard_rows, output_dir, report)
    _save(trainer, tokenizer, output_dir, report)
    # A run that was given its rows is a stage of another command, which may remove what it wrote.
    if not is_stage and trainer.is_world_process_zero():
        logger.info("Wrote %s (the %s, report.html, report.json).", output_dir, "adapter" if mask else "model")
    return report


def _resolved(data: DataArguments, settings: TrainingSettings, mask: MaskConfig | None) -> dict[str, Any]:
    """All settings but secrets and those that are None."""
    resolved = vars(data) | settings.to_dict() | ({"mask": mask.to_dict()} if mask else {})
    return {key: value for key, value in resolved.items() if value is not None and not key.endswith("_token")}


def _facts(report: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """What decides a run's result, as far as it is known before the model is loaded."""
    hashes = {f"hash of the {name} rows": of["sha256"] for name, of in report["data"].items()}
    # Other ones of the same rows are those of another tokenizer or chat template, or of one that writes the date.
    hashes |= {f"hash of the tokens of the {name} rows": of["sha256_tokens"] for name, of in report["data"].items()}
    return deciding(report["settings"], settings.world_size) | hashes


def _load(
    data: DataArguments, settings: TrainingSettings, mask: MaskConfig | None, scores_from: Path | None
) -> PreTrainedModel:
    with loading_whole():
        model = load_model(str(data.model_name_or_path), data.dtype, settings.model_init_kwargs)
        if mask is not None:
            model = get_peft_model(model, mask)
        if scores_from is not None:
            load_scores(model, scores_from)
    return model


def _masked_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Hashes of the weights under a mask, the same on all processes: shards of others train to a mask of none of them.

    Raises:
        MaskftError: the processes have loaded different ones.
    """
    group = mask_group(model)
    if group is None:
        return {}
    weights: dict[str, Any] = {"hash of the masked weights": group.base_fingerprint()}
    weights |= {"hash of the reference's weights": group.reference_fingerprint()}
    require_equal_ranks(weights)
    return weights


def _train(trainer: MaskTrainer, notes: RunNotes, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or from the start where there is none."""
    require_whole_checkpoints(trainer)
    notes.require_same()
    trainer.note(notes)
    output_dir = Path(str(trainer.args.output_dir))
    if checkpoint is not None:
        require_same_engine(trainer, checkpoint)
    with disk_errors(f"finish the run in {output_dir}"):
        if checkpoint is None:
            # Only now, when nothing the user gave is left to be refused.
            on_first_rank(lambda: remove_run(output_dir))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _ended(trainer: MaskTrainer, notes: RunNotes) -> dict[str, Any]:
    """What a report says of a run once it has ended."""
    report: dict[str, Any] = {
        "seconds": notes.seconds(),
        "best": _best(trainer),
        "log_history": list(trainer.state.log_history),
    }
    if trainer.mask_callback is not None:
        group = trainer.mask_callback.group
        report["mask"] = {
            "kept_share": group.kept_share(),
            "num_weights": group.num_weights(),
            "reachable_share": trainer.mask_callback.reachable_share,
            "temperature": trainer.mask_callback.temperature,
        }
    if notes.without_mask:
        report["without_mask"] = notes.without_mask
    return report


def _best(trainer: MaskTrainer) -> dict[str, Any]:
    """The checkpoint that validation chose, and None where it chose none and the last weights were saved."""
    state = trainer.state
    is_chosen = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return {
        "metric": trainer.args.metric_for_best_model,
        "value": state.best_metric if is_chosen else None,
        "step": state.best_global_step if is_chosen else None,
    }


def _require_gain(trainer: MaskTrainer, guard_rows: Dataset, output_dir: Path, report: dict[str, Any]) -> None:
    """Put the verdict into the report; without a gain write the reports and no adapter."""
    verdict = judge(trainer.model, guard_rows, trainer.args)
    report["data"]["guard"] = count_and_hash(guard_rows)
    report["verdict"] = verdict.to_dict()
    if verdict.has_gain:
        logger.info("%s", verdict.sentence)
        return
    if trainer.is_world_process_zero():
        with disk_errors(f"write the reports in {output_dir}"), atomic_folder(output_dir) as folder:
            write_reports(folder, report, is_written=False)
    raise NoGainError(f"{verdict.sentence} No adapter was written; {output_dir / 'report.html'} has the numbers.")


def judge(model: PeftModel, rows: Dataset, settings: TrainingSettings) -> GainVerdict:
    """The verdict on a mask by token rows that chose none of its scores, computed as a run of these settings does."""
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        return judge_gain(model, rows, batch_size=settings.per_device_eval_batch_size)


def _save(trainer: MaskTrainer, tokenizer: PreTrainedTokenizerBase, output_dir: Path, report: dict[str, Any]) -> None:
    """The first of several processes writes; all of them call it."""
    # Weights that are split over processes are gathered by all of them.
    weights = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        masks = None if trainer.mask_callback is None else trainer.mask_callback.group.masks()
        write_result(output_dir, report, trainer.model, tokenizer, masks=masks, weights=weights)
        if compared := comparison(report):
            logger.info("%s", compared)
    trainer.accelerator.wait_for_everyone()


transformers.logging.set_verbosity_warning()
