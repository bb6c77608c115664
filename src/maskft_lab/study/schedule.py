"""The runs of a study at work, each in a process of its own, as soon as what it needs is finished."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maskft.data.inputs import note_inputs
from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_text
from maskft_lab.study.plan import FAILED, RESULT, Run

STUDY_FILE = "study.yaml"
# glibc gives large blocks back to the system after each use; keeping them makes training a fifth faster on a CPU.
_KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


class Schedule:
    """Starts runs when what they need is finished; a failed run stops only those that need it."""

    def __init__(
        self, runs: list[Run], inputs: dict[tuple[str, str], dict[str, str]], output: Path, jobs: int, console: Console
    ) -> None:
        self.num_runs, self.inputs, self.output, self.jobs, self.console = len(runs), inputs, output, jobs, console
        self.waiting = [run for run in runs if not run.is_finished]
        self.failed: set[Path] = set()
        self.at_work: dict[subprocess.Popen[bytes], Run] = {}

    def run(self) -> None:
        """Carry out what is not finished; what is at work ends with this process."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task("runs", total=self.num_runs, completed=self.num_runs - len(self.waiting))
                while self.waiting or self.at_work:
                    self._start_what_can()
                    self._collect()
                    at_work = ", ".join(run.label for run in self.at_work.values())
                    done = self.num_runs - len(self.waiting) - len(self.at_work)
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
                self._fail(run, f"not run, for {missing[0].name} failed", f"It needs {missing[0]}, which failed.")
            elif len(self.at_work) < self.jobs and all((folder / RESULT).exists() for folder in run.needs):
                self.waiting.remove(run)
                self.at_work[self._start(run)] = run

    def _start(self, run: Run) -> "subprocess.Popen[bytes]":
        run.folder.mkdir(parents=True, exist_ok=True)
        note_inputs(run.folder, self.inputs[run.model.name, run.domain.name])
        command = [sys.executable, "-m", "maskft_lab.study.worker", str(self.output / STUDY_FILE), str(self.output)]
        threads = max(1, torch.get_num_threads() // self.jobs)
        environment = {**_KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads)}
        with (run.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*command, str(run.folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def _collect(self) -> None:
        for process, run in list(self.at_work.items()):
            if process.poll() is None:
                continue
            del self.at_work[process]
            if not run.is_finished:
                signal = f"It was ended by signal {-process.returncode}; 9 is mostly that memory ran out."
                # A run that ends itself has written why.
                self._fail(
                    run, f"failed; {run.folder / 'log.txt'} says why", signal if process.returncode < 0 else None
                )

    def _fail(self, run: Run, shown: str, error: str | None) -> None:
        self.failed.add(run.folder)
        if error is not None:
            atomic_write_text(run.folder / FAILED, json.dumps({"error": error}, indent=1) + "\n")
        self.console.print(f"{run.label}: {shown}", highlight=False)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second study out of the folder; the lock goes with the process, however it ends."""
    try:
        with FileLock(folder / ".lock", timeout=4):
            yield
    except Timeout as error:
        raise MaskftError(
            f"Another process is at work on {folder}; wait for it or give another --output_dir."
        ) from error
