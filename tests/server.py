"""Processes as copies of a server that has imported, once for all tests, what takes long; it finds no modules of tests.

There is one such server, so that all tests name here what it imports.
"""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "hypothesis.extra.numpy",
        "maskft_lab.study.methods",
        "maskft_lab.study.worker",
        "maskft.training.run",
        "maskft.training.trainer",
        "pytest",
        "torch.distributed.fsdp",
        "transformers.models.llama",
    ]
)


def begin(environment: Mapping[str, str], output: Path | None, errors: Path) -> None:
    """Make a copy what a new process with that environment is; without `output` that is thrown away."""
    gc.freeze()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    for number, path in ((1, output or Path(os.devnull)), (2, errors)):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)


def work_on_a_study(environment: Mapping[str, str], log: Path, arguments: Sequence[str]) -> None:
    """Do what `python -m maskft_lab.study.worker` does."""
    begin(environment, log, log)
    from maskft_lab.study.worker import main

    sys.exit(main(*arguments[:-1], str(os.getppid())))  # it ends with the server, whose copy it is


class Worker:
    """A run of a study, used as the `subprocess.Popen` that it stands for."""

    def __init__(self, command: Sequence[str], *, stdout: Any, stderr: Any, env: Mapping[str, str], **_: Any) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "maskft_lab.study.worker"]
        assert stdout is stderr
        self._process = SERVER.Process(target=work_on_a_study, args=(dict(env), Path(stdout.name), list(command[3:])))
        self._process.start()
        self.kill, self.wait = self._process.kill, self._process.join

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode
