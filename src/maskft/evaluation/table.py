"""Results as tables for the terminal; the protocol stands under every table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from maskft.evaluation.scores import SIGN_FLIPS
from maskft.evaluation.task import DEFAULT_MAX_NEW_TOKENS
from maskft.report import interval_text
from maskft.scoring.statistics import FLIPS_FLOOR, Interval

Row = dict[str, Any]


def render_results(results: Row) -> Group:
    """A table of scores for each task, and one of the comparisons of main metrics.

    Models go by the last parts of their paths. The tasks of a group are in `results.json` alone.
    """
    names = short_names([row["model"] for row in results["scores"]])
    scores = [row | {"model": names[row["model"]]} for row in results["scores"] if "is_part" not in row]
    tasks = list(dict.fromkeys(row["task"] for row in scores))
    tables = [_scores([row for row in scores if row["task"] == task], task) for task in tasks]
    compared = [
        row | {"from": names[row["from"]], "to": names[row["to"]]}
        for row in results["comparisons"]
        if "is_part" not in row
    ]
    if compared:
        tables.append(_comparisons(compared))
    return Group(*tables)


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
        drawn += f", at most {generation.get('max_gen_toks', DEFAULT_MAX_NEW_TOKENS)} new tokens"
    return f"version {protocol['version']}, {protocol['num_fewshot']} shots, {template}, {drawn}, {data}"


def _scores(rows: list[Row], task: str) -> Table:
    cells = [
        (
            row["model"],
            _metric(row),
            interval_text(row | {"estimate": row["score"]}, **_unit(row), plus=""),
            _detectable(row),
            str(row["n"]),
        )
        for row in rows
    ]
    table = _table(task, ("model", "metric", "score", "detectable", "n"), cells)
    lines = list(dict.fromkeys(protocol_line(row["protocol"]) for row in rows))
    table.caption = "\n".join([*lines, "[95 % intervals]; detectable: with power 0.8" + _unreachable_note(rows)])
    return table


def _comparisons(rows: list[Row]) -> Table:
    cells = [
        (
            row["task"],
            f"{row['to']} - {row['from']}",
            _metric(row),
            interval_text(row | {"estimate": row["difference"]}, **_unit(row)) if "p" in row else row["not_compared"],
            _p(row, "p"),
            _p(row, "p_holm"),
            _detectable(row),
            str(row["n"]),
        )
        for row in rows
    ]
    header = ("task", "difference of", "metric", "value", "p", "p (Holm)", "detectable", "n")
    table = _table("Paired differences", header, cells)
    table.caption = "[95 %, paired bootstrap]; Holm's correction over all rows; detectable: for one test, before Holm"
    table.caption += _unreachable_note(rows)
    intervals = [Interval(row["difference"], row["low"], row["high"], row["n"]) for row in rows if "low" in row]
    if not all(interval.has_width for interval in intervals):
        table.caption += "\nan interval without width: all items differ alike; detectable says what n could have shown"
    return table


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for name in header:
        is_text = name in ("task", "model", "difference of", "metric")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _p(row: Row, key: str) -> str:
    if key not in row:
        return ""
    is_least = row.get("test") == SIGN_FLIPS and row["p"] <= FLIPS_FLOOR
    return ("<= " if is_least else "") + f"{row[key]:.3g}"


def _metric(row: Row) -> str:
    return str(row["metric"]).removesuffix(",none") + (", %" if row["is_share"] else "")


def _unit(row: Row) -> dict[str, Any]:
    return {"scale": 100, "digits": 1} if row["is_share"] else {"scale": 1, "digits": 4}


def _detectable(row: Row) -> str:
    if "detectable_difference" not in row:
        return ""
    unit = _unit(row)
    return "-" if _is_unreachable(row) else f"{unit['scale'] * row['detectable_difference']:.{unit['digits']}f}"


def _is_unreachable(row: Row) -> bool:
    """Whether so few items show no difference at all: shares differ by 1 at most."""
    detectable = row.get("detectable_difference", 0)
    return detectable is None or (row["is_share"] and detectable > 1)


def _unreachable_note(rows: list[Row]) -> str:
    return "; -: none, with so few items" if any(map(_is_unreachable, rows)) else ""
