"""`maskft study`: every run of a study, each in its own process and folder; what is finished is not run again."""

from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from rich.console import Console

from maskft.adapters.model_files import model_limits, read_tokenizer
from maskft.adapters.model_layout import read_config, without_weights
from maskft.data.rows import tokenise_rows
from maskft.data.splits import num_overlapping
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError, first_line
from maskft.report import PageTable, narrow_table
from maskft.storage.files import atomic_write_text, disk_errors, require_free_space
from maskft.storage.lock import locked
from maskft.training.crossfit import CrossFitArguments, deal_folds
from maskft.training.inputs import check_inputs, hash_inputs
from maskft.training.prepare import check_model
from maskft_lab.study.config import StudyConfig, masks_of, read_study
from maskft_lab.study.methods import load_domain, lora_config, model_folder, shared_rows
from maskft_lab.study.plan import FAILED, Run, check_unchanged, plan_runs
from maskft_lab.study.schedule import STUDY_FILE, Schedule
from maskft_lab.study.summary import summarise, write_summary

# Weights, Adam's two moments and one older copy while a new one is written.
_CHECKPOINT_COPIES = 6


def run_study(
    config: str | Path, output_dir: str | Path | None = None, *, jobs: int = 1, dry_run: bool = False, console: Console
) -> dict[str, Any] | None:
    """Check a study whole, print its plan, carry out what is not finished, and write its summary.

    Args:
        config: the study's YAML file.
        output_dir: folder of the runs. Default: `runs/NAME`.
        jobs: runs at the same time.
        dry_run: stop after the plan.

    Returns:
        The summary as in `summary.json`, or None after a dry run.

    Raises:
        MaskftError: anything in the study that cannot work, found before the first run starts; another process at
            work on the same folder; or, once the summary is written, runs that failed.
    """
    if jobs < 1:
        raise MaskftError(f"`jobs` must be at least 1, got {jobs}.")
    study = read_study(config)
    output = Path(output_dir or Path("runs") / study.name)
    with nullcontext() if dry_run else locked(output, "study"):
        runs = plan_runs(study, output)
        inputs = _check(study, str(config), runs)
        console.print(narrow_table(_plan_table(runs), console.width))
        if dry_run:
            return None
        require_free_space(output, _num_bytes(study, runs, jobs), "the study")
        with disk_errors(f"finish the study in {output}"):
            if Path(config).resolve() != (output / STUDY_FILE).resolve():
                atomic_write_text(output / STUDY_FILE, Path(config).read_text(encoding="utf-8"))
            Schedule(inputs, output, jobs, console).carry_out(runs)
            summary = summarise(study, runs)
            write_summary(output, summary, console)
    if summary["failed"]:
        names = ", ".join(failure["run"] for failure in summary["failed"])
        raise MaskftError(
            f"{len(summary['failed'])} of {len(runs)} runs failed: {names}. {output / 'report.html'} has the others; "
            "mend what failed.json and log.txt of a failed run say, and start again, which runs them alone."
        )
    return summary


def _check(study: StudyConfig, file: str, runs: list[Run]) -> dict[tuple[str, str], dict[str, str]]:
    """Refuse rows and models that no run can use, and folders of other runs; hashes of what each model's runs read."""
    check_unchanged(runs)
    domains = {domain.name: load_domain(domain)[0] for domain in study.domains}
    for name, splits in domains.items():
        _check_splits(f"{file}: domain {name!r}: ", splits, study)
    rows = [split for splits in domains.values() for split in splits.values()]
    inputs: dict[tuple[str, str], dict[str, str]] = {}
    for name, model in study.models.items():
        folder = model_folder(model)
        _check_model(f"{file}: model {name!r}: ", folder, study, rows)
        inputs |= {(name, domain): hash_inputs(splits, folder) for domain, splits in domains.items()}
    for run in runs:
        check_inputs(run.folder, inputs[run.model, run.domain.name])
    return inputs


def _check_splits(where: str, splits: DatasetDict, study: StudyConfig) -> None:
    """Refuse rows that prove nothing or that no run can use; `where` begins the messages."""
    for (first, seen), (second, held_out) in combinations(splits.items(), 2):
        if num_shared := num_overlapping(seen, held_out):
            raise MaskftError(
                f"{where}{num_shared} of {len(held_out)} {second} rows have the prompt of a {first} row, so that they "
                "prove nothing; give rows of other problems."
            )
    for method in study.methods.values():
        if method.kind == "crossfit":
            deal_folds(shared_rows(splits["train"], method), CrossFitArguments(**method.crossfit).num_folds, 0)


def _check_model(where: str, folder: str, study: StudyConfig, rows: list[Dataset]) -> None:
    """Refuse a model that cannot be read or that a method does not fit; no weight is loaded."""
    check_model(folder, None)
    tokenise = RowTokeniser(read_tokenizer(folder), limits=model_limits(folder))
    for split in rows:
        tokenise_rows(split, tokenise)
    for method in study.methods.values():
        if (mask := masks_of(method, folder)) is not None:
            check_model(folder, mask)
        if method.kind == "lora":
            try:
                with torch.device("meta"):
                    model = without_weights(read_config(folder), folder)
                    get_peft_model(model, lora_config(model, method.lora, study.matched_mask(method) or {}))
            except (TypeError, ValueError) as error:
                raise MaskftError(f"{where}method {method.name!r}: {first_line(error)}") from error


def _num_bytes(study: StudyConfig, runs: list[Run], jobs: int) -> int:
    """Disk that the best fine-tunings will take, and the checkpoints of what is at work beside them."""
    per_weight = 2 if study.dtype == "bfloat16" else 4
    sizes = {name: per_weight * check_model(model_folder(model), None) for name, model in study.models.items()}
    kept = sum(sizes[run.model] for run in runs if run.method.kind == "fft" and not run.is_finished)
    return kept + jobs * _CHECKPOINT_COPIES * max(sizes.values()) * any(run.method.kind == "fft" for run in runs)


def _plan_table(runs: list[Run]) -> PageTable:
    states = ["finished" if r.is_finished else "failed" if (r.folder / FAILED).exists() else "to do" for r in runs]
    title = f"{len(runs) - states.count('finished')} of {len(runs)} runs to do"
    return PageTable(("run", "state"), list(zip([run.label for run in runs], states, strict=True)), title)
