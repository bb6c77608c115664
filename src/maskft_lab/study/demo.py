"""`maskft demo`: a study of one seed that fine-tunes a real small model, learns a mask over it, and compares."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from rich.console import Console

from maskft.report import Page, interval_text, narrow_table, training_curves, write_html
from maskft.scoring.statistics import mcnemar_exact
from maskft.storage.environment import versions
from maskft.storage.files import atomic_write_text, require_empty_output, require_free_space, require_writable
from maskft.storage.yaml_file import read_yaml
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.reasoning.sums import build_task
from maskft_lab.study.config import StudyConfig, parse_study
from maskft_lab.study.methods import ADAPTER, MODEL, perform
from maskft_lab.study.plan import plan_runs
from maskft_lab.study.summary import Columns, Result, differences, method_row, table_of

RECIPE: dict[str, Any] = read_yaml(Path(__file__).with_name("demo.yaml"), "The demo's file")
_NAMES = {"base": "base", "fft": "best FFT", "fft_continued": "FFT continued", "shuffled": "random mask", "mft": "MFT"}
_KEPT = ("train_seconds", "share_left_out", "file_bytes")
COLUMNS: Columns = (
    ("model", lambda row: row["name"]),
    ("test NLL", lambda row: f"{row['nll']['estimate']:.4f}"),
    ("NLL - best FFT", lambda row: interval_text(row.get("nll_difference"))),
    ("accuracy", lambda row: interval_text(row["accuracy"], scale=100, digits=1, plus="")),
    ("accuracy - best FFT", lambda row: interval_text(row.get("accuracy_difference"), scale=100, digits=1)),
    ("McNemar p", lambda row: f"{row['mcnemar_p']:.3f}" if "mcnemar_p" in row else ""),
    ("train s", lambda row: f"{row['train_seconds']:.0f}" if "train_seconds" in row else ""),
    ("left out", lambda row: f"{100 * row['share_left_out']:.3f} %" if "share_left_out" in row else ""),
    ("file", lambda row: f"{row['file_bytes'] / 1e6:.1f} MB" if "file_bytes" in row else ""),
)
"""Of the demo's table; accuracy in percent, intervals of 95 %."""
# On a terminal of 80 columns the last two stand below each other.
_NARROW_COLUMNS = (*COLUMNS[:-2], ("left out, file", lambda row: "\n".join(f(row) for _, f in COLUMNS[-2:]).strip()))
CONTROL_COLUMNS: Columns = (
    ("MFT minus", lambda row: row["name"]),
    ("test NLL", lambda row: interval_text(row["nll_difference"])),
    ("accuracy", lambda row: interval_text(row["accuracy_difference"], scale=100, digits=1)),
    ("McNemar p", lambda row: f"{row['mcnemar_p']:.3f}"),
)
"""Of MFT against each of the others, paired."""


def run_demo(
    output_dir: Path, *, overwrite: bool = False, console: Console, recipe: dict[str, Any] | None = None
) -> None:
    """Run the whole comparison, print its table, and write `report.json`, `report.html`, `mask/` and `fft-best/`.

    Raises:
        MaskftError: the output folder holds a run or cannot be one, the disk is too small, or the model cannot be had.
    """
    started = time.perf_counter()
    require_writable(output_dir)
    if not overwrite:
        require_empty_output(output_dir, what="the demo", or_else="write over it with --overwrite_output_dir")
    require_free_space(output_dir, 3 * 10**9, "the demo")
    disable_progress_bar()
    fetch_demo_model(console=console)
    study = parse_study(recipe or RECIPE, "the demo")
    results = _carry_out(study, output_dir, console)
    report = _report(study, results, time.perf_counter() - started)
    atomic_write_text(output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    tables = [table_of(report["models"], COLUMNS), table_of(report["controls"], CONTROL_COLUMNS)]
    around = {key: report[key] for key in ("title", "caption")}
    details = {"Sample answers": report["samples"], "Settings, versions and data": report["settings"]}
    page = Page(**around, tables=tables, curves=report["curves"], details=details)
    write_html(output_dir / "report.html", page)
    console.print(narrow_table(table_of(report["models"], _NARROW_COLUMNS, **around)))
    console.print(narrow_table(replace(tables[1], title="MFT against its controls")))
    console.print(f"Wrote {output_dir / 'report.html'} and report.json; the adapter is in {output_dir / 'mask'}.")


def _carry_out(study: StudyConfig, output_dir: Path, console: Console) -> dict[str, Result]:
    """The study's results by method; the fine-tuned model and the adapter are left in folders of their own."""
    work, best, mask = output_dir / "study", output_dir / "fft-best", output_dir / "mask"
    for folder in (work, best, mask):
        shutil.rmtree(folder, ignore_errors=True)
    results: dict[str, Result] = {}
    runs = {run.method.name: run for run in plan_runs(study, work)}
    try:
        for name, run in runs.items():
            console.rule(_NAMES[name])
            run.folder.mkdir(parents=True)
            results[name] = perform(run)
            test = results[name]["test"]
            nll, accuracy = sum(test["nll_sums"]) / sum(test["num_tokens"]), 100 * np.mean(test["correct"])
            console.print(f"{_NAMES[name]}: test NLL {nll:.4f}, accuracy {accuracy:.1f} %")
        (runs["fft"].folder / MODEL).rename(best)
        (runs["mft"].folder / ADAPTER).rename(mask)
    finally:  # none of it is of use to another start
        shutil.rmtree(work, ignore_errors=True)
    config = json.loads((mask / "adapter_config.json").read_text(encoding="utf-8")) | {
        "base_model_name_or_path": str(best)
    }
    atomic_write_text(mask / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    size = (mask / "adapter_model.safetensors").stat().st_size
    for name in ("mft", "shuffled"):
        results[name] |= {"share_left_out": 1 - results[name]["kept_share"], "file_bytes": size}
    return results


def _report(study: StudyConfig, results: dict[str, Result], seconds: float) -> dict[str, Any]:
    task = build_task(**study.domains[0].generated or {})
    by_seed = {(name, study.seeds[0]): result for name, result in results.items()}
    rows = {name: method_row(study.method(name), study, by_seed) or {} for name in _NAMES}
    best, mask = results["fft"]["test"], results["mft"]["test"]
    return {
        "title": "maskft demo: SmolLM2-135M-Instruct on sums",
        "caption": f"n = {len(task.test)} test items, one seed; [95 % intervals: Wilson's of accuracies, else a "
        f"bootstrap over items]; {seconds:.0f} s in all.",
        "models": [
            {"name": _NAMES[name], "nll": row["test_nll"], "accuracy": row["accuracy"]}
            | {key: results[name][key] for key in _KEPT if key in results[name]}
            | ({} if name == "fft" else _difference(best, results[name]["test"]))
            for name, row in rows.items()
        ],
        "controls": [
            {"name": _NAMES[other]} | _difference(results[other]["test"], mask) for other in _NAMES if other != "mft"
        ],
        "curves": training_curves({_NAMES[name]: r["log"] for name, r in results.items() if "log" in r}),
        "samples": [
            {"question": entry["question"], "right": entry["answer"]}
            | {_NAMES[name]: results[name]["answers"][i] for name in _NAMES}
            for i, entry in enumerate(task.test["entry"][: len(results["base"]["answers"])])
        ],
        "settings": {
            "study": asdict(study),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "data": results["base"]["data"],
        },
    }


def _difference(before: Result, after: Result) -> dict[str, Any]:
    """What `after` has more than `before`, paired over the test items."""
    found = differences("the demo", [before], [after])
    right = [np.array(test["correct"], bool) for test in (before, after)]
    return {key: found[key] for key in ("nll_difference", "accuracy_difference")} | {"mcnemar_p": mcnemar_exact(*right)}
