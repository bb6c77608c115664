"""The commands of maskft, by their entry points; each imports what it needs, so that help comes at once."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from maskft.cli import console, parse


def claimed(command: str, data: Any, settings: Any) -> AbstractContextManager[None]:
    """The lock on a run's output folder, into which a dry run writes nothing."""
    from maskft.storage.lock import locked

    return nullcontext() if data.dry_run else locked(settings.output_dir, command, by_first_rank=True)


def sft(arguments: Sequence[str]) -> None:
    """Fine-tune every weight of a model."""
    from maskft.training.arguments import DataArguments, TrainingSettings
    from maskft.training.run import run_sft

    refused = ["low_memory", "temperature_scaling"]
    data, settings = parse("sft", [DataArguments, TrainingSettings], arguments, refused=refused)
    with claimed("sft", data, settings):
        run_sft(data, settings)


def train(arguments: Sequence[str]) -> None:
    """Learn a mask over a fine-tuned model."""
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments, TrainingSettings
    from maskft.training.run import run_train

    kinds = [DataArguments, MaskArguments, TrainingSettings, GuardArguments]
    data, mask, settings, guard = parse("train", kinds, arguments)
    with claimed("train", data, settings):
        run_train(data, settings, mask.config(), require_gain=guard.require_gain)


def restore(arguments: Sequence[str]) -> None:
    """Learn which changes of a fine-tuning can go back, so that the task stays and the rest returns."""
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments
    from maskft.training.restore import RestoreArguments, RestoreSettings, Restoring, restoring_mask
    from maskft.training.run import run_train

    kinds = [DataArguments, RestoreArguments, MaskArguments, RestoreSettings, GuardArguments]
    refused = ["preset", "reference", "temperature_scaling", "load_best_model_at_end", "metric_for_best_model"]
    refused += ["greater_is_better", "eval_strategy", "save_strategy", "save_steps", "deepspeed"]
    data, given, mask, settings, guard = parse("restore", kinds, arguments, refused=refused)
    config = restoring_mask(mask)
    restoring = Restoring(given, str(config.reference_model_name_or_path))
    with claimed("restore", data, settings):
        run_train(data, settings, config, require_gain=guard.require_gain, restoring=restoring)


def crossfit(arguments: Sequence[str]) -> None:
    """Fine-tune, and learn a mask of the change on rows it has not seen."""
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments, TrainingSettings
    from maskft.training.crossfit import CrossFitArguments, run_crossfit
    from maskft.training.retain import RetainArguments

    kinds = [DataArguments, MaskArguments, CrossFitArguments, RetainArguments, TrainingSettings, GuardArguments]
    refused = ["overwrite_output_dir", "low_memory", "deepspeed", "preset"]
    refused += ["reference", "reference_model_name_or_path"]
    data, mask, cross, retain, settings, guard = parse("crossfit", kinds, arguments, refused=refused)
    with claimed("crossfit", data, settings):
        run_crossfit(data, settings, mask, cross, retain=retain, require_gain=guard.require_gain)


def evaluate(arguments: Sequence[str]) -> None:
    """Score models and adapters on tasks, with paired differences."""
    from maskft.evaluation.arguments import EvalArguments
    from maskft.evaluation.runner import run_eval
    from maskft.storage.lock import locked

    (parsed,) = parse("eval", [EvalArguments], arguments)
    with locked(parsed.output_dir, "eval"):
        run_eval(parsed, console())


def merge(arguments: Sequence[str]) -> None:
    """Fold a mask into a plain checkpoint."""
    from maskft.adapters.merge import merge_checkpoint
    from maskft.storage.lock import locked

    parser = argparse.ArgumentParser(prog="maskft merge", description=merge.__doc__)
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--model_name_or_path", help="Folder of the base model. Default: the one the adapter names.")
    parser.add_argument(
        "--reference_model_name_or_path",
        help="Folder of the model before fine-tuning, for masks of reference='pretrained'. Default: the adapter's.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write; it must be new or empty.")
    parser.add_argument("--force", action="store_true", help="Merge into a base whose fingerprint differs.")
    given = parser.parse_args(arguments)
    with locked(given.output_dir, "merge"):
        merge_checkpoint(
            given.adapter_name_or_path,
            given.output_dir,
            model_name_or_path=given.model_name_or_path,
            reference_model_name_or_path=given.reference_model_name_or_path,
            force=given.force,
        )
    console().print(f"Wrote {given.output_dir}")


def compress(arguments: Sequence[str]) -> None:
    """Code an adapter's masks to about their entropy."""
    from maskft.adapters.compress import compress_adapter
    from maskft.storage.lock import locked

    parser = argparse.ArgumentParser(prog="maskft compress", description=compress.__doc__)
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; it must be new or empty.")
    given = parser.parse_args(arguments)
    with locked(given.output_dir, "compress"):
        bits = compress_adapter(given.adapter_name_or_path, given.output_dir)
    console().print(f"Wrote {given.output_dir}: {bits:.4f} bits a weight")


def inspect(arguments: Sequence[str]) -> None:
    """Show what an adapter holds."""
    from maskft.adapters.inspect import draw_heat_map, inspect_adapter, render
    from maskft.report import narrow_table

    parser = argparse.ArgumentParser(prog="maskft inspect", description=inspect.__doc__)
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--output_file", help="Picture of the kept share by layer and module, as kept.png.")
    given = parser.parse_args(arguments)
    summary = inspect_adapter(given.adapter_name_or_path)
    shown = console()
    shown.print(narrow_table(render(summary), shown.width))
    if given.output_file:
        draw_heat_map(summary, Path(given.output_file))
        shown.print(f"Wrote {given.output_file}")
