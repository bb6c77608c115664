"""What a run was given, checked before any weight is loaded."""

import logging
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config, without_weights
from maskft.data.model_files import check_weights, read_tokenizer
from maskft.data.rows import load_held_out, load_rows
from maskft.data.splits import check_overlap, split_validation
from maskft.errors import MaskftError
from maskft.storage.files import require_empty_output, require_writable
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.calibration import require_divisible
from maskft.training.ranks import on_first_rank
from maskft.training.resume import AUTO, require_resumable, resolve_checkpoint
from maskft.tuner import MaskConfig, check_targets

logger = logging.getLogger(__name__)


def check_output(data: DataArguments, settings: TrainingSettings, mask: MaskConfig | None) -> Path | None:
    """Refuse an output folder that cannot be used; returns the checkpoint to go on from, if any."""
    output_dir = Path(str(settings.output_dir))
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


def check_model(model_name_or_path: str, mask: MaskConfig | None, *, temperature_scaling: bool = False) -> int:
    """Check a model and its mask by the model's small files; returns the number of values that will be trained.

    Args:
        temperature_scaling: whether its logits are to be divided.

    Raises:
        MaskftError: no causal language model that is whole, a mask that does not fit it, or logits that cannot be
            divided.
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

    Validation rows of problems that are trained on are warned of, and refused under `require_gain`.
    """
    rows = load_rows(str(data.dataset_name), dataset_config=data.dataset_config, split=data.dataset_train_split)
    if data.eval_dataset_name:
        is_same = data.eval_dataset_name == data.dataset_name
        config = data.dataset_config if is_same else None
        held_out = load_held_out(data.eval_dataset_name, "validation", dataset_config=config)
        check_overlap(rows, held_out, is_refused=require_gain)
        return rows, held_out
    return split_validation(rows, validation_split_percentage=data.validation_split_percentage, seed=seed)


def load_tokenizer(model_name_or_path: str, *splits: Dataset) -> PreTrainedTokenizerBase:
    """The model's tokenizer; MaskftError where rows of `splits` are conversations and it has no chat template."""
    tokenizer = read_tokenizer(model_name_or_path)
    has_conversations = any(not isinstance(rows[0]["prompt"], str) for rows in splits)
    if tokenizer.chat_template is None and has_conversations:
        raise MaskftError(
            f"The rows are conversations, but the tokenizer of {model_name_or_path!r} has no chat template; give rows "
            'of plain {"prompt": "...", "completion": "..."} or a model with a template.'
        )
    return tokenizer
