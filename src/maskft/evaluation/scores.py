"""Scores and comparisons, from sample files alone."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from maskft.data.splits import group_key
from maskft.errors import MaskftError
from maskft.evaluation.samples import PROTOCOL_FILE, Row, read_protocol, read_samples
from maskft.scoring.statistics import (
    Array,
    Interval,
    by_problem,
    holm,
    mcnemar_exact,
    paired_detectable,
    paired_ratio_difference,
    ratio,
    share,
    sign_flip_test,
    unpaired_detectable,
)

RESULTS_FILE = "results.json"
SIGN_FLIPS = "sign flips by problem"

# IFEval's headline figure in model cards: the mean of prompt- and instruction-level strict accuracy.
_MEANS = {"strict_acc_mean": ("prompt_level_strict_acc", "inst_level_strict_acc")}


class Scored:
    """One metric of one model on one task, problem by problem.

    Attributes:
        problems: the problems in sorted order.
        sums, counts: (k, n) for a mean of k ratios, else (n,), over the n problems.
        are_shares: whether problems score between 0 and 1, as answers do and losses do not.
    """

    def __init__(self, rows: Sequence[Row], metric: str) -> None:
        names = _MEANS.get(metric, (metric,))
        parts = [[_sum_and_count(row, name) for row in rows] for name in names]
        problems = [_problem(row) for row in rows]
        self.problems = sorted(set(problems))
        self.num_items = len(rows)
        stacked = np.array(parts, float)
        self.sums = by_problem(stacked[:, :, 0], problems)
        self.counts = by_problem(stacked[:, :, 1], problems)
        if len(names) == 1:
            self.sums, self.counts = self.sums[0], self.counts[0]
        self.are_shares = metric != "nll" and bool(((self.sums >= 0) & (self.sums <= self.counts)).all())

    @property
    def is_pass_or_fail(self) -> bool:
        """Whether each problem is right or wrong, once."""
        return bool(self.sums.ndim == 1 and np.isin(self.sums, (0, 1)).all() and (self.counts == 1).all())

    @property
    def value(self) -> float:
        """The score."""
        return float((np.atleast_2d(self.sums).sum(1) / np.atleast_2d(self.counts).sum(1)).mean())

    def interval(self) -> tuple[Interval, str]:
        """The score, and how its interval was made.

        Raises:
            MaskftError: there are fewer than two problems.
        """
        if len(self.problems) < 2:
            raise MaskftError(f"A score needs at least 2 problems, got {len(self.problems)}; raise --limit.")
        if self.are_shares:
            return share(self.sums, self.counts)
        return ratio(self.sums, self.counts), "bootstrap over problems"


def score_from_samples(folder: Path) -> list[Row]:
    """The scores of a model on a task, one for each metric, read from its `samples.jsonl` and nothing else.

    Returns:
        For each metric: `metric`, `score`, `low` and `high` (95 %), `interval` (its kind), `n` problems, `num_samples`,
        and `detectable_difference`, the smallest difference to an unrelated model that as many problems show with power
        0.8 at alpha 0.05; None where they show none.

    Raises:
        MaskftError: the samples are missing, damaged or fewer than two problems.
    """
    rows = read_samples(folder)
    if not rows:
        raise MaskftError(f"{folder} holds no complete sample; run maskft eval again.")
    scores = []
    for metric in metrics_of(rows):
        scored = Scored(rows, metric)
        interval, kind = scored.interval()
        scores.append(
            {
                "metric": metric,
                "score": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "interval": f"95 %, {kind}",
                "n": interval.n,
                "num_samples": scored.num_items,
                "detectable_difference": unpaired_detectable(scored.sums, scored.counts, are_shares=scored.are_shares),
            }
        )
    return scores


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of the metrics that the rows hold, the task's main one first."""
    held = list(rows[0]["verdict"])
    return [name for name, parts in _MEANS.items() if all(part in held for part in parts)] + held


def compare(folders: Sequence[tuple[str, Path]], metric: str) -> list[Row]:
    """Every two models of one task against each other on the problems they share, before Holm's correction.

    Args:
        folders: (name of the model, folder of its samples).

    Raises:
        MaskftError: the models did not answer the same problems.
    """
    scored = {name: Scored(read_samples(folder), metric) for name, folder in folders}
    return [_difference(a, scored[a], b, scored[b], metric) for a, b in combinations(scored, 2)]


def _difference(name_a: str, a: Scored, name_b: str, b: Scored, metric: str) -> Row:
    row: Row = {"metric": metric, "from": name_a, "to": name_b, "n": len(a.problems)}
    if a.problems != b.problems:
        raise MaskftError(f"{name_a} and {name_b} did not answer the same items; run both on one --output_dir.")
    if not np.array_equal(a.counts, b.counts):
        return row | {"not_compared": "the models scored different numbers of tokens: another tokenizer or context"}
    interval = paired_ratio_difference(a.sums, b.sums, a.counts)
    p, test = _test(a, b)
    detectable = paired_detectable(a.sums, b.sums, a.counts, are_shares=a.are_shares and b.are_shares)
    row |= {
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "interval": "95 %, paired bootstrap over problems" + ("" if interval.has_width else "; all differ alike"),
        "p": p,
        "test": test,
        "detectable_difference": detectable,
    }
    if a.is_pass_or_fail and b.is_pass_or_fail:
        row |= {
            "num_only_from_right": int(((a.sums == 1) & (b.sums == 0)).sum()),
            "num_only_to_right": int(((a.sums == 0) & (b.sums == 1)).sum()),
        }
    return row


def _test(a: Scored, b: Scored) -> tuple[float, str]:
    if a.is_pass_or_fail and b.is_pass_or_fail:
        return mcnemar_exact(a.sums, b.sums), "McNemar, exact"
    return sign_flip_test(_mean_parts(b) - _mean_parts(a)), SIGN_FLIPS


def _mean_parts(scored: Scored) -> Array:
    """Each problem's part in the score: the parts sum to it."""
    sums, counts = np.atleast_2d(scored.sums), np.atleast_2d(scored.counts)
    parts: Array = (sums / counts.sum(1, keepdims=True)).mean(0)
    return parts


def summarise(output_dir: Path) -> Row:
    """All scores and comparisons under an output folder, from its sample files.

    The main metric of each task is compared, and Holm's correction runs over all these comparisons. Models and tasks
    keep the order of `results.json`, on which the signs of the differences depend; others follow by name.

    Returns:
        `scores` (with the protocol of each) and `comparisons`.

    Raises:
        MaskftError: nothing has been scored there, or a file is damaged.
    """
    folders = [path.parent for path in sorted(Path(output_dir).glob(f"*/*/{PROTOCOL_FILE}"))]
    if not folders:
        raise MaskftError(f"{output_dir} holds no samples; run maskft eval with this --output_dir first.")
    protocols = {folder: read_protocol(folder) for folder in folders}
    names = {folder: (protocol["task"], protocol["model"]) for folder, protocol in protocols.items()}
    order = _order(Path(output_dir) / RESULTS_FILE)
    folders.sort(key=lambda f: (order.index(names[f]) if names[f] in order else len(order), names[f]))
    return build_results([(protocols[folder], folder) for folder in folders])


def _order(results: Path) -> list[tuple[str, str]]:
    """Tasks and models in the order that a run wrote them; none where there are no results yet."""
    if not results.exists():
        return []
    try:
        return [(row["task"], row["model"]) for row in json.loads(results.read_text(encoding="utf-8"))["scores"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskftError(
            f"{results}, which has the order of the models, cannot be read ({error}); remove it, and that is by name."
        ) from error


def build_results(entries: Sequence[tuple[Row, Path]]) -> Row:
    """`summarise` for given (protocol, folder) entries, which keep their order."""
    scores: list[Row] = []
    by_task: dict[str, list[tuple[str, Path]]] = {}
    for protocol, folder in entries:
        model, task = protocol["model"], protocol["task"]
        by_task.setdefault(task, []).append((model, folder))
        for score in score_from_samples(folder):
            scores.append({"model": model, "task": task} | score | {"protocol": protocol})
    comparisons: list[Row] = []
    for task, folders in by_task.items():
        metric = metrics_of(read_samples(folders[0][1]))[0]
        comparisons += [{"task": task} | row for row in compare(folders, metric)]
    tested = [row for row in comparisons if "p" in row]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return {"scores": scores, "comparisons": comparisons}


def _problem(row: Row) -> str:
    """What is drawn independently: an item with its draws; for an NLL the rows of one prompt or conversation."""
    if "nll" in row["verdict"]:
        return group_key(row["prompt"])
    item: str = row["item"]
    return item


def _sum_and_count(row: Row, metric: str) -> tuple[float, float]:
    value = row["verdict"].get(metric)
    if isinstance(value, list):
        return float(sum(value)), float(len(value))
    if value is None:
        raise MaskftError(f"The sample of item {row['item']} has no verdict for {metric}; its file is damaged.")
    total, count = (value["sum"], value["count"]) if isinstance(value, dict) else (value, 1)
    if not math.isfinite(total):
        raise MaskftError(
            f"The sample of item {row['item']} has a {metric} of {total}, which is no finite number; remove its file "
            "and run maskft eval again."
        )
    return float(total), float(count)
