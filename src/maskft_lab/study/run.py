"""`maskft study`: every run of a study, each in its own process and folder; what is finished is not run again."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from maskft.adapters.model_layout import read_config, without_weights
from maskft.data.inputs import hash_inputs, note_inputs
from maskft.data.splits import num_overlapping
from maskft.data.tokens import tokenise_rows
from maskft.errors import MaskftError, first_line
from maskft.storage.files import atomic_write_text, disk_errors, require_free_space, require_writable
from maskft.training.crossfit import CrossFitArguments, deal_folds
from maskft.training.prepare import check_model, load_tokenizer
from maskft_lab.study.config import StudyConfig, masks_of, read_study
from maskft_lab.study.methods import Splits, load_domain, lora_config, model_folder, shared_rows
from maskft_lab.study.plan import (
    FAILED,
    Cost,
    Run,
    Size,
    check_same_inputs,
    check_unchanged,
    expected_cost,
    plan_runs,
)
from maskft_lab.study.summary import summarise, write_summary

STUDY_FILE = "study.yaml"
# glibc gives large blocks back to the system after each use; keeping them makes training a fifth faster on a CPU.
_KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
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
    runs = plan_runs(study, output)
    check_unchanged(runs)
    splits = _check(study, str(config))
    inputs = _inputs(study, splits)
    check_same_inputs(runs, inputs)
    costs = _estimate(study, runs, splits)
    console.print(_plan_table(runs, costs, jobs))
    if dry_run:
        return None
    num_bytes = sum(cost.num_bytes for run, cost in zip(runs, costs, strict=True) if not run.is_finished)
    largest = max((cost.num_bytes for cost in costs), default=0)
    require_free_space(output, num_bytes + jobs * _CHECKPOINT_COPIES * largest, "the study")
    require_writable(output)
    with disk_errors(f"finish the study in {output}"):
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            if Path(config).resolve() != (output / STUDY_FILE).resolve():
                atomic_write_text(output / STUDY_FILE, Path(config).read_text())
            _Schedule(runs, inputs, output, jobs, console).run()
            summary = summarise(study, runs)
            write_summary(output, summary, console)
    if summary["failed"]:
        names = ", ".join(failure["run"] for failure in summary["failed"])
        raise MaskftError(
            f"{len(summary['failed'])} of {len(runs)} runs failed: {names}. {output / 'report.html'} has the others; "
            "mend what failed.json and log.txt of a failed run say, and start again, which runs them alone."
        )
    return summary


def _check(study: StudyConfig, file: str) -> dict[str, Splits]:
    """Refuse rows and models that no run can use; the rows by domain."""
    splits = {domain.name: load_domain(domain) for domain in study.domains}
    for name, split in splits.items():
        _check_splits(f"{file}: domain {name!r}: ", split, study)
    every = [rows for split in splits.values() for rows in split.rows().values()]
    for model in study.models:
        _check_model(f"{file}: model {model.name!r}: ", model_folder(model), study, every)
    return splits


def _check_splits(where: str, splits: Splits, study: StudyConfig) -> None:
    """Refuse rows that prove nothing or that no run can use; `where` begins the messages."""
    for (first, seen), (second, held_out) in combinations(splits.rows().items(), 2):
        num_shared = num_overlapping(seen, held_out)
        if num_shared:
            raise MaskftError(
                f"{where}{num_shared} of {len(held_out)} {second} rows have the prompt of a {first} row, so that they "
                "prove nothing; give rows of other problems."
            )
    if splits.train.features != splits.validation.features:
        raise MaskftError(
            f"{where}The training rows are of one form and the validation rows of another, text and messages; write "
            "both in one form."
        )
    for method in study.methods:
        if method.kind == "crossfit":
            deal_folds(shared_rows(splits.train, method), CrossFitArguments(**method.crossfit).num_folds, 0)


def _check_model(where: str, folder: str, study: StudyConfig, rows: list[Dataset]) -> None:
    """Refuse a model that cannot be read or that a method does not fit; no weight is loaded."""
    check_model(folder, None)
    load_tokenizer(folder, *rows)
    for method in study.methods:
        mask = masks_of(method, folder)
        if mask is not None:
            check_model(folder, mask)
        if method.kind == "lora":
            matched = next((other.mask for other in study.methods if other.kind == "mft"), {})
            try:
                with torch.device("meta"):
                    model = without_weights(read_config(folder), folder)
                    get_peft_model(model, lora_config(model, method.lora, matched))
            except (TypeError, ValueError) as error:
                raise MaskftError(f"{where}method {method.name!r}: {first_line(error)}") from error


def _inputs(study: StudyConfig, splits: dict[str, Splits]) -> dict[tuple[str, str], dict[str, str]]:
    """Hashes of what the runs read, by model and domain."""
    weights = {model.name: hash_inputs({}, model_folder(model)) for model in study.models}
    rows = {name: hash_inputs(split.rows()) for name, split in splits.items()}
    return {(model, domain): rows[domain] | weights[model] for model in weights for domain in rows}


def _estimate(study: StudyConfig, runs: list[Run], splits: dict[str, Splits]) -> list[Cost]:
    sizes = {}
    for model in study.models:
        folder = model_folder(model)
        num_weights, tokenizer = check_model(folder, None), AutoTokenizer.from_pretrained(folder)
        for name, split in splits.items():
            train, test = (
                sum(map(len, tokenise_rows(rows, tokenizer)["input_ids"])) for rows in (split.train, split.test)
            )
            sizes[model.name, name] = Size(num_weights, train, test)
    rate = _measured_flops()
    return [expected_cost(run, runs, sizes[run.model.name, run.domain.name], rate) for run in runs]


def _measured_flops() -> float:
    """Operations a second in a training-sized float32 matrix product, at a third for all that is not one."""
    a = torch.randn(512, 1024, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ a.T).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * 512 * 512 * 1024 / min(seconds) / 3


def _plan_table(runs: list[Run], costs: list[Cost], jobs: int) -> Table:
    ahead = [cost for run, cost in zip(runs, costs, strict=True) if not run.is_finished]
    minutes = sum(cost.seconds for cost in ahead) / 60 / jobs
    gigabytes = sum(cost.num_bytes for cost in ahead) / 1e9
    table = Table(
        title=f"{len(ahead)} of {len(runs)} runs to do: about {minutes:.0f} min, {gigabytes:.1f} GB kept",
        caption="~: estimated from the count of operations; else from finished runs of the same kind",
        box=None,
        header_style="bold underline",
    )
    for name in ("run", "state", "min"):
        table.add_column(name, justify="left" if name != "min" else "right")
    for run, cost in zip(runs, costs, strict=True):
        state = "finished" if run.is_finished else "failed" if (run.folder / FAILED).exists() else "to do"
        minutes_text = f"{'' if cost.is_measured else '~'}{cost.seconds / 60:.1f}"
        table.add_row(run.label, state, "" if run.is_finished else minutes_text)
    return table


class _Schedule:
    """Starts runs when what they need is finished; a failed run stops only those that need it."""

    def __init__(
        self, runs: list[Run], inputs: dict[tuple[str, str], dict[str, str]], output: Path, jobs: int, console: Console
    ) -> None:
        self.runs, self.inputs, self.output, self.jobs, self.console = runs, inputs, output, jobs, console
        self.waiting = [run for run in runs if not run.is_finished]
        self.failed: set[Path] = set()
        self.at_work: dict[subprocess.Popen[bytes], Run] = {}

    def run(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console) as progress:
                done = len(self.runs) - len(self.waiting)
                task = progress.add_task("runs", total=len(self.runs), completed=done)
                while self.waiting or self.at_work:
                    self._start_what_can()
                    self._collect()
                    at_work = ", ".join(run.label for run in self.at_work.values())
                    done = len(self.runs) - len(self.waiting) - len(self.at_work)
                    progress.update(task, completed=done, description=at_work or "runs")
                    time.sleep(0.2)
        finally:
            for process in self.at_work:
                process.kill()
                process.wait()

    def _start_what_can(self) -> None:
        for run in list(self.waiting):
            missing = [folder for folder in run.needs if folder in self.failed]
            if missing:
                self.waiting.remove(run)
                self.failed.add(run.folder)
                _write_failure(run, f"It needs {missing[0]}, which failed.")
                self.console.print(f"{run.label}: not run, for {missing[0].name} failed", highlight=False)
            elif len(self.at_work) < self.jobs and all(self._is_ready(folder) for folder in run.needs):
                self.waiting.remove(run)
                self._start(run)

    def _is_ready(self, folder: Path) -> bool:
        return next(run for run in self.runs if run.folder == folder).is_finished

    def _start(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        note_inputs(run.folder, self.inputs[run.model.name, run.domain.name])
        command = [sys.executable, "-m", "maskft_lab.study.worker"]
        threads = max(1, torch.get_num_threads() // self.jobs)
        with (run.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*command, str(self.output / STUDY_FILE), str(self.output), str(run.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self.at_work[process] = run

    def _collect(self) -> None:
        for process, run in list(self.at_work.items()):
            if process.poll() is None:
                continue
            del self.at_work[process]
            if not run.is_finished:
                self.failed.add(run.folder)
                if process.returncode < 0:  # no word from the process itself
                    _write_failure(
                        run, f"It was ended by signal {-process.returncode}; 9 is mostly that memory ran out."
                    )
                self.console.print(f"{run.label}: failed; {run.folder / 'log.txt'} says why", highlight=False)


def _write_failure(run: Run, error: str) -> None:
    atomic_write_text(run.folder / FAILED, json.dumps({"error": error}, indent=1) + "\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second study out of the folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        for _ in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        else:
            raise MaskftError(f"Another process is at work on {folder}; wait for it or give another --output_dir.")
        yield
