"""What the benchmark scripts share: rivals timed in turn, and rows that say where they were measured."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from scipy.stats import quantile_test

from maskft.storage.environment import versions
from maskft_lab.study.worker import git_revision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def about(**config: Any) -> dict[str, Any]:
    """What a row needs to be repeated: hardware, versions, commit, settings."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_name()
    memory = torch.cuda.mem_get_info()[1] if DEVICE == "cuda" else psutil.virtual_memory().total
    hardware = {"device": name, "threads": torch.get_num_threads(), "memory_gb": round(memory / 1e9, 1)}
    return {"config": config, "hardware": hardware, "versions": versions(), "revision": git_revision()}


def config_of(given: argparse.Namespace, benchmark: str, folder: str, *without: str) -> dict[str, Any]:
    """The settings of a row: all arguments but files to write and those named in `without`, and the model's name."""
    config = {key: value for key, value in vars(given).items() if not key.endswith("_file") and key not in without}
    return config | {"model": folder.rstrip("/").rpartition("/")[2], "benchmark": benchmark}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i, name in turns(list(runs), warm_up + rounds):
        started = now()
        runs[name]()
        ended = now()
        if i >= warm_up:
            seconds[name].append(ended - started)
    return seconds


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Each round and name; the order turns by one name each round, so that none is always first."""
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            yield i, name


def now() -> float:
    """Seconds on a clock, once the accelerator has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rows_against(seconds: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    """Median and spread of each run, and its ratio to the reference: the median over rounds, its range, 95 % interval.

    The interval is that of the sign test, which takes the rounds to be independent and nothing else; None where there
    are too few.
    """
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[reference], strict=True)]
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
        rows.append(
            {
                "name": name,
                "median_ms": round(1e3 * statistics.median(values), 3),
                "quartiles_ms": [round(1e3 * quarters[0], 3), round(1e3 * quarters[2], 3)],
                f"ratio_to_{reference}": round(statistics.median(ratios), 4),
                "ratio_interval": None if math.isnan(interval.low) else [round(float(end), 4) for end in interval],
                "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
                "rounds": len(values),
            }
        )
    return rows


def write_rows(rows: list[dict[str, Any]], output_file: str | None) -> None:
    """Print the rows as a table, and append them to a file of JSON lines; a `curve` goes into the file alone."""
    columns = [key for key in rows[0] if key not in ("config", "hardware", "versions", "revision", "curve")]
    cells = [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if output_file:
        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
