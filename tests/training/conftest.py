"""Runs of several processes, with what `torchrun` sets for its workers."""

import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from one_rank import work
from runs import as_flags, data, mask, settings

from maskft import MaskConfig
from maskft.training.run import run_sft, run_train
from server import SERVER


class Rank(NamedTuple):
    """One process, and where its words are."""

    process: BaseProcess
    errors: Path

    def wait(self) -> int | None:
        self.process.join(timeout=240)
        return self.process.exitcode

    def said(self) -> str:
        return self.errors.read_text(errors="replace")


Start = Callable[..., list[Rank]]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Start]:
    """Starts one process for each list of arguments of `one_rank.py`; what still lives at the end is killed."""
    ranks: list[Rank] = []

    def start(*arguments: Sequence[str]) -> list[Rank]:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        shared = {"WORLD_SIZE": len(arguments), "LOCAL_WORLD_SIZE": len(arguments)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = []
        for rank, given in enumerate(arguments):
            errors = tmp_path / f"errors{len(ranks) + rank}.txt"
            environment = {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            process = SERVER.Process(target=work, args=(environment, errors, list(given)))
            process.start()
            started.append(Rank(process, errors))
        ranks.extend(started)
        return started

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


@pytest.fixture
def run_ranks(start_ranks: Start) -> Callable[..., list[str]]:
    """Runs processes of the same arguments to their end, with that exit status; what each of them said."""

    def run(num_ranks: int, arguments: Sequence[str], ends: int = 0) -> list[str]:
        ranks = start_ranks(*[arguments] * num_ranks)
        for rank in ranks:
            assert rank.wait() == ends, rank.said()
        return [rank.said() for rank in ranks]

    return run


@pytest.fixture(scope="session")
def command(tiny_model: Path, sums: Path) -> Callable[..., list[str]]:
    """The arguments of `maskft train` into a folder."""

    def arguments(output: Path, **flags: object) -> list[str]:
        flags = {"model_name_or_path": tiny_model, "dataset_name": sums, "output_dir": output} | flags
        return ["train", *as_flags(flags | {"disable_tqdm": True, "validation_split_percentage": 20})]

    return arguments


@pytest.fixture
def train(tiny_model: Path, sums: Path) -> Callable[..., dict]:
    """Learns a mask with these settings; the report."""

    def run(output_dir: Path, config: MaskConfig | None = None, **changes: object) -> dict:
        return run_train(data(tiny_model, sums), settings(output_dir, **changes), config or mask())

    return run


@pytest.fixture
def sft(tiny_model: Path, sums: Path) -> Callable[..., dict]:
    """Fine-tunes with these settings; the report."""
    return lambda output_dir, **changes: run_sft(data(tiny_model, sums), settings(output_dir, **changes))
