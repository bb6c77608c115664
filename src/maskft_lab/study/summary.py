"""What the finished runs of a study say: a table with paired differences, the curves, and the pages that show them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from maskft.errors import MaskftError
from maskft.report import Link, Page, PageTable, Picture, interval_text, narrow_table, write_html
from maskft.scoring.statistics import (
    FLIPS_FLOOR,
    by_problem,
    holm,
    paired_ratio_difference,
    ratio,
    share,
    sign_flip_test,
)
from maskft.storage.files import atomic_write_bytes, atomic_write_text
from maskft_lab.study.config import Method, StudyConfig
from maskft_lab.study.figure import checked_rows, draw_study
from maskft_lab.study.plan import FAILED, RESULT, Run

HEADER = (
    "method",
    "seeds",
    "best step",
    "test NLL",
    "NLL - best FFT",
    "p",
    "at own temperatures",
    "accuracy",
    "accuracy - best FFT",
    "p",
    "kept",
)
SEED_HEADER = (
    "method",
    "seed",
    "test NLL",
    "accuracy",
    "best step",
    "steps",
    "validation NLL",
    "trained values",
    "min",
)


def summarise(study: StudyConfig, runs: list[Run]) -> dict[str, Any]:
    """Results by model and domain, from the runs' files alone.

    Means are over seeds; intervals and p-values (sign flips, corrected by Holm's method within a panel) are over the
    test items, each with all its seeds, so they say nothing about seeds that were not run: those stand one by one.
    """
    panels = []
    for model in study.models:
        for domain in study.domains:
            here = [run for run in runs if run.model == model and run.domain == domain]
            results = {(r.method.name, r.seed): _read(r) for r in here if r.is_finished}
            panels.append(_panel(study, model.name, domain.name, here, results))
    failed = [
        {"run": "/".join(run.folder.parts[-4:]), "error": json.loads((run.folder / FAILED).read_text())["error"]}
        for run in runs
        if (run.folder / FAILED).exists() and not run.is_finished
    ]
    return {"name": study.name, "seeds": list(study.seeds), "panels": panels, "failed": failed}


def _read(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run.folder / RESULT).read_text())
    return result


def _panel(
    study: StudyConfig, model: str, domain: str, runs: list[Run], results: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    rows = [row for row in (_row(method, study, results) for method in study.methods) if row is not None]
    for key in ("nll_p", "accuracy_p"):
        tested = [row for row in rows if key in row]
        for row, p in zip(tested, holm([row[key] for row in tested]), strict=True):
            row[key], row[f"{key}_is_least"] = p, row[key] <= FLIPS_FLOOR
    best_steps = [r["best_step"] for (name, _), r in results.items() if name == "fft"]
    start = float(np.mean(best_steps)) if best_steps else 0.0
    return {
        "model": model,
        "domain": domain,
        "n": rows[0]["test_nll"]["n"] if rows else 0,
        "num_items": len(next(iter(results.values()))["test"]["num_tokens"]) if results else 0,
        "best_fft_step": start,
        "rows": rows,
        "curves": {m.name: _curve(m, study, results, 0.0 if m.kind == "fft" else start) for m in study.methods},
        "runs": [
            {"method": run.method.name, "seed": run.seed, "folder": "/".join(run.folder.parts[-4:])}
            | _one(results[run.method.name, run.seed])
            for run in runs
            if (run.method.name, run.seed) in results
        ],
    }


def _one(result: dict[str, Any]) -> dict[str, Any]:
    test = result["test"]
    kept = ("best_step", "num_steps", "best_validation_loss", "num_trained", "rank", "kept_share")
    return {
        "test_nll": sum(test["nll_sums"]) / sum(test["num_tokens"]),
        "accuracy": float(np.mean(test["correct"])) if "correct" in test else None,
    } | {key: result[key] for key in kept if key in result}


def _row(method: Method, study: StudyConfig, results: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any] | None:
    """One method over its finished seeds, against the best FFT of the same seeds."""
    seeds = [seed for seed in study.seeds if (method.name, seed) in results]
    if not seeds:
        return None
    of = [results[method.name, seed] for seed in seeds]
    tests = [result["test"] for result in of]
    tokens = _stack(tests, "num_tokens")
    row: dict[str, Any] = {
        "method": method.name,
        "seeds": seeds,
        "best_steps": [result.get("best_step") for result in of],
        "test_nll": asdict(ratio(_stack(tests, "nll_sums"), tokens)),
        "kept_share": float(np.mean([r["kept_share"] for r in of])) if "kept_share" in of[0] else None,
    }
    has_answers = all("correct" in test for test in tests)
    if has_answers:
        row["accuracy"] = asdict(share(_stack(tests, "correct"), _num_rows(tests))[0])
    # The base model has no seed: it is compared with the best FFT of every seed.
    paired = list(study.seeds) if method.kind == "base" else seeds
    paired = [seed for seed in paired if ("fft", seed) in results]
    if method.name == "fft" or not paired:
        return row
    before = [results["fft", seed]["test"] for seed in paired]
    after = [tests[0]] * len(paired) if method.kind == "base" else [results[method.name, s]["test"] for s in paired]
    old, new, counts = _stack(before, "nll_sums"), _stack(after, "nll_sums"), _stack(after, "num_tokens")
    if not np.array_equal(counts, _stack(before, "num_tokens")):
        raise MaskftError(
            f"{method.name!r} and 'fft' were scored on different tokens of the test rows, by different versions or "
            "settings; delete the older runs' folders."
        )
    row["nll_difference"] = asdict(paired_ratio_difference(old, new, counts))
    row["nll_p"] = sign_flip_test((new - old).sum(0))
    if all("temperature" in test for test in before + after):  # results of earlier versions have none
        row["temperatures"] = [test["temperature"] for test in after]
        old, new = (_stack(tests, "nll_sums_at_temperature") for tests in (before, after))
        row["tempered_difference"] = asdict(paired_ratio_difference(old, new, counts))
    if has_answers:
        old, new = _stack(before, "correct"), _stack(after, "correct")
        row["accuracy_difference"] = asdict(paired_ratio_difference(old, new, _num_rows(after)))
        row["accuracy_p"] = sign_flip_test((new - old).sum(0))
    return row


def _stack(tests: list[dict[str, Any]], key: str) -> "np.ndarray[Any, Any]":
    """A column of several results by problem: (results, problems)."""
    return _of_problems(np.array([test[key] for test in tests], float), tests)


def _num_rows(tests: list[dict[str, Any]]) -> "np.ndarray[Any, Any]":
    return _of_problems(np.ones((len(tests), len(tests[0]["num_tokens"]))), tests)


def _of_problems(values: "np.ndarray[Any, Any]", tests: list[dict[str, Any]]) -> "np.ndarray[Any, Any]":
    # The turns of one conversation are one problem; where there are none, a result names no problems.
    problems = tests[0].get("problems")
    return values if problems is None else by_problem(values, problems)


def _curve(
    method: Method, study: StudyConfig, results: dict[tuple[str, int], dict[str, Any]], start: float
) -> list[dict[str, float]]:
    """Test NLL at each checkpoint, the mean over seeds with its interval; `step` counts from the base model."""
    of = [results[method.name, seed] for seed in study.seeds if (method.name, seed) in results]
    of = [result for result in of if result.get("points")]
    if not of:
        return []
    tests = [result["test"] for result in of]
    tokens = _stack(tests, "num_tokens")
    curve = []
    for points in zip(*(result["points"] for result in of), strict=False):
        sums = _of_problems(np.array([point["nll_sums"] for point in points], float), tests)
        interval = ratio(sums, tokens, num_resamples=1999)
        step = points[0]["step"]
        curve.append({"step": start + step, "nll": interval.estimate, "low": interval.low, "high": interval.high})
    return curve


def table_rows(panel: dict[str, Any]) -> list[list[str]]:
    """One list of texts for each method, in the order of `HEADER`; accuracy in percent, intervals of 95 %."""
    return [
        [
            row["method"],
            str(len(row["seeds"])),
            " ".join(str(step) for step in row["best_steps"] if step is not None),
            interval_text(row["test_nll"], plus=""),
            interval_text(row.get("nll_difference")),
            _p(row, "nll_p"),
            interval_text(row.get("tempered_difference")),
            interval_text(row.get("accuracy"), scale=100, digits=1, plus=""),
            interval_text(row.get("accuracy_difference"), scale=100, digits=1),
            _p(row, "accuracy_p"),
            "" if row["kept_share"] is None else f"{100 * row['kept_share']:.3f} %",
        ]
        for row in panel["rows"]
    ]


def _p(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    # No p-value can be less with so many draws; with more of them it might be.
    return ("<= " if row[f"{key}_is_least"] else "") + f"{row[key]:.4f}"


def caption(panel: dict[str, Any]) -> str:
    """What the numbers of a panel are over."""
    n, items = f"n = {panel['n']} test items", "items"
    if panel["n"] != panel["num_items"]:
        n, items = f"n = {panel['n']} problems with {panel['num_items']} test items", "problems"
    return f"{n}; means over seeds, 95 % intervals and p (Holm) over {items}; checkpoints were chosen on validation"


def write_summary(output: Path, summary: dict[str, Any], console: Console) -> None:
    """Write `summary.json`, `table.md`, `figure.png`, `figure.svg` and `report.html`, and print the tables."""
    atomic_write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    atomic_write_text(output / "table.md", _markdown(summary))
    pictures = draw_study(summary)
    for suffix, content in pictures.items():
        atomic_write_bytes(output / f"figure.{suffix}", content)
    write_html(output / "report.html", _page(summary, output, pictures["svg"]))
    for panel in summary["panels"]:
        table = narrow_table(_title(panel), HEADER, table_rows(panel))
        table.caption = caption(panel)
        console.print(table)
    for failure in summary["failed"]:
        console.print(f"failed: {failure['run']}: {failure['error']}", style="red", highlight=False, markup=False)
    console.print(
        f"Wrote {output / 'report.html'}, figure.png, figure.svg, table.md and summary.json.", highlight=False
    )


def _title(panel: dict[str, Any]) -> str:
    return f"{panel['model']} on {panel['domain']}"


def _markdown(summary: dict[str, Any]) -> str:
    parts = []
    for panel in summary["panels"]:
        lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table_rows(panel)]
        parts.append(f"## {_title(panel)}\n\n" + "\n".join(lines) + f"\n\n{caption(panel)}.\n")
    return "\n".join(parts)


def _page(summary: dict[str, Any], output: Path, figure: bytes) -> Page:
    tables = []
    for panel in summary["panels"]:
        anchor = f"{panel['model']}-{panel['domain']}"
        linked = [[Link(cell, f"#{anchor}") if cell else cell for cell in row] for row in table_rows(panel)]
        tables.append(PageTable(HEADER, linked, title=_title(panel), caption=caption(panel)))
        rows = []
        for run in panel["runs"]:
            result = f"{run['folder']}/{RESULT}"
            values = (
                f"{run['test_nll']:.4f}",
                "" if run["accuracy"] is None else f"{100 * run['accuracy']:.1f}",
                str(run.get("best_step", "")),
                str(run.get("num_steps", "")),
                f"{run['best_validation_loss']:.4f}" if "best_validation_loss" in run else "",
                f"{run['num_trained']:,}" if "num_trained" in run else "",
                f"{json.loads((output / result).read_text())['seconds'] / 60:.1f}",
            )
            cells = [Link(value, result) if value else "" for value in values]
            rows.append([run["method"], str(run["seed"]), *cells])
        tables.append(PageTable(SEED_HEADER, rows, title=f"Every run: {_title(panel)}", name=anchor))
    if summary["failed"]:
        failed = [[Link(f["run"], f"{f['run']}/{FAILED}"), f["error"]] for f in summary["failed"]]
        tables.append(PageTable(("run", "error"), failed, title="Runs that failed"))
    shown = "Test NLL over training steps"
    if any(checked_rows(panel) for panel in summary["panels"]):
        shown += "; accuracy of the chosen checkpoints"
    return Page(
        title=f"maskft study: {summary['name']}",
        caption="Each number leads to the runs it comes from.",
        pictures=[Picture(figure.decode(), shown)],
        tables=tables,
    )
