"""Scores and comparisons, from sample files alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from maskft.data.forms import problem_of
from maskft.errors import MaskftError
from maskft.evaluation.samples import SAMPLES_FILE, Row, read_protocol, read_samples
from maskft.scoring import statistics
from maskft.storage.json_text import json_hash, read_object

RESULTS_FILE = "results.json"
SIGN_FLIPS = "sign flips by problem"

# IFEval's headline figure in model cards: the mean of prompt- and instruction-level strict accuracy.
_MEANS = {"strict_acc_mean,none": ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")}
# lm-eval gives each item's log-likelihood, or that and its length; here they are nats per item, word or byte.
LIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
# Settings that a difference of two models must not come from; templates and dtypes may be the models' own.
_ASKED = ("num_fewshot", "generation_kwargs", "num_samples", "system_instruction", "seed", "version")
# Tasks of a group that are drawn as a whole, where it has so many: fewer clusters make an interval too narrow.
_MIN_CLUSTERS = 10


class Scored:
    """One metric of one model on one task, or on all tasks of a group, by `problems`, which are sorted.

    A problem is what is drawn independently: an item with its draws; for an NLL the rows of one prompt or conversation;
    for the whole of a group of ten tasks or more, a task. `sums` and `counts` are (k, n) for a mean of k ratios over
    n problems; `are_shares` says whether these score between 0 and 1, as answers do and losses do not.
    """

    def __init__(self, parts: Sequence[list[Row]], metric: str, *, weight_by_size: bool = True) -> None:
        names = [name.split(",") for name in _MEANS.get(metric, (metric,))]
        problems: list[str] = []
        values = []
        for number, rows in enumerate(parts):
            of = [[r for r in rows if r["filter"] == kind and name in r["metrics"]] for name, kind in names]
            if not of[0] or len({len(held) for held in of}) > 1:
                raise MaskftError(f"Not every sample has a value for {metric}; its file is damaged.")
            held = np.array([[_finite(r, name) for r in each] for (name, _), each in zip(names, of, strict=True)])
            values.append(held if weight_by_size else held / len(of[0]))
            are_one = len(parts) >= _MIN_CLUSTERS
            problems += [f"{number:04}" if are_one else f"{number:04} {_problem(row)}" for row in of[0]]
        self.problems = sorted(set(problems))
        self.num_items = len(problems)
        stacked = np.concatenate(values, axis=1)
        self.sums, self.counts = (statistics.by_problem(stacked[:, :, i], problems) for i in (0, 1))
        is_loss = metric.split(",")[0] in ("nll", *LIKELIHOODS)
        self.are_shares = not is_loss and bool(((self.sums >= 0) & (self.sums <= self.counts)).all())

    @property
    def parts(self) -> statistics.Array:
        """Each problem's part in the score: the parts sum to it."""
        return np.mean(self.sums / self.counts.sum(1, keepdims=True), axis=0)

    def to_row(self, metric: str) -> Row:
        """The score of two problems or more as in `results.json`."""
        scored = (self.sums, self.counts)
        if self.are_shares:
            interval, kind = statistics.share(*scored)
        else:
            interval, kind = statistics.ratio(*scored), "bootstrap over problems"
        row = {"metric": metric, "score": interval.estimate, "low": interval.low, "high": interval.high}
        row |= {"interval": f"95 %, {kind}", "n": interval.n, "num_samples": self.num_items}
        detectable = statistics.unpaired_detectable(*scored, are_shares=self.are_shares)
        return row | {"is_share": self.are_shares, "detectable_difference": detectable}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names `metric,filter` of what the samples hold a number for, the task's main one first."""
    first = {row["filter"]: row for row in reversed(rows)}
    filters = dict.fromkeys(row["filter"] for row in rows)
    held = [f"{name},{kind}" for kind in filters for name in first[kind]["metrics"] if _value(first[kind], name)]
    return [name for name, parts in _MEANS.items() if all(part in held for part in parts)] + held


def difference(name_a: str, a: Scored, name_b: str, b: Scored, metric: str, changed: Sequence[str]) -> Row:
    """One model against another on the same problems, which are required, before Holm's correction.

    They are not compared where these settings of theirs have `changed`.
    """
    are_shares = a.are_shares and b.are_shares
    row: Row = {"metric": metric, "from": name_a, "to": name_b, "n": len(a.problems), "is_share": are_shares}
    if changed:
        return row | {"not_compared": f"the models were asked with another {' and '.join(changed)}"}
    if a.problems != b.problems:
        raise MaskftError(f"{name_a} and {name_b} did not answer the same items; run both on one --output_dir.")
    if not np.array_equal(a.counts, b.counts):
        return row | {"not_compared": "the models scored different numbers of tokens: another tokenizer or context"}
    interval = statistics.paired_ratio_difference(a.sums, b.sums, a.counts)
    are_right_or_wrong = statistics.is_binary(a.sums, a.counts) and statistics.is_binary(b.sums, b.counts)
    row |= {"difference": interval.estimate, "low": interval.low, "high": interval.high}
    row["interval"] = "95 %, paired bootstrap over problems" + ("" if interval.has_width else "; all differ alike")
    row["detectable_difference"] = statistics.paired_detectable(a.sums, b.sums, a.counts, are_shares=are_shares)
    if not are_right_or_wrong:
        return row | {"p": statistics.sign_flip_test(b.parts - a.parts), "test": SIGN_FLIPS}
    row |= {"p": statistics.mcnemar_exact(a.sums[0], b.sums[0]), "test": "McNemar, exact"}
    return row | {
        "num_only_from_right": int((a.sums > b.sums).sum()),
        "num_only_to_right": int((a.sums < b.sums).sum()),
    }


def summarise(output_dir: Path) -> Row:
    """All scores (with the protocol of each) and comparisons under an output folder, from its sample files.

    Models and tasks keep the order of `results.json`, on which the signs of differences depend; others follow by name.
    """
    folders = [path.parent for path in Path(output_dir).glob(f"*/*/{SAMPLES_FILE}")]
    if not folders:
        raise MaskftError(f"{output_dir} holds no samples; run maskft eval with this --output_dir first.")
    entries = [(read_protocol(folder), folder) for folder in folders]
    results = Path(output_dir) / RESULTS_FILE
    by_name = "remove it, and that is by name"
    try:
        scores = read_object(results, by_name)["scores"] if results.exists() else []
        order = [(row["task"], row["model"]) for row in scores]
    except (KeyError, TypeError) as error:
        raise MaskftError(f"{results} has no order of the models; {by_name}.") from error

    def place(entry: tuple[Row, Path]) -> Any:
        name = entry[0]["task"], entry[0]["model"]
        return order.index(name) if name in order else len(order), name

    return build_results(sorted(entries, key=place))


def build_results(entries: Sequence[tuple[Row, Path]]) -> Row:
    """`summarise` for given (protocol, folder) entries, which keep their order.

    Holm's correction runs over the main metrics of tasks and of the wholes of groups, and over all other comparisons
    (further metrics, the tasks of a group) by themselves; these have `is_part`.
    """
    scores: list[Row] = []
    comparisons: list[Row] = []
    for unit in _units(entries):
        about = {"task": unit.task} | ({"is_part": True} if unit.is_part else {})
        scored = {
            model: {metric: Scored(parts, metric, weight_by_size=weighs) for metric, weighs in unit.metrics.items()}
            for model, (_, parts) in unit.answers.items()
        }
        for model, (protocol, _) in unit.answers.items():
            rows = [{"model": model} | about | of.to_row(metric) for metric, of in scored[model].items()]
            scores += [row | {"protocol": protocol} for row in rows]
        for number, metric in enumerate(unit.metrics):
            part = {"is_part": True} if unit.is_part or number else {}
            for a, b in combinations(scored, 2):
                protocols = unit.answers[a][0], unit.answers[b][0]
                changed = [key for key in _ASKED if protocols[0].get(key) != protocols[1].get(key)]
                of = difference(a, scored[a][metric], b, scored[b][metric], metric, changed)
                comparisons.append({"task": unit.task} | part | of)
    for is_part in (False, True):
        tested = [row for row in comparisons if "p" in row and row.get("is_part", False) is is_part]
        for row, corrected in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = corrected
    return {"scores": scores, "comparisons": comparisons}


@dataclass
class _Unit:
    """A task, or the whole of a group."""

    task: str
    answers: dict[str, tuple[Row, list[list[Row]]]]  # for each model its protocol and the samples of each task
    metrics: dict[str, bool]  # whether the tasks count by their size
    groups: Row
    is_part: bool = False


def _units(entries: Sequence[tuple[Row, Path]]) -> list[_Unit]:
    """The tasks, each group before its first one."""
    tasks: dict[str, _Unit] = {}
    for protocol, folder in entries:
        rows = read_samples(folder)
        metrics = dict.fromkeys(metrics_of(rows), True)
        unit = tasks.setdefault(protocol["task"], _Unit(protocol["task"], {}, metrics, protocol.get("groups") or {}))
        unit.answers[protocol["model"]] = protocol, [rows]
    units: dict[str, _Unit] = {}
    for task in tasks.values():
        for group, about in task.groups.items():
            whole = _whole(group, about, [unit for unit in tasks.values() if group in unit.groups])
            if whole is not None:
                whole.is_part = task.is_part
                units.setdefault(group, whole)
                task.is_part = True
        units[task.task] = task
    return list(units.values())


def _whole(group: str, about: Row, tasks: list[_Unit]) -> _Unit | None:
    """A group's whole over the models that have answered all its tasks; None where there is none yet."""
    models = [model for model in tasks[0].answers if all(model in task.answers for task in tasks)]
    if len(tasks) < about["num_tasks"] or not models:
        return None
    shared = [name for name in tasks[0].metrics if all(name in task.metrics for task in tasks)]
    answers = {}
    for model in models:
        protocols = [task.answers[model][0] for task in tasks]
        data = {"sha256": json_hash([protocol["data"]["sha256"] for protocol in protocols])}
        whole = protocols[0] | {"task": group, "n": sum(protocol["n"] for protocol in protocols), "data": data}
        answers[model] = whole, [task.answers[model][1][0] for task in tasks]
    weighs = about["metrics"].items()
    metrics = {name: by_size for metric, by_size in weighs for name in shared if name.startswith(f"{metric},")}
    return _Unit(group, answers, metrics, {})


def _problem(row: Row) -> str:
    return problem_of(row["doc"]) if "nll" in row["metrics"] else f"{row['doc_id']} {row.get('doc_hash', '')}"


def _value(row: Row, name: str) -> tuple[float, float] | None:
    """An item's sum and count; None where a metric, as F1 or BLEU, has a value for all items at once alone."""
    match row[name]:
        case {"sum": int(total) | float(total), "count": int(count) | float(count)}:
            return total, count
        case [int(total) | float(total), int(count) | float(count)] if name in LIKELIHOODS:
            return -total, count
        case [*parts] if parts and all(isinstance(part, bool) for part in parts):
            return sum(parts), len(parts)
        case int(value) | float(value):
            return -value if name in LIKELIHOODS else value, 1
    return None


def _finite(row: Row, name: str) -> tuple[float, float]:
    try:
        total, count = map(float, _value(row, name) or (math.nan, 1))
    except OverflowError:  # an integer beyond all floats
        total, count = math.inf, 1
    if not math.isfinite(total) or not 0 <= count < math.inf:
        what = f"The sample of item {row['doc_id']} has a {name} of {total:g} over {count:g}, which is no finite number"
        raise MaskftError(f"{what}; remove its file and run maskft eval again.")
    return total, count
