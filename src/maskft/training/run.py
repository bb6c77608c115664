"""The two stages: `run_sft` fine-tunes every weight, `run_train` learns a mask over the result."""

import copy
import logging
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config, without_weights
from maskft.adapters.read import check_saved, load_scores
from maskft.data.model_files import check_weights, load_model, read_tokenizer
from maskft.data.rows import count_and_hash, load_held_out, load_rows
from maskft.data.splits import refuse_overlap, split_validation, warn_of_overlap
from maskft.data.tokens import check_end_token_trained, end_token_ids, tokenise_rows
from maskft.errors import MaskftError, NoGainError, first_line
from maskft.scoring.temperature import temperature_text
from maskft.scoring.verdict import judge_gain, split_guard_rows
from maskft.storage.environment import machine, versions
from maskft.storage.files import (
    atomic_folder,
    disk_errors,
    require_empty_output,
    require_free_space,
    require_writable,
)
from maskft.storage.json_text import plain
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.calibration import best_temperature, divide_logits, require_divisible
from maskft.training.callback import MaskCallback
from maskft.training.engines import require_same_engine, require_whole_checkpoints
from maskft.training.ranks import on_first_rank, require_equal_ranks
from maskft.training.report import comparison, write_reports
from maskft.training.resume import (
    AUTO,
    Decided,
    Elapsed,
    RemovalCallback,
    deciding,
    require_resumable,
    resolve_checkpoint,
)
from maskft.training.task_eval import load_eval_tasks, watch_tasks
from maskft.training.trainer import MaskTrainer, WithoutMask
from maskft.tuner import AdapterMasks, MaskConfig, check_targets, find_group
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
    output_dir = Path(str(settings.output_dir))
    checkpoint = _check_output(data, settings, mask, output_dir)
    num_trained = check_model(str(data.model_name_or_path), mask, temperature_scaling=settings.temperature_scaling)
    train_rows, validation_rows = splits or load_splits(data, settings.seed, require_gain=require_gain)
    guard_rows = None
    if require_gain:
        validation_rows, guard_rows = split_guard_rows(validation_rows, settings.seed)
    resolved = _given(vars(data) | settings.to_dict() | ({"mask": mask.to_dict()} if mask else {}))
    rows_by_name = {"train": train_rows, "validation": validation_rows}
    hashes = {name: count_and_hash(rows) for name, rows in rows_by_name.items()}
    require_equal_ranks(
        resolved
        | {f"hash of the {name} data": found["sha256"] for name, found in hashes.items()}
        | {"checkpoint to go on from": str(checkpoint)}
        | versions()
    )
    decided = Decided(deciding(resolved, settings.world_size) | {"require_gain": require_gain})
    decided.facts |= {f"hash of the {name} rows": found["sha256"] for name, found in hashes.items()}
    if checkpoint is not None:
        decided.require_same(checkpoint)
    tokenizer = load_tokenizer(str(data.model_name_or_path), train_rows, validation_rows)
    eval_tasks = load_eval_tasks(settings, tokenizer)
    num_copies = 1 + (settings.save_total_limit or 2)
    require_free_space(output_dir, num_trained * _CHECKPOINT_BYTES * num_copies, "the run's checkpoints")

    with loading_whole():
        model = load_model(str(data.model_name_or_path), data.dtype, settings.model_init_kwargs)
        if mask is not None:
            model = get_peft_model(model, mask)
        if scores_from is not None:
            load_scores(model, scores_from)
    group = _mask_group(model)
    if group is not None:
        # Shards of different weights would train, to a mask of none of them.
        weights: dict[str, Any] = {"hash of the masked weights": group.base_fingerprint()}
        weights |= {"hash of the reference's weights": group.reference_fingerprint()}
        require_equal_ranks(weights)
        decided.facts |= weights
    with disk_errors(f"begin the run in {output_dir}"):
        trainer = build_trainer(model, tokenizer, train_rows, validation_rows, settings)
    watch_tasks(trainer, tokenizer, eval_tasks, settings)
    trainer.add_callback(decided)
    elapsed = Elapsed(checkpoint)
    trainer.add_callback(elapsed)
    without_mask = WithoutMask(trainer, checkpoint)
    if mask is not None:
        trainer.add_callback(without_mask)
    require_whole_checkpoints(trainer)
    if checkpoint is not None:
        decided.require_same(checkpoint)
        require_same_engine(trainer, checkpoint)
    else:
        # Only now, when nothing the user gave is left to be refused.
        trainer.add_callback(RemovalCallback(output_dir))
    with disk_errors(f"finish the run in {output_dir}"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    report = {
        "command": "sft" if mask is None else "train",
        "model_name_or_path": str(data.model_name_or_path),
        "settings": resolved,
        "versions": versions(),
        "machine": machine(),
        "data": hashes,
        "seconds": elapsed.seconds(),
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
    if without_mask.metrics:
        report["without_mask"] = without_mask.metrics
    if guard_rows is not None:
        _require_gain(trainer, tokenizer, guard_rows, output_dir, report)
    save_result(trainer, tokenizer, output_dir, report)
    # A run that was given its rows is a stage of another command, which may remove what it wrote.
    if splits is None and trainer.is_world_process_zero():
        result = "model" if mask is None else "adapter"
        logger.info("Wrote %s (the %s, report.html, report.json).", output_dir, result)
    return report


def _check_output(
    data: DataArguments, settings: TrainingSettings, mask: MaskConfig | None, output_dir: Path
) -> Path | None:
    """Refuse an output folder that cannot be used; returns the checkpoint to go on from, if any."""
    on_first_rank(lambda: require_writable(output_dir))
    checkpoint = resolve_checkpoint(settings.resume_from_checkpoint, output_dir)
    if checkpoint is not None:
        require_resumable(checkpoint, is_mask=mask is not None)
        logger.warning("Resuming from %s.", checkpoint)
    elif data.overwrite_output_dir:
        _keep_models(data, mask, output_dir)
    elif settings.resume_from_checkpoint != AUTO:
        require_empty_output(
            output_dir,
            what="the run",
            or_else="go on with --resume_from_checkpoint auto, or write over it with --overwrite_output_dir",
        )
    return checkpoint


def _keep_models(data: DataArguments, mask: MaskConfig | None, output_dir: Path) -> None:
    models = {"model to start from": data.model_name_or_path}
    if mask is not None:
        models["reference model"] = mask.reference_model_name_or_path
    for what, name in models.items():
        path = Path(str(name)).resolve()
        if name is not None and path.exists() and output_dir.resolve() in (path, *path.parents):
            raise MaskftError(
                f"--overwrite_output_dir would write over {output_dir}, which holds the {what}, {name}; give another "
                "--output_dir."
            )


def _best(trainer: MaskTrainer) -> dict[str, Any]:
    """The checkpoint that validation chose, and None where it chose none and the last weights were saved."""
    state = trainer.state
    is_chosen = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return {
        "metric": trainer.args.metric_for_best_model,
        "value": state.best_metric if is_chosen else None,
        "step": state.best_global_step if is_chosen else None,
    }


def _require_gain(
    trainer: MaskTrainer,
    tokenizer: PreTrainedTokenizerBase,
    guard_rows: Dataset,
    output_dir: Path,
    report: dict[str, Any],
) -> None:
    """Put the verdict into the report; without a gain write the reports and no adapter."""
    tokenised = tokenise_rows(guard_rows, tokenizer, max_length=trainer.args.max_length)
    batch_size = trainer.args.per_device_eval_batch_size
    verdict = judge_gain(trainer.model, tokenised, guard_rows["prompt"], batch_size=batch_size)
    report["data"]["guard"] = count_and_hash(guard_rows)
    report["verdict"] = verdict.to_dict()
    if verdict.has_gain:
        logger.info("%s", verdict.sentence)
        return
    if trainer.is_world_process_zero():
        with disk_errors(f"write the reports in {output_dir}"), atomic_folder(output_dir) as folder:
            write_reports(folder, report, is_written=False)
    raise NoGainError(f"{verdict.sentence} No adapter was written; {output_dir / 'report.html'} has the numbers.")


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    validation_rows: Dataset,
    settings: TrainingSettings,
) -> MaskTrainer:
    """A trainer of `model` on rows of `prompt` and `completion`; the mask of a masked model is watched.

    Raises:
        MaskftError: settings that TRL or Transformers refuse, or no row trains the end token, so that the model would
            never learn to stop.
    """
    ends = end_token_ids(tokenizer, model.generation_config)
    _check_chat_template(settings.chat_template_path)
    settings = copy.copy(settings)
    settings.model_init_kwargs = None  # they were used: TRL would warn that they are ignored
    try:
        trainer = MaskTrainer(
            model=model,
            args=settings,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
        )
    except MaskftError:
        raise
    except (ImportError, ValueError, RuntimeError) as error:
        raise MaskftError(f"The trainer cannot be set up with these settings and rows: {first_line(error)}") from error
    num_rows = None if settings.packing else len(train_rows)  # packed, several rows become one
    check_end_token_trained(trainer.train_dataset, ends, max_length=settings.max_length, num_rows=num_rows)
    group = _mask_group(model)
    if group is not None:
        group.keeps_masked_weights = not settings.low_memory
        trainer.mask_callback = callback = MaskCallback(group)
        trainer.add_callback(callback)
        callback.on_init_end(settings, trainer.state, trainer.control)
        if settings.temperature_scaling:
            callback.temperature = on_first_rank(lambda: best_temperature(trainer, trainer.train_dataset))
            divide_logits(trainer.model, callback.temperature)
            logger.info("The mask learns at a temperature of %s.", temperature_text(callback.temperature))
    return trainer


def _check_chat_template(path: str | None) -> None:
    if path is None or (path.endswith((".jinja", ".j2")) and Path(path).is_file()):
        return  # as TRL tells a file from a model
    try:
        AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise MaskftError(
            f"`chat_template_path` {path!r} is neither a .jinja file nor a model with a tokenizer "
            f"({first_line(error)}); correct it, or leave it out."
        ) from error


def _mask_group(model: PreTrainedModel) -> AdapterMasks | None:
    try:
        return find_group(model, "default")
    except MaskftError:
        return None


def check_model(model_name_or_path: str, mask: MaskConfig | None, *, temperature_scaling: bool = False) -> int:
    """Check from the model's small files, before any weight is loaded, that it is whole and that the mask fits it.

    Args:
        temperature_scaling: whether its logits are to be divided.

    Returns:
        The number of values that will be trained.

    Raises:
        MaskftError: no such model, one that is no causal language model or lacks its tokenizer or weights, or a mask
            setting that does not fit it; or logits that cannot be divided.
    """
    config = read_config(model_name_or_path)
    if mask is not None and mask.reference_model_name_or_path is not None:
        reference = read_config(mask.reference_model_name_or_path)
        if reference.architectures != config.architectures:
            raise MaskftError(
                f"`reference_model_name_or_path` names {mask.reference_model_name_or_path!r}, a model of the kind "
                f"{reference.architectures}, and the model to mask is a {config.architectures}; give the one before "
                "fine-tuning."
            )
        check_weights(mask.reference_model_name_or_path)
    model = without_weights(config, model_name_or_path)
    check_weights(model_name_or_path)
    read_tokenizer(model_name_or_path)
    if temperature_scaling:
        require_divisible(model, model_name_or_path)
    if mask is None:
        return int(sum(p.numel() for p in model.parameters()))
    modules = dict(model.named_modules())
    return int(sum(modules[name].weight.numel() for name in check_targets(mask, model)))


def load_splits(data: DataArguments, seed: int, *, require_gain: bool = False) -> tuple[Dataset, Dataset]:
    """Training and validation rows, the latter held out of the former where none are given.

    Validation rows of problems that are trained on are warned of.

    Args:
        require_gain: refuse such rows.

    Raises:
        MaskftError: bad data.
    """
    rows = load_rows(str(data.dataset_name), dataset_config=data.dataset_config, split=data.dataset_train_split)
    if data.eval_dataset_name:
        is_same = data.eval_dataset_name == data.dataset_name
        config = data.dataset_config if is_same else None
        held_out = load_held_out(data.eval_dataset_name, "validation", dataset_config=config)
        (refuse_overlap if require_gain else warn_of_overlap)(rows, held_out, "validation rows")
        return rows, held_out
    return split_validation(rows, validation_split_percentage=data.validation_split_percentage, seed=seed)


def load_tokenizer(model_name_or_path: str, *splits: Dataset) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which has to fit the rows of all `splits`.

    Raises:
        MaskftError: there is no tokenizer, or the rows are conversations and it has no chat template.
    """
    tokenizer = read_tokenizer(model_name_or_path)
    has_conversations = any(not isinstance(rows[0]["prompt"], str) for rows in splits)
    if tokenizer.chat_template is None and has_conversations:
        raise MaskftError(
            f"The rows are conversations, but the tokenizer of {model_name_or_path!r} has no chat template; give rows "
            'of plain {"prompt": "...", "completion": "..."} or a model with a template.'
        )
    return tokenizer


def save_result(
    trainer: MaskTrainer, tokenizer: PreTrainedTokenizerBase, output_dir: Path, report: dict[str, Any]
) -> None:
    """Write model or adapter, tokenizer and reports, each under its name only when all are complete.

    The first of several processes writes; all of them call it.
    """
    # Weights that are split over processes are gathered by all of them.
    gathered = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with disk_errors(f"write the result in {output_dir}"), atomic_folder(output_dir) as folder:
            trainer.model.save_pretrained(folder, state_dict=gathered)
            if trainer.mask_callback is not None:
                check_saved(folder, trainer.mask_callback.group.masks())
            tokenizer.save_pretrained(folder)
            write_reports(folder, report)
        if compared := comparison(report):
            logger.info("%s", compared)
    trainer.accelerator.wait_for_everyone()


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if value is not None and not key.endswith("_token")}
    return dict(plain(kept))


transformers.logging.set_verbosity_warning()
