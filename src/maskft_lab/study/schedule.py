"""The runs of a study at work, each in a process of its own, as soon as what it needs is finished."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Semaphore
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from maskft.storage.files import atomic_write_text
from maskft.training.inputs import note_inputs
from maskft_lab.study.plan import FAILED, Run

STUDY_FILE = "study.yaml"
# glibc gives large blocks back to the system after each use; keeping them makes training a fifth faster on a CPU.
_KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_MMAP_MAX_": "0"}
_KEEP_MEMORY |= {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


class Schedule:
    """Starts runs when what they need is finished; a failed run stops only those that need it."""

    def __init__(self, inputs: dict[tuple[str, str], dict[str, str]], output: Path, jobs: int, console: Console):
        self.inputs, self.output, self.jobs, self.console = inputs, output, jobs, console
        self.slots, self.is_stopped = Semaphore(jobs), False
        self.ends: dict[Path, Future[bool]] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def carry_out(self, runs: list[Run]) -> None:
        """Carry out what is not finished, each run after what it needs; what is at work ends with this process."""
        waiting = [run for run in runs if not run.is_finished]
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with ThreadPoolExecutor(max(1, len(waiting))) as pool, Progress(*columns, console=self.console) as progress:
            task = progress.add_task("runs", total=len(runs), completed=len(runs) - len(waiting))
            try:
                for run in waiting:
                    self.ends[run.folder] = pool.submit(self._carry_out, run)
                for end in as_completed(self.ends.values()):
                    end.result()
                    progress.advance(task)
            finally:
                self.is_stopped = True
                for process in self.processes:
                    process.kill()

    def _carry_out(self, run: Run) -> bool:
        """Wait for what a run needs and for a free slot, and then for the run; whether it has a result."""
        for folder in run.needs:
            if folder in self.ends and not self.ends[folder].result():
                return self._failed(run, f"not run, for {folder.name} failed", f"It needs {folder}, which failed.")
        with self.slots:
            if self.is_stopped:
                return False
            process = self._start(run)
            self.processes.append(process)
            process.wait()
        if run.is_finished:
            return True
        # A run that ends itself has written why.
        signal = f"It was ended by signal {-process.returncode}; 9 is mostly that memory ran out."
        shown = f"failed; {run.folder / 'log.txt'} says why"
        return self._failed(run, shown, signal if process.returncode < 0 else None)

    def _start(self, run: Run) -> "subprocess.Popen[bytes]":
        self.console.print(f"{run.label}: started")
        note_inputs(run.folder, self.inputs[run.model, run.domain.name])
        command = [sys.executable, "-m", "maskft_lab.study.worker", str(self.output / STUDY_FILE), str(self.output)]
        command += [str(run.folder), str(os.getpid())]
        num_threads = max(1, torch.get_num_threads() // self.jobs)
        environment = {**_KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(num_threads)}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": environment}
        with (run.folder / "log.txt").open("ab") as log:
            # In a session of its own, where a terminal's Ctrl-C does not come: this process ends it.
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **streams)

    def _failed(self, run: Run, shown: str, error: str | None) -> bool:
        if not self.is_stopped:  # else the next start takes it up
            if error is not None:
                atomic_write_text(run.folder / FAILED, json.dumps({"error": error}, indent=1) + "\n")
            self.console.print(f"{run.label}: {shown}")
        return False
