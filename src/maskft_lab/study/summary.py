"""What the finished runs of a study say: a table with paired differences, the curves, and the pages that show them."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from maskft.errors import MaskftError
from maskft.report import Link, Page, PageTable, Picture, interval_text, narrow_table, without_empty_columns, write_html
from maskft.scoring import statistics
from maskft.storage.files import atomic_write_bytes, atomic_write_text
from maskft.storage.json_text import read_object
from maskft_lab.study.config import Method, StudyConfig
from maskft_lab.study.figure import checked_rows, draw_study
from maskft_lab.study.plan import FAILED, RESULT, Run

_ANEW = "delete the folder it lies in, and start again"
Result = dict[str, Any]
Results = dict[tuple[str, int], Result]
"""Results of finished runs by method and seed."""
Columns = tuple[tuple[str, Callable[[dict[str, Any]], str]], ...]
"""Names of a table's columns, each with what makes a row's text."""


def summarise(study: StudyConfig, runs: list[Run]) -> dict[str, Any]:
    """Results by model and domain, from the runs' files alone.

    Means are over seeds; intervals and p-values (sign flips, corrected by Holm's method within a panel) are over the
    test items, each with all its seeds, so they say nothing about seeds that were not run: those stand one by one.
    """
    finished = {run: read_object(run.folder / RESULT, _ANEW) for run in runs if run.is_finished}
    panels = [
        {"model": model, "domain": domain.name}
        | _panel(study, {run: of for run, of in finished.items() if (run.model, run.domain) == (model, domain)})
        for model in study.models
        for domain in study.domains
    ]
    failed = [
        {"run": run.label, "error": read_object(run.folder / FAILED, _ANEW).get("error")}
        for run in runs
        if run not in finished and (run.folder / FAILED).exists()
    ]
    return {"name": study.name, "seeds": list(study.seeds), "panels": panels, "failed": failed}


def _panel(study: StudyConfig, by_run: dict[Run, Result]) -> dict[str, Any]:
    results = {(run.method.name, run.seed): result for run, result in by_run.items()}
    rows = [row for method in study.methods.values() if (row := method_row(method, study, results))]
    for key in ("nll_p", "accuracy_p"):
        tested = [row for row in rows if key in row]
        for row, p in zip(tested, statistics.holm([row[key] for row in tested]), strict=True):
            row[key], row[f"{key}_is_least"] = p, row[key] <= statistics.FLIPS_FLOOR
    best_steps = [result["best_step"] for (name, _), result in results.items() if name == "fft"]
    start = float(np.mean(best_steps)) if best_steps else 0.0
    return {
        "n": rows[0]["test_nll"]["n"] if rows else 0,
        "num_items": len(next(iter(results.values()))["test"]["num_tokens"]) if results else 0,
        "best_fft_step": start,
        "rows": rows,
        "curves": {m.name: _curve(m.name, results, 0.0 if m.kind == "fft" else start) for m in study.methods.values()},
        "runs": [_one(run, result) for run, result in by_run.items()],
    }


def _one(run: Run, result: Result) -> Result:
    test, kept = result["test"], ("best_step", "num_steps", "best_validation_loss", "num_trained", "rank", "kept_share")
    nll = sum(test["nll_sums"]) / sum(test["num_tokens"])
    accuracy = float(np.mean(test["correct"])) if "correct" in test else None
    row = {"method": run.method.name, "seed": run.seed, "folder": run.label, "test_nll": nll, "accuracy": accuracy}
    return row | {key: result[key] for key in kept if key in result}


def method_row(method: Method, study: StudyConfig, results: Results) -> dict[str, Any] | None:
    """One method over its finished seeds, against the best FFT of the same seeds."""
    seeds = [seed for seed in study.seeds if (method.name, seed) in results]
    if not seeds:
        return None
    of = [results[method.name, seed] for seed in seeds]
    tests = [result["test"] for result in of]
    row: dict[str, Any] = {
        "method": method.name,
        "seeds": seeds,
        "best_steps": [result.get("best_step") for result in of],
        "test_nll": asdict(statistics.ratio(_column(tests, "nll_sums"), _column(tests, "num_tokens"))),
        "kept_share": float(np.mean([result["kept_share"] for result in of])) if "kept_share" in of[0] else None,
    }
    if all("correct" in test for test in tests):
        row["accuracy"] = asdict(statistics.share(_column(tests, "correct"), _column(tests, "rows"))[0])
    # The base model has no seed: it is compared with the best FFT of every seed.
    paired = [s for s in (study.seeds if method.kind == "base" else seeds) if ("fft", s) in results]
    if method.name == "fft" or not paired:
        return row
    after = tests * len(paired) if method.kind == "base" else [results[method.name, seed]["test"] for seed in paired]
    return row | differences(method.name, [results["fft", seed]["test"] for seed in paired], after)


def differences(name: str, before: list[Result], after: list[Result]) -> dict[str, Any]:
    """What `after` has more than `before`, paired over the test items."""
    if not np.array_equal(_column(before, "num_tokens"), _column(after, "num_tokens")):
        why = "were scored on different tokens of the test rows, by different versions or settings"
        raise MaskftError(f"{name!r} and 'fft' {why}; delete the older runs' folders.")
    found: dict[str, Any] = {}
    keys = {"nll": "nll_sums", "tempered": "nll_sums_at_temperature", "accuracy": "correct"}
    for what, key in keys.items():
        if not all(key in test for test in before + after):  # where answers are not checked
            continue
        old, new = _column(before, key), _column(after, key)
        weight = "rows" if what == "accuracy" else "num_tokens"
        found[f"{what}_difference"] = asdict(statistics.paired_ratio_difference(old, new, _column(after, weight)))
        if what == "tempered":
            found["temperatures"] = [test["temperature"] for test in after]
        else:
            found[f"{what}_p"] = statistics.sign_flip_test((new - old).sum(0))
    return found


def _column(tests: list[Result], key: str) -> "np.ndarray[Any, Any]":
    """Of several results, (results, problems); `rows` is the number of test rows of each problem."""
    values = np.array([[1] * len(test["num_tokens"]) if key == "rows" else test[key] for test in tests], float)
    # The turns of one conversation are one problem; where there are none, a result names no problems.
    return statistics.by_problem(values, tests[0]["problems"]) if "problems" in tests[0] else values


def _curve(name: str, results: Results, start: float) -> list[dict[str, float]]:
    """Test NLL at each checkpoint, the mean over seeds with its interval; `step` counts from the base model."""
    of = [result for (method, _), result in results.items() if method == name and result.get("points")]
    curve = []
    for points in zip(*(result["points"] for result in of), strict=False):
        tests = [result["test"] | {"nll_sums": point["nll_sums"]} for result, point in zip(of, points, strict=True)]
        interval = statistics.ratio(_column(tests, "nll_sums"), _column(tests, "num_tokens"), num_resamples=1999)
        step = start + points[0]["step"]
        curve.append({"step": step, "nll": interval.estimate, "low": interval.low, "high": interval.high})
    return curve


def _p(key: str) -> Callable[[dict[str, Any]], str]:
    # No p-value can be less with so many draws; with more of them it might be.
    return lambda row: f"{'<= ' if row[f'{key}_is_least'] else ''}{row[key]:.4f}" if key in row else ""


COLUMNS: Columns = (
    ("method", lambda row: row["method"]),
    ("seeds", lambda row: str(len(row["seeds"]))),
    ("best step", lambda row: " ".join(str(step) for step in row["best_steps"] if step is not None)),
    ("test NLL", lambda row: interval_text(row["test_nll"], plus="")),
    ("NLL - best FFT", lambda row: interval_text(row.get("nll_difference"))),
    ("p", _p("nll_p")),
    ("NLL - best FFT, calibrated", lambda row: interval_text(row.get("tempered_difference"))),
    ("accuracy", lambda row: interval_text(row.get("accuracy"), scale=100, digits=1, plus="")),
    ("accuracy - best FFT", lambda row: interval_text(row.get("accuracy_difference"), scale=100, digits=1)),
    ("p", _p("accuracy_p")),
    ("kept", lambda row: "" if row["kept_share"] is None else f"{100 * row['kept_share']:.3f} %"),
)
"""Of a study's table; accuracy in percent, intervals of 95 %."""
_RUN_COLUMNS: Columns = (
    ("method", lambda run: run["method"]),
    ("seed", lambda run: str(run["seed"])),
    ("test NLL", lambda run: f"{run['test_nll']:.4f}"),
    ("accuracy", lambda run: "" if run["accuracy"] is None else f"{100 * run['accuracy']:.1f}"),
    ("best step", lambda run: str(run.get("best_step", ""))),
    ("steps", lambda run: str(run.get("num_steps", ""))),
    ("validation NLL", lambda run: f"{run['best_validation_loss']:.4f}" if "best_validation_loss" in run else ""),
    ("trained values", lambda run: f"{run['num_trained']:,}" if "num_trained" in run else ""),
    ("min", lambda run: f"{run['seconds'] / 60:.1f}"),
)


def table_of(rows: list[dict[str, Any]], columns: Columns, **around: str) -> PageTable:
    """A row of texts for each of `rows`, with the title and what else stands around them; no column without a text."""
    texts = [[text(row) for _, text in columns] for row in rows]
    return without_empty_columns(PageTable([name for name, _ in columns], texts, **around))


def caption(panel: dict[str, Any]) -> str:
    """What the numbers of a panel are over."""
    n, items = f"n = {panel['n']} test items", "items"
    if panel["n"] != panel["num_items"]:
        n, items = f"n = {panel['n']} problems with {panel['num_items']} test items", "problems"
    return f"{n}; means over seeds, 95 % intervals and p (Holm) over {items}; checkpoints were chosen on validation"


def write_summary(output: Path, summary: dict[str, Any], console: Console) -> None:
    """Write `summary.json`, `table.md`, `figure.png` and `report.html`, and print the tables."""
    tables = [
        table_of(panel["rows"], COLUMNS, title=f"{panel['model']} on {panel['domain']}", caption=caption(panel))
        for panel in summary["panels"]
    ]
    atomic_write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    atomic_write_text(output / "table.md", "\n".join(map(_markdown, tables)))
    pictures = draw_study(summary)
    atomic_write_bytes(output / "figure.png", pictures["png"])
    write_html(output / "report.html", _page(summary, tables, output, pictures["svg"]))
    for table in tables:
        console.print(narrow_table(table, console.width))
    for failure in summary["failed"]:
        console.print(f"failed: {failure['run']}: {failure['error']}", style="red")
    console.print(f"Wrote {output / 'report.html'}, figure.png, table.md and summary.json.")


def _markdown(table: PageTable) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    text = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return f"## {table.title}\n\n{text}\n\n{table.caption}.\n"


def _page(summary: dict[str, Any], of_panels: list[PageTable], output: Path, figure: bytes) -> Page:
    tables = []
    for panel, table in zip(summary["panels"], of_panels, strict=True):
        anchor = f"{panel['model']}-{panel['domain']}"
        linked = [[Link(str(cell), f"#{anchor}") if cell else cell for cell in row] for row in table.rows]
        tables += [replace(table, rows=linked), _runs_table(panel, output, f"Every run: {table.title}", anchor)]
    if summary["failed"]:
        failed = [[Link(f["run"], f"{f['run']}/{FAILED}"), f["error"]] for f in summary["failed"]]
        tables.append(PageTable(("run", "error"), failed, title="Runs that failed"))
    shown = "Test NLL over training steps"
    if any(checked_rows(panel) for panel in summary["panels"]):
        shown += "; accuracy of the chosen checkpoints"
    title, where = f"maskft study: {summary['name']}", "Each number leads to the runs it comes from."
    return Page(title, where, pictures=[Picture(figure.decode(), shown)], tables=tables)


def _runs_table(panel: dict[str, Any], output: Path, title: str, name: str) -> PageTable:
    """Every run of a panel, each number linked to its file, which alone holds the time."""
    runs = [run | {"seconds": read_object(output / run["folder"] / RESULT, _ANEW)["seconds"]} for run in panel["runs"]]
    table = table_of(runs, _RUN_COLUMNS, title=title, name=name)
    rows = []
    for row, run in zip(table.rows, runs, strict=True):
        file = f"{run['folder']}/{RESULT}"
        rows.append([*row[:2], *(Link(str(cell), file) if cell else "" for cell in row[2:])])
    return replace(table, rows=rows)
