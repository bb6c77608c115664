"""The two stages: `run_sft` fine-tunes every weight, `run_train` learns a mask over the result."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.model_files import load_model
from maskft.adapters.read import load_scores
from maskft.data.rows import answered, tokenise_rows
from maskft.scoring.verdict import GainVerdict, judge_gain, split_guard_rows
from maskft.storage.files import disk_errors, require_free_space
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.engines import require_same_engine, require_whole_checkpoints
from maskft.training.hub import open_repository, push_result
from maskft.training.prepare import check_model, check_output, load_splits, load_tokeniser
from maskft.training.preview import show_rows
from maskft.training.ranks import on_first_rank, require_equal_ranks
from maskft.training.report import begin_report, comparison, require_shown_gain, write_result
from maskft.training.resume import RunNotes, deciding, remove_run
from maskft.training.retain import Retaining
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
    """Stage one: fine-tune all weights; as :func:`run_train`, which then writes a model."""
    return run_train(data, settings, None, splits=splits)


def run_train(
    data: DataArguments,
    settings: TrainingSettings,
    mask: MaskConfig | None,
    *,
    require_gain: bool = False,
    splits: tuple[Dataset, Dataset] | None = None,
    scores_from: Path | None = None,
    restoring: Retaining | None = None,
) -> dict[str, Any]:
    """Stage two: learn a mask over a fine-tuned model, keep the best on validation, save it to `settings.output_dir`.

    The validation loss is that of the hard mask, as it will be used. All that was given is checked before a weight is
    loaded: NoGainError where `require_gain` and the mask shows no gain, any other MaskftError for bad settings or data,
    a loss that is no number, or a disk that refuses. Returns the run's report, as in `report.json`.

    Args:
        mask: None trains all weights.
        require_gain: judge the mask on half of the validation rows, see :mod:`maskft.scoring.verdict`, and write the
            reports alone where it shows no gain.
        splits: training and validation rows. Default: those that `data` names.
        scores_from: a training checkpoint, whose scores this run begins with.
        restoring: general rows that the mask is to keep or give back (:mod:`maskft.training.retain`).
    """
    name, output_dir = str(data.model_name_or_path), Path(str(settings.output_dir))
    checkpoint = None if data.dry_run else check_output(data, settings, mask)
    num_trained = check_model(name, mask, temperature_scaling=settings.temperature_scaling)
    rows, found, tokenizer = read_rows(data, settings, splits, require_gain=require_gain)
    if require_gain:
        rows["validation"], rows["guard"] = split_guard_rows(rows["validation"], settings.seed)
    general = restoring.read(settings, require_gain=require_gain) if restoring else {}
    if data.dry_run:
        return show_rows(rows, tokenizer, name, settings.max_length)
    rows |= general
    resolved = vars(data) | settings.to_dict() | ({"mask": mask.to_dict()} if mask else {})
    resolved |= vars(restoring.given) if restoring else {}
    command = "restore" if restoring else "train" if mask else "sft"
    report = begin_report(command, name, resolved, rows, found)
    notes = _begin(report, checkpoint, settings.world_size)
    num_bytes = num_trained * _CHECKPOINT_BYTES * (1 + (settings.save_total_limit or 2))
    require_free_space(output_dir, num_bytes, "the run's checkpoints")
    repository = on_first_rank(lambda: open_repository(settings, name))

    trainer = _load(data, settings, mask, tokenizer, rows, scores_from, restoring)
    notes.facts |= _masked_weights(trainer.model)
    _train(trainer, notes, checkpoint)
    report |= _ended(trainer, notes)
    _judge(report, trainer, rows.get("guard"), restoring)
    files = _save(trainer, tokenizer, report)
    if repository is not None:
        on_first_rank(lambda: push_result(settings, repository, output_dir, files))
    # A run that was given its rows is a stage of another command, which may remove what it wrote.
    if splits is None and trainer.is_world_process_zero():
        logger.info("Wrote %s (the %s, report.html, report.json).", output_dir, "adapter" if mask else "model")
    return report


def _judge(report: dict[str, Any], trainer: MaskTrainer, guard: Dataset | None, restoring: Retaining | None) -> None:
    """Report what general rows got back, and the verdict on the rows `guard`, which chose nothing."""
    told = restoring.told(report) if restoring else None
    if told is not None:
        report["restore"] = told
        if told["chosen"] is None:
            report["verdict"] = {"has_gain": False, "sentence": told["sentence"]}
    if guard is not None and "verdict" not in report:
        judging = judge if restoring is None else restoring.judge
        report["verdict"] = judging(trainer.model, guard, trainer.args).to_dict()


def read_rows(
    data: DataArguments, settings: TrainingSettings, splits: tuple[Dataset, Dataset] | None, *, require_gain: bool
) -> tuple[dict[str, Dataset], dict[str, dict[str, int]] | None, PreTrainedTokenizerBase]:
    """Token rows of `splits`, or of those that `data` names; what was found in their data sets; the tokenizer."""
    tokenise, found = load_tokeniser(str(data.model_name_or_path), settings), None
    if splits is None:
        splits, found = load_splits(data, settings, tokenise, require_gain=require_gain)
    train_rows, validation_rows = (answered(tokenise_rows(rows, tokenise)) for rows in splits)
    return {"train": train_rows, "validation": validation_rows}, found, tokenise.tokenizer


def _load(
    data: DataArguments,
    settings: TrainingSettings,
    mask: MaskConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, Dataset],
    scores_from: Path | None,
    restoring: Retaining | None,
) -> MaskTrainer:
    """The trainer, with model and mask loaded."""
    tasks = load_eval_tasks(settings, tokenizer)
    with loading_whole():
        model = load_model(str(data.model_name_or_path), data.dtype, settings.model_init_kwargs)
        if restoring is not None:
            restoring.prepare(model, rows["validation"], tokenizer, settings)
        model = get_peft_model(model, mask) if mask else model
        if scores_from is not None:
            load_scores(model, scores_from)
    with disk_errors(f"begin the run in {settings.output_dir}"):
        kind = MaskTrainer if restoring is None else partial(restoring.trainer, restoring=restoring)
        trainer = build_trainer(model, tokenizer, rows["train"], rows["validation"], settings, kind)
    watch_tasks(trainer, tokenizer, tasks, settings)
    return trainer


def _begin(report: dict[str, Any], checkpoint: Path | None, world_size: int) -> RunNotes:
    """The notes of a run that begins; MaskftError where its processes, or its starts, differ."""
    hashes = {f"hash of the {split} rows": of["sha256"] for split, of in report["data"].items()}
    # Other ones of the same rows are those of another tokenizer or chat template, or of one that writes the date.
    for split, of in report["data"].items():
        if "sha256_tokens" in of:
            hashes[f"hash of the tokens of the {split} rows"] = of["sha256_tokens"]
    facts = deciding(report["settings"], world_size)
    notes = RunNotes(checkpoint, facts | hashes | {"require_gain": "guard" in report["data"]})
    require_equal_ranks(report["settings"] | notes.facts | {"checkpoint": str(checkpoint)} | report["versions"])
    notes.require_same()
    return notes


def _masked_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Hashes of the weights under a mask; MaskftError where processes loaded others, whose shards train no one mask."""
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
    trainer.notes = notes
    trainer.add_callback(notes)
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
    state, callback = trainer.state, trainer.mask_callback
    # None where validation chose no checkpoint and the last weights are saved.
    is_chosen = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    best = {"value": state.best_metric, "step": state.best_global_step} if is_chosen else {"value": None, "step": None}
    report: dict[str, Any] = {
        "seconds": notes.seconds(),
        "best": {"metric": trainer.args.metric_for_best_model} | best,
        "log_history": list(state.log_history),
    }
    if callback is not None:
        report["mask"] = {
            "kept_share": callback.group.kept_share(),
            "num_weights": callback.group.num_weights(),
            "reachable_share": callback.reachable_share,
            "temperature": callback.temperature,
        }
    return report | ({"without_mask": notes.without_mask} if notes.without_mask else {})


def judge(model: PeftModel, rows: Dataset, settings: TrainingSettings) -> GainVerdict:
    """The verdict on a mask by token rows that chose none of its scores, computed as a run of these settings does."""
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        return judge_gain(model, rows, batch_size=settings.per_device_eval_batch_size)


def _save(trainer: MaskTrainer, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]) -> list[str]:
    """The first of several processes writes, and returns the files; all call it, and get NoGainError alike."""
    # Weights that are split over processes are gathered by all of them.
    weights, output_dir = None, Path(str(trainer.args.output_dir))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    verdict, files = report.get("verdict", {"has_gain": True, "sentence": ""}), []
    if trainer.is_world_process_zero():
        masks = None if trainer.mask_callback is None else trainer.mask_callback.group.masks()
        is_kept = verdict["has_gain"]
        files = write_result(
            output_dir, report, trainer.model, tokenizer, masks=masks, weights=weights, is_kept=is_kept
        )
        told = report.get("restore", {}).get("sentence")
        for sentence in filter(None, (verdict["sentence"], told, comparison(report)) if is_kept else ()):
            logger.info("%s", sentence)
    trainer.accelerator.wait_for_everyone()
    require_shown_gain(report, output_dir)
    return files


transformers.logging.set_verbosity_warning()
