"""Results as tables for the terminal; the protocol stands under every table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from maskft.evaluation.scores import LOSSES, SIGN_FLIPS
from maskft.evaluation.tasks import DEFAULT_MAX_NEW_TOKENS
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
    lines = list(dict.fromkeys(protocol_line(row["protocol"]) for row in rows))
    lines.append("[95 % intervals]; detectable: with power 0.8" + _unreachable_note(rows))
    table = Table(title=task, caption="\n".join(lines))
    for name in ("model", "metric", "score", "detectable", "n"):
        table.add_column(name, justify="left" if name in ("model", "metric") else "right", overflow="fold")
    for row in rows:
        scale = _scale(row)
        table.add_row(
            row["model"],
            _metric(row),
            f"{scale * row['score']:{_digits(row)}} [{_pair(row)}]".replace("[", "\\["),
            _detectable(row),
            str(row["n"]),
        )
    return table


def _comparisons(rows: list[Row]) -> Table:
    caption = "[95 %, paired bootstrap]; Holm's correction over all rows; detectable: for one test, before Holm"
    caption += _unreachable_note(rows)
    intervals = [Interval(row["difference"], row["low"], row["high"], row["n"]) for row in rows if "low" in row]
    if not all(interval.has_width for interval in intervals):
        caption += "\nan interval without width: all items differ alike; detectable says what n could have shown"
    table = Table(title="Paired differences", caption=caption)
    for name in ("task", "difference of", "value", "p", "p (Holm)", "detectable", "n"):
        table.add_column(name, justify="left" if name in ("task", "difference of") else "right", overflow="fold")
    for row in rows:
        of = f"{row['to']} - {row['from']}\n({_metric(row)})"
        if "p" not in row:
            table.add_row(row["task"], of, row["not_compared"], "", "", "", str(row["n"]))
            continue
        scale, digits = _scale(row), _digits(row)
        table.add_row(
            row["task"],
            of,
            f"{scale * row['difference']:+{digits}}\n[{_pair(row, '+')}]".replace("[", "\\["),
            _p(row, "p"),
            _p(row, "p_holm"),
            _detectable(row),
            str(row["n"]),
        )
    return table


def _pair(row: Row, sign: str = "") -> str:
    scale, digits = _scale(row), _digits(row)
    return f"{scale * row['low']:{sign}{digits}}, {scale * row['high']:{sign}{digits}}"


def _p(row: Row, key: str) -> str:
    is_least = row.get("test") == SIGN_FLIPS and row["p"] <= FLIPS_FLOOR
    return ("<= " if is_least else "") + f"{row[key]:.3g}"


def _metric(row: Row) -> str:
    name = str(row["metric"]).removesuffix(",none")
    return name if _is_loss(row) else f"{name}, %"


def _is_loss(row: Row) -> bool:
    return row["metric"].split(",")[0] in LOSSES


def _detectable(row: Row) -> str:
    return "-" if _is_unreachable(row) else f"{_scale(row) * row['detectable_difference']:{_digits(row)}}"


def _is_unreachable(row: Row) -> bool:
    """Whether so few items show no difference at all: shares differ by 1 at most."""
    detectable = row.get("detectable_difference", 0)
    return detectable is None or (not _is_loss(row) and detectable > 1)


def _unreachable_note(rows: list[Row]) -> str:
    return "; -: none, with so few items" if any(map(_is_unreachable, rows)) else ""


def _scale(row: Row) -> float:
    return 1 if _is_loss(row) else 100


def _digits(row: Row) -> str:
    return ".4f" if _is_loss(row) else ".1f"
