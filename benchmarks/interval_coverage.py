"""How often the 95 % intervals of `maskft eval` and `maskft study` hold the truth, and how often their tests err.

Samples of known laws, put to the package's own functions: `paired_ratio_difference` for the difference of two models
on the same problems, `share` for one model's right answers, `sign_flip_test` and `mcnemar_exact` at the 5 % level where
the truth is no difference.

    python benchmarks/interval_coverage.py --num_trials 1000 --output_file coverage.json
"""

import argparse
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import about
from rich.console import Console
from rich.table import Table

from maskft.scoring.statistics import Interval, mcnemar_exact, paired_ratio_difference, share, sign_flip_test, wilson

Array = np.ndarray[Any, Any]
Trial = tuple[Interval, float | None]  # the interval, and p where the truth is no difference
NUM_RESAMPLES = 1999


def of_changes(changes: Array) -> Trial:
    """NLL of two models whose true mean difference is 0."""
    zeros = np.zeros_like(changes)
    interval = paired_ratio_difference(zeros, changes, np.ones_like(changes), num_resamples=NUM_RESAMPLES)
    return interval, sign_flip_test(changes, num_resamples=NUM_RESAMPLES)


def of_pairs(draw: np.random.Generator, n: int, only_first: float, only_second: float) -> Trial:
    """Right or wrong answers of two models, of which each alone is right with these probabilities."""
    place = draw.random(n)
    first, second = place < only_first, (place >= only_first) & (place < only_first + only_second)
    interval = paired_ratio_difference(first, second, np.ones(n), num_resamples=NUM_RESAMPLES)
    return interval, mcnemar_exact(first, second) if only_first == only_second else None


def of_draws(draw: np.random.Generator, n: int, mean: float) -> Trial:
    """Four answers to each problem, whose difficulty is drawn from a beta distribution of this mean."""
    right = draw.binomial(4, draw.beta(2 * mean, 2 - 2 * mean, n))
    return share(right, np.full(n, 4), num_resamples=NUM_RESAMPLES)[0], None


CASES: dict[str, tuple[float, Callable[[np.random.Generator, int], Trial]]] = {
    "NLL of two models, normal": (0.0, lambda draw, n: of_changes(draw.normal(size=n))),
    "NLL of two models, Student's t of 3": (0.0, lambda draw, n: of_changes(draw.standard_t(3, n))),
    "NLL of two models, lognormal": (0.0, lambda draw, n: of_changes(draw.lognormal(size=n) - np.exp(0.5))),
    "right answers of two models, 15 % and 15 % by one alone": (0.0, lambda draw, n: of_pairs(draw, n, 0.15, 0.15)),
    "right answers of two models, 10 % and 5 %": (-0.05, lambda draw, n: of_pairs(draw, n, 0.10, 0.05)),
    "right answers of two models, 2 % and 6 %": (0.04, lambda draw, n: of_pairs(draw, n, 0.02, 0.06)),
    "right answers of one, 30 %": (0.3, lambda draw, n: (share(draw.random(n) < 0.3, np.ones(n))[0], None)),
    "right answers of one, four draws, 50 %": (0.5, lambda draw, n: of_draws(draw, n, 0.5)),
    "right answers of one, four draws, 5 %": (0.05, lambda draw, n: of_draws(draw, n, 0.05)),
}


def measure(name: str, n: int, num_trials: int) -> dict[str, Any]:
    truth, sample = CASES[name]
    draw = np.random.default_rng([zlib.crc32(name.encode()), n])
    trials = [sample(draw, n) for _ in range(num_trials)]
    held = sum(interval.low <= truth <= interval.high for interval, _ in trials)
    row = {"case": name, "n": n, "trials": num_trials, "covered": _percent(held, num_trials)}
    p_values = [p for _, p in trials if p is not None]
    if p_values:
        row["erring"] = _percent(sum(p <= 0.05 for p in p_values), num_trials)
    return row


def _percent(count: int, num_trials: int) -> list[float]:
    found = wilson(count, num_trials)
    return [round(100 * value, 1) for value in (found.estimate, found.low, found.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_trials", type=int, default=1000)
    parser.add_argument("--num_problems", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--output_file", type=Path)
    given = parser.parse_args()
    table = Table(title="Intervals that hold the truth, % (tests that err at 5 %, %)")
    for name in ("case", *(f"n = {n}" for n in given.num_problems)):
        table.add_column(name)
    rows = []
    for case in CASES:
        found = [measure(case, n, given.num_trials) for n in given.num_problems]
        rows += found
        cells = [f"{row['covered'][0]}" + (f" ({row['erring'][0]})" if "erring" in row else "") for row in found]
        table.add_row(case, *cells)
    Console(width=140).print(table)
    if given.output_file:
        settings = {"num_trials": given.num_trials, "num_resamples": NUM_RESAMPLES}
        given.output_file.write_text(json.dumps(about(**settings) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
