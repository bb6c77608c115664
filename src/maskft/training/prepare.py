"""What a run was given, checked before any weight is loaded."""

import logging
from pathlib import Path

from datasets import Dataset

from maskft.adapters.model_files import check_weights, model_limits, read_tokenizer
from maskft.adapters.model_layout import read_config, without_weights
from maskft.data.rows import Reader, load_held_out, load_mixture, load_rows
from maskft.data.splits import check_overlap, split_validation
from maskft.data.tokens import RowTokeniser
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
    files = check_weights(model_name_or_path)
    if mask is not None and any(file.suffix == ".bin" for file in files):
        logger.warning("%s has its weights in a pickle, which maskft merge refuses; save it as safetensors.", files[0])
    read_tokenizer(model_name_or_path)
    if temperature_scaling:
        require_divisible(model, model_name_or_path)
    if mask is None:
        return int(sum(p.numel() for p in model.parameters()))
    modules = dict(model.named_modules())
    return int(sum(modules[name].weight.numel() for name in check_targets(mask, model)))


def load_splits(
    data: DataArguments, settings: TrainingSettings, tokenise: RowTokeniser, *, require_gain: bool = False
) -> tuple[tuple[Dataset, Dataset], dict[str, dict[str, int]]]:
    """Training and validation rows with their tokens, the latter held out of the former where none are given.

    Validation rows of problems that are trained on are warned of, and refused under `require_gain`.

    Returns:
        The two, and what was found in the data sets, by their names.
    """
    columns = {
        "prompt": data.dataset_prompt_field,
        "completion": data.dataset_completion_field,
        "text": None if settings.dataset_text_field == "text" else settings.dataset_text_field,
    }
    given = {name: column for name, column in columns.items() if column is not None}
    reader = Reader(tokenise, given, skips_bad_rows=data.on_bad_row == "skip")
    if isinstance(data.dataset_mixer, dict):
        rows = load_mixture(data.dataset_mixer, seed=settings.seed, reader=reader)
    else:
        name, split = str(data.dataset_name), data.dataset_train_split
        rows = load_rows(name, dataset_config=data.dataset_config, split=split, reader=reader)
    if data.eval_dataset_name:
        is_same = data.eval_dataset_name == data.dataset_name
        config = data.dataset_config if is_same else None
        held_out = load_held_out(data.eval_dataset_name, "validation", dataset_config=config, reader=reader)
        check_overlap(rows, held_out, is_refused=require_gain)
        return (rows, held_out), reader.found
    share = data.validation_split_percentage
    return split_validation(rows, validation_split_percentage=share, seed=settings.seed), reader.found


def load_tokeniser(model_name_or_path: str, settings: TrainingSettings) -> RowTokeniser:
    """What makes the tokens of a run's rows, for that model.

    Raises:
        MaskftError: no tokenizer, no such chat template or token, or a padding token that the model has not.
    """
    tokenizer = read_tokenizer(
        model_name_or_path, chat_template_path=settings.chat_template_path, eos_token=settings.eos_token
    )
    limits = model_limits(model_name_or_path)
    padding = settings.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if padding is not None:  # which TRL pads with
        limits.check([tokenizer.convert_tokens_to_ids(padding)], tokenizer)
    return RowTokeniser.of(tokenizer, settings, limits)
