"""Runs of several processes, started as `torchrun` starts its workers."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Rank:
    """One process, and where its words are."""

    process: subprocess.Popen[bytes]
    errors: Path

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(timeout=240)

    def said(self) -> str:
        """What it wrote to stderr, in one line: the reader of a terminal sees no width."""
        return " ".join(self.errors.read_text(errors="replace").split())


Start = Callable[[Sequence[Sequence[str]]], list[Rank]]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Start]:
    """Starts one process for each list of arguments of `one_rank.py`; what still lives at the end is killed."""
    ranks: list[Rank] = []

    def start(arguments: Sequence[Sequence[str]]) -> list[Rank]:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        shared = {"WORLD_SIZE": len(arguments), "LOCAL_WORLD_SIZE": len(arguments)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        started = []
        for rank, given in enumerate(arguments):
            errors = tmp_path / f"errors{len(ranks) + rank}.txt"
            environment = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            with errors.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("one_rank.py")), *given],
                    env={**os.environ, **environment},
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
            started.append(Rank(process, errors))
        ranks.extend(started)
        return started

    yield start
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
            rank.process.wait()
