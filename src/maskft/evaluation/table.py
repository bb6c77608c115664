"""Results as tables for the terminal; the protocol stands under every table."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskft.evaluation.samples import Row
from maskft.evaluation.scores import LIKELIHOODS, SIGN_FLIPS
from maskft.report import PageTable, interval_text
from maskft.scoring.statistics import FLIPS_FLOOR, Interval


def render_results(results: Row) -> list[PageTable]:
    """By task, a table of scores and one of the comparisons of main metrics; none for the tasks of a group.

    The first two columns tell rows apart.
    """
    names = short_names([row["model"] for row in results["scores"]])
    scores = [row for row in results["scores"] if "is_part" not in row]
    tasks = dict.fromkeys(row["task"] for row in scores)
    tables = [_scores(task, [row for row in scores if row["task"] == task], names) for task in tasks]
    compared = [row for row in results["comparisons"] if "is_part" not in row]
    parts = [(task, [row for row in compared if row["task"] == task]) for task in tasks]
    compare = [_comparisons(task, rows, names) for task, rows in parts if rows]
    # What holds for all comparisons is said once.
    return tables + compare[:-1] + [replace(table, caption=_notes(compared)) for table in compare[-1:]]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Each model's name, its folders cut down to their last parts where that leaves all names different."""
    short = {model: "+".join(Path(part).name or part for part in model.split("+")) for model in models}
    return short if len(set(short.values())) == len(short) else {model: model for model in models}


def protocol_line(protocol: Row) -> str:
    """What decides a score, in one line."""
    data = f"{protocol['dtype']}, n = {protocol['n']}, data {protocol['data']['sha256'][:12]}"
    if protocol["task"].startswith("nll:"):
        return f"NLL of the completion's tokens, the end token included, in nats; {data}"
    template = "chat template" if protocol["chat_template"] else "no chat template"
    generation, drawn = protocol["generation_kwargs"], "log-likelihoods"
    if generation is not None:
        is_drawn = generation.get("do_sample")
        drawn = f"{protocol['num_samples']} at T = {generation.get('temperature', 1)}" if is_drawn else "greedy"
        drawn += f", at most {generation['max_gen_toks']} new tokens"
    return f"version {protocol['version']}, {protocol['num_fewshot']} shots, {template}, {drawn}, {data}"


def _scores(task: str, rows: list[Row], names: dict[str, str]) -> PageTable:
    shown = []
    for row in rows:
        value = interval_text(row | {"estimate": row["score"]}, **_unit(row), plus="")
        shown.append((names[row["model"]], _metric(row), value, _detectable(row), str(row["n"])))
    lines = dict.fromkeys(protocol_line(row["protocol"]) for row in rows)
    caption = "\n".join([*lines, "[95 % intervals]; detectable: with power 0.8" + _unreachable_note(rows)])
    return PageTable(("model", "metric", "score", "detectable", "n"), shown, task, caption)


def _comparisons(task: str, rows: list[Row], names: dict[str, str]) -> PageTable:
    shown = []
    for row in rows:
        models = f"{names[row['to']]} - {names[row['from']]}"
        value, ps = row.get("not_compared", ""), ["", ""]
        if "p" in row:
            value = interval_text(row | {"estimate": row["difference"]}, **_unit(row))
            is_least = row.get("test") == SIGN_FLIPS and row["p"] <= FLIPS_FLOOR
            ps = [("<= " if is_least else "") + f"{row[key]:.3g}" for key in ("p", "p_holm")]
        shown.append((models, _metric(row), value, *ps, _detectable(row), str(row["n"])))
    header = ("difference of", "metric", "value", "p", "p (Holm)", "detectable", "n")
    return PageTable(header, shown, f"Paired differences: {task}")


def _notes(rows: list[Row]) -> str:
    """What stands below the comparisons."""
    notes = "[95 %, paired bootstrap]; Holm's correction over all rows; detectable: for one test, before Holm"
    notes += _unreachable_note(rows)
    if not all(Interval(row["difference"], row["low"], row["high"], row["n"]).has_width for row in rows if "p" in row):
        notes += "\nan interval without width: all items differ alike; detectable says what n could have shown"
    return notes


def _metric(row: Row) -> str:
    unit = ", nats" if row["metric"].split(",")[0] in LIKELIHOODS else ", %" if row["is_share"] else ""
    return str(row["metric"]).removesuffix(",none") + unit


def _unit(row: Row) -> dict[str, Any]:
    return {"scale": 100, "digits": 1} if row["is_share"] else {"scale": 1, "digits": 4}


def _detectable(row: Row) -> str:
    """`-` where so few items show no difference at all: shares differ by 1 at most."""
    detectable = row.get("detectable_difference", 0)
    if detectable is None or (row["is_share"] and detectable > 1):
        return "-"
    unit = _unit(row)
    return f"{unit['scale'] * detectable:.{unit['digits']}f}" if "detectable_difference" in row else ""


def _unreachable_note(rows: list[Row]) -> str:
    return "; -: none, with so few items" if "-" in map(_detectable, rows) else ""
