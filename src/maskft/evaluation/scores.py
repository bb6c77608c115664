"""Scores and comparisons, from sample files alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from maskft.data.splits import group_key
from maskft.errors import MaskftError
from maskft.evaluation.samples import SAMPLES_FILE, Row, read_protocol, read_samples
from maskft.scoring.statistics import (
    Array,
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
from maskft.storage.json_text import json_hash

RESULTS_FILE = "results.json"
AGGREGATES_FILE = "lm_eval.json"
SIGN_FLIPS = "sign flips by problem"

# IFEval's headline figure in model cards: the mean of prompt- and instruction-level strict accuracy.
_MEANS = {"strict_acc_mean,none": ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")}
# lm-eval gives each item's log-likelihood, or that and its length; here they are nats per item, word or byte.
_LIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
# Tasks of a group that are drawn as a whole, where it has so many: fewer clusters make an interval too narrow.
_MIN_CLUSTERS = 10


class Scored:
    """One metric of one model on one task, or on all tasks of a group, problem by problem.

    A problem is what is drawn independently: an item with its draws; for an NLL the rows of one prompt or conversation;
    for the whole of a group of ten tasks or more, a task.

    Attributes:
        problems: the problems in sorted order.
        sums, counts: (k, n) for a mean of k ratios, else (n,), over the n problems.
        are_shares: whether problems score between 0 and 1, as answers do and losses do not.
    """

    def __init__(self, parts: Sequence[list[Row]], metric: str, *, weight_by_size: bool = True) -> None:
        names = _MEANS.get(metric, (metric,))
        problems: list[str] = []
        values = []
        for number, rows in enumerate(parts):
            of = {name: [row for row in rows if _has(row, name)] for name in names}
            first = of[names[0]]
            if not first or any(len(held) != len(first) for held in of.values()):
                raise MaskftError(f"Not every sample has a value for {metric}; its file is damaged.")
            held = np.array([[_sum_and_count(row, name) for row in of[name]] for name in names], float)
            values.append(held if weight_by_size else held / len(first))
            problems += [f"{number:04}" if len(parts) >= _MIN_CLUSTERS else f"{number:04} {_problem(r)}" for r in first]
        self.problems = sorted(set(problems))
        self.num_items = len(problems)
        stacked = np.concatenate(values, axis=1)
        self.sums, self.counts = (by_problem(stacked[:, :, i], problems) for i in (0, 1))
        if len(names) == 1:
            self.sums, self.counts = self.sums[0], self.counts[0]
        is_loss = metric.split(",")[0] in ("nll", *_LIKELIHOODS)
        self.are_shares = not is_loss and bool(((self.sums >= 0) & (self.sums <= self.counts)).all())

    @property
    def is_pass_or_fail(self) -> bool:
        """Whether each problem is right or wrong, once."""
        return bool(self.sums.ndim == 1 and np.isin(self.sums, (0, 1)).all() and (self.counts == 1).all())

    @property
    def value(self) -> float:
        """The score."""
        return float(self.parts.sum())

    @property
    def parts(self) -> Array:
        """Each problem's part in the score: the parts sum to it."""
        sums, counts = np.atleast_2d(self.sums), np.atleast_2d(self.counts)
        parts: Array = (sums / counts.sum(1, keepdims=True)).mean(0)
        return parts

    def to_row(self, metric: str) -> Row:
        """The score as in `results.json`.

        `detectable_difference` is the smallest difference to an unrelated model that as many problems show with power
        0.8 at alpha 0.05; None where they show none.

        Raises:
            MaskftError: there are fewer than two problems.
        """
        if self.are_shares:
            interval, kind = share(self.sums, self.counts)
        else:
            interval, kind = ratio(self.sums, self.counts), "bootstrap over problems"
        return {
            "metric": metric,
            "score": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "interval": f"95 %, {kind}",
            "n": interval.n,
            "num_samples": self.num_items,
            "is_share": self.are_shares,
            "detectable_difference": unpaired_detectable(self.sums, self.counts, are_shares=self.are_shares),
        }


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names `metric,filter` of what the samples hold a number for, the task's main one first."""
    first = {row["filter"]: row for row in reversed(rows)}
    filters = dict.fromkeys(row["filter"] for row in rows)
    held = [f"{metric},{f}" for f in filters for metric in first[f]["metrics"] if _is_number(first[f], metric)]
    return [name for name, parts in _MEANS.items() if all(part in held for part in parts)] + held


def difference(name_a: str, a: Scored, name_b: str, b: Scored, metric: str) -> Row:
    """One model against another on the problems they share, before Holm's correction.

    Raises:
        MaskftError: the models did not answer the same problems.
    """
    are_shares = a.are_shares and b.are_shares
    row: Row = {"metric": metric, "from": name_a, "to": name_b, "n": len(a.problems), "is_share": are_shares}
    if a.problems != b.problems:
        raise MaskftError(f"{name_a} and {name_b} did not answer the same items; run both on one --output_dir.")
    if not np.array_equal(a.counts, b.counts):
        return row | {"not_compared": "the models scored different numbers of tokens: another tokenizer or context"}
    interval = paired_ratio_difference(a.sums, b.sums, a.counts)
    are_right_or_wrong = a.is_pass_or_fail and b.is_pass_or_fail
    row |= {
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "interval": "95 %, paired bootstrap over problems" + ("" if interval.has_width else "; all differ alike"),
        "p": mcnemar_exact(a.sums, b.sums) if are_right_or_wrong else sign_flip_test(b.parts - a.parts),
        "test": "McNemar, exact" if are_right_or_wrong else SIGN_FLIPS,
        "detectable_difference": paired_detectable(a.sums, b.sums, a.counts, are_shares=are_shares),
    }
    if are_right_or_wrong:
        row |= {
            "num_only_from_right": int(((a.sums == 1) & (b.sums == 0)).sum()),
            "num_only_to_right": int(((a.sums == 0) & (b.sums == 1)).sum()),
        }
    return row


def summarise(output_dir: Path) -> Row:
    """All scores and comparisons under an output folder, from its sample files.

    Models and tasks keep the order of `results.json`, on which the signs of the differences depend; others follow by
    name.

    Returns:
        `scores` (with the protocol of each) and `comparisons`.

    Raises:
        MaskftError: nothing has been scored there, or a file is damaged.
    """
    folders = [path.parent for path in sorted(Path(output_dir).glob(f"*/*/{SAMPLES_FILE}"))]
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
    """`summarise` for given (protocol, folder) entries, which keep their order.

    Holm's correction runs over the main metrics of tasks and of the wholes of groups, and over all other comparisons
    (further metrics, the tasks of a group) by themselves; these have `is_part`.
    """
    scores: list[Row] = []
    comparisons: list[Row] = []
    for unit in _units(entries):
        scored = [
            (protocol, metric, Scored(parts, metric, weight_by_size=weighs))
            for protocol, parts in unit.by_model
            for metric, weighs in unit.metrics.items()
        ]
        about = {"task": unit.task} | ({"is_part": True} if unit.is_part else {})
        scores += [{"model": p["model"]} | about | of.to_row(m) | {"protocol": p} for p, m, of in scored]
        for number, metric in enumerate(unit.metrics):
            of_metric = [(p["model"], of) for p, m, of in scored if m == metric]
            part = {"is_part": True} if unit.is_part or number else {}
            for (name_a, a), (name_b, b) in combinations(of_metric, 2):
                comparisons.append({"task": unit.task} | part | difference(name_a, a, name_b, b, metric))
    for is_part in (False, True):
        tested = [row for row in comparisons if "p" in row and row.get("is_part", False) is is_part]
        for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = corrected
    return {"scores": scores, "comparisons": comparisons}


_Answers = dict[str, tuple[Row, list[Row]]]  # to one task, by model: the protocol and the samples


@dataclass(frozen=True)
class _Unit:
    """A task, or the whole of a group: for each model its protocol and the samples of each task.

    `metrics` says of each whether the tasks count by their size.
    """

    task: str
    by_model: list[tuple[Row, list[list[Row]]]]
    metrics: dict[str, bool]
    is_part: bool = False


def _units(entries: Sequence[tuple[Row, Path]]) -> list[_Unit]:
    """The tasks, each group before its first one."""
    answers: dict[str, _Answers] = {}
    members: dict[str, list[_Answers]] = {}
    for protocol, folder in entries:
        answers.setdefault(protocol["task"], {})[protocol["model"]] = (protocol, read_samples(folder))
    for of_task in answers.values():
        for group in _groups(of_task):
            members.setdefault(group, []).append(of_task)
    wholes = {group: whole for group, tasks in members.items() if (whole := _whole(group, tasks)) is not None}
    units: list[_Unit] = []
    for task, of_task in answers.items():
        groups = [group for group in _groups(of_task) if group in wholes]
        for number, group in enumerate(groups):
            if all(unit.task != group for unit in units):
                units.append(replace(wholes[group], is_part=number > 0))
        by_model = [(protocol, [rows]) for protocol, rows in of_task.values()]
        metrics = dict.fromkeys(metrics_of(by_model[0][1][0]), True)
        units.append(_Unit(task, by_model, metrics, is_part=bool(groups)))
    return units


def _groups(of_task: _Answers) -> Row:
    groups: Row = next(iter(of_task.values()))[0].get("groups", {})
    return groups


def _whole(group: str, tasks: list[_Answers]) -> _Unit | None:
    """A group's whole over the models that have answered all its tasks; None where there is none yet."""
    about = _groups(tasks[0])[group]
    models = [model for model in tasks[0] if all(model in of_task for of_task in tasks)]
    if len(tasks) < about["num_tasks"] or not models:
        return None
    held = [metrics_of(of_task[models[0]][1]) for of_task in tasks]
    metrics = {
        name: weighs
        for metric, weighs in about["metrics"].items()
        for name in held[0]
        if name.split(",")[0] == metric and all(name in names for names in held)
    }
    by_model = []
    for model in models:
        protocols = [of_task[model][0] for of_task in tasks]
        data = {"sha256": json_hash([protocol["data"]["sha256"] for protocol in protocols])}
        whole = protocols[0] | {"task": group, "n": sum(protocol["n"] for protocol in protocols), "data": data}
        by_model.append((whole, [of_task[model][1] for of_task in tasks]))
    return _Unit(group, by_model, metrics)


def _problem(row: Row) -> str:
    if "nll" in row["metrics"]:
        return group_key(row["doc"]["prompt"])
    return f"{row['doc_id']} {row.get('doc_hash', '')}"


def _has(row: Row, metric: str) -> bool:
    name, _, filtered = metric.partition(",")
    return row["filter"] == filtered and name in row["metrics"]


def _is_number(row: Row, metric: str) -> bool:
    """Whether the metric has a value for each item; that of F1 or BLEU has one for all items at once."""
    value = row[metric]
    if isinstance(value, list):
        return metric in _LIKELIHOODS or (bool(value) and all(isinstance(part, bool) for part in value))
    return isinstance(value, int | float) or (isinstance(value, dict) and {"sum", "count"} <= set(value))


def _sum_and_count(row: Row, metric: str) -> tuple[float, float]:
    name = metric.split(",")[0]
    value = row[name]
    if name in _LIKELIHOODS:
        total, count = (-value[0], value[1]) if isinstance(value, list) else (-value, 1)
    elif isinstance(value, list):
        total, count = sum(value), len(value)
    else:
        total, count = (value["sum"], value["count"]) if isinstance(value, dict) else (value, 1)
    if not math.isfinite(total):
        raise MaskftError(
            f"The sample of item {row['doc_id']} has a {name} of {total}, which is no finite number; remove its file "
            "and run maskft eval again."
        )
    return float(total), float(count)
