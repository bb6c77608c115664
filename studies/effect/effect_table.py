"""Tables of the effect study: every run against the best FFT, over seeds, with paired intervals over items.

    python studies/effect/effect_table.py runs/effect/maths runs/explore --output_dir results
    python studies/effect/effect_table.py studies/effect/runs/*.jsonl --output_dir results

For each folder of `compare.py`, or file with a run a line (`cat FOLDER/seed*/*.json`): mean change in NLL per token
against the best FFT (of a fold's mask, against that fold's FFT), with its 95 % interval over items (each with all its
seeds) and its sign-flip p-value, on validation and, where a run was scored there, on the test rows, there also with
each model at its own temperature, and in right answers. Writes `summary.json`, `table.md` (first the methods against
models and domains, then every run) and `figure.png`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from maskft.scoring.statistics import holm, paired_ratio_difference, sign_flip_test

mpl.use("Agg")
from matplotlib import pyplot as plt

MEASURES = {
    "validation": "validation NLL per token",
    "test": "test NLL per token",
    "tempered": "test NLL per token, each at its own temperature",
    "right": "right answers, percent of the test rows",
}
OVERVIEWS = ("test", "tempered", "right")
_LEAST_RIGHT = 10  # percent that the best FFT has right where a domain can tell methods apart by it

# What the methods are called in the table of models and domains, and their runs.
METHODS = {
    "FFT continued": "fft_continued",
    "LoRA": "lora",
    "LoRA, a fifth of its rate": "lora-slower",
    "random mask of the change": "change-start-0.9",
    "as many of the smallest changes (magnitude)": "crossfit-magnitude",
    "all changes scaled by 0.9": "scaled-0.9",
    "average of the folds' fine-tunings and the best": "soup",
    "average of three seeds' best fine-tunings": "soup-seeds",
    "shuffled mask": "crossfit-shuffled",
    "MFT, the paper's recipe": "paper",
    "MFT on the fine-tuning's own rows": "change-keep",
    "MFT, cross-fitted (recommended)": "crossfit",
    "MFT, cross-fitted at the folds' temperature": "crossfit-tempered",
    "MFT, cross-fitted on probabilities (DFT)": "crossfit-dft",
    "voted mask, shuffled": "crossfit-vote-shuffled",
    "MFT, three cross-fitted masks voted": "crossfit-vote",
    "MFT, three of the folds' temperature voted": "crossfit-tempered-vote",
    "that vote over the average of three seeds": "crossfit-tempered-vote-soup",
    "MFT, three voted over the average of three seeds": "crossfit-vote-soup",
    "average of all fine-tunings that the vote needs": "soup-all",
    "MFT, one mask over the average of three seeds": "crossfit-soup",
    "average of six seeds' best fine-tunings": "soup-six",
    "average of nine seeds' best fine-tunings": "soup-nine",
    "MFT, three voted over the average of nine seeds": "crossfit-vote-nine",
}
# Runs that are set against each other.
PAIRS = {
    "cross-fitted minus shuffled": ("crossfit", "crossfit-shuffled"),
    "cross-fitted minus the average of three seeds": ("crossfit", "soup-seeds"),
    "voted minus the average of three seeds": ("crossfit-vote", "soup-seeds"),
    "voted over the average of three seeds, minus that average": ("crossfit-vote-soup", "soup-seeds"),
    "voted over the average of three seeds, minus the average of six": ("crossfit-vote-soup", "soup-six"),
    "voted over the average of three seeds, minus the average of nine": ("crossfit-vote-soup", "soup-nine"),
    "voted over the average of nine seeds, minus that average": ("crossfit-vote-nine", "soup-nine"),
    "one mask over the average of three seeds, minus the average of six": ("crossfit-soup", "soup-six"),
    "one mask over the average of three seeds, minus the average of nine": ("crossfit-soup", "soup-nine"),
    "at the folds' temperature minus cross-fitted": ("crossfit-tempered", "crossfit"),
    "three of the folds' temperature voted, minus three voted": ("crossfit-tempered-vote", "crossfit-vote"),
    "that vote over the average of three seeds, minus that average": ("crossfit-tempered-vote-soup", "soup-seeds"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    summary = {path.name.removesuffix(".jsonl"): summarise(path) for path in given.runs}
    given.output_dir.mkdir(parents=True, exist_ok=True)
    (given.output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    overviews = [overview(summary, measure) for measure in OVERVIEWS]
    text = "\n\n".join([*filter(None, overviews), *(table(name, rows["runs"]) for name, rows in summary.items())])
    (given.output_dir / "table.md").write_text(text + "\n")
    print(text)
    draw(summary, given.output_dir / "figure.png")


def summarise(path: Path) -> dict[str, Any]:
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(path.glob("seed*/*.json")) if path.is_dir() else [path]:
        for line in file.read_text().splitlines():
            result = json.loads(line)
            runs.setdefault(result["settings"]["name"], {})[result["seed"]] = result
    rows = [row(name, seeds, runs) for name, seeds in runs.items()]
    for measure in OVERVIEWS:
        compared = [r for r in rows if "difference" in r.get(measure, {})]
        for r, p in zip(compared, holm([r[measure]["p"] for r in compared]), strict=True):
            r[measure]["p_holm"] = p
    pairs = {
        name: {m: difference(runs.get(ours, {}), runs.get(theirs, {}), m) for m in MEASURES}
        for name, (ours, theirs) in PAIRS.items()
    }
    return {"runs": rows, "pairs": pairs}


def row(name: str, seeds: dict[int, dict[str, Any]], runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    any_run = next(iter(seeds.values()))
    found: dict[str, Any] = {
        "name": name,
        "seeds": sorted(seeds),
        "seconds": [run["seconds"] for _, run in sorted(seeds.items())],
    }
    if "left_out" in any_run:
        found["left_out"] = [run["left_out"] for _, run in sorted(seeds.items())]
    start = any_run["settings"]["start"]
    against = start if start.startswith("fft-without") else "fft"
    for measure in MEASURES:
        scored = [values(seeds[seed], measure) for seed in sorted(seeds)]
        means = [round(float(v[0].sum() / v[1].sum()), 5) for v in scored if v is not None]
        if not means:
            continue
        found[measure] = {"mean": means}
        if measure == "tempered":
            runs_with = [seeds[seed] for seed in sorted(seeds) if "tempered" in seeds[seed]]
            found[measure]["inverse_temperature"] = [run["tempered"]["inverse_temperature"] for run in runs_with]
        if name != against and any_run["settings"]["kind"] != "base":
            found[measure] |= difference(seeds, runs.get(against, {}), measure)
    return found


def values(run: dict[str, Any], measure: str) -> tuple[np.ndarray, np.ndarray] | None:
    """For each item of a run what a measure sums, and by how much it is divided; nothing where it was not taken."""
    if measure == "right":
        right = run.get("test", {}).get("right")
        return right and (100 * np.array(right), np.ones(len(right)))
    if measure not in run:
        return None
    scored = run["test" if measure == "tempered" else measure]
    return np.array(run[measure]["sums"]), np.array(scored["num_tokens"])


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], measure: str) -> dict[str, Any]:
    """Of two runs on the items of a measure, over the seeds that both have; nothing where they share none."""
    pairs = [
        (values(ours[seed], measure), values(theirs[seed], measure)) for seed in sorted(ours.keys() & theirs.keys())
    ]
    both = [(new, old) for new, old in pairs if new is not None and old is not None]
    if not both:
        return {}
    new, old = (np.array([pair[which][0] for pair in both]) for which in (0, 1))
    counts = np.array([pair[0][1] for pair in both])
    interval = paired_ratio_difference(old, new, counts)
    by_seed = (new - old).sum(1) / counts.sum(1)
    return {
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "num_seeds": len(both),
        "by_seed": by_seed.round(5).tolist(),
        "p": sign_flip_test((new - old).sum(0)),
    }


def overview(summary: dict[str, dict[str, Any]], measure: str) -> str:
    by_name = {folder: {r["name"]: r for r in found["runs"]} for folder, found in summary.items()}
    # A folder of trials on validation has no column.
    by_name = {name: runs for name, runs in by_name.items() if measure in runs.get("crossfit", {})}
    if measure == "right":
        by_name = {name: r for name, r in by_name.items() if np.mean(r["fft"]["right"]["mean"]) >= _LEAST_RIGHT}
    if not by_name:
        return ""
    columns = list(by_name.values())
    lines = [f"| {MEASURES[measure]} | {' | '.join(by_name)} |", f"|---|{'---:|' * len(columns)}"]
    digits = 1 if measure == "right" else 4

    def line(name: str, cells: list[str]) -> None:
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cell or 'not yet measured' for cell in cells)} |")

    def seeds(count: int) -> str:
        return f"{count} seed{'s' if count > 1 else ''}"

    before = [column.get("base", {}).get(measure, {}).get("mean") for column in columns]
    line("before fine-tuning", [f"{np.mean(mean):.{digits}f}" if mean else "" for mean in before])
    best = [column["fft"][measure]["mean"] for column in columns]
    line("best FFT", [f"{np.mean(mean):.{digits}f} ({seeds(len(mean))})" for mean in best])
    found = {
        f"{name}, minus best FFT": [column.get(run, {}).get(measure, {}) for column in columns]
        for name, run in METHODS.items()
    }
    found |= {name: [summary[folder]["pairs"][name][measure] for folder in by_name] for name in PAIRS}
    for name, cells in found.items():
        line(
            name,
            [
                f"{v['difference']:+.{digits}f} [{v['low']:+.{digits}f}, {v['high']:+.{digits}f}]"
                + ("" if v["num_seeds"] == len(mean) else f" ({seeds(v['num_seeds'])})")
                if "difference" in v
                else ""
                for v, mean in zip(cells, best, strict=True)
            ],
        )
    return "\n".join(lines)


def table(name: str, rows: list[dict[str, Any]]) -> str:
    measures = [m for m in MEASURES if any(m in r for r in rows)]
    lines = [
        f"### {name}",
        "",
        f"| run | left out | {' | '.join(f'{m} - best FFT' for m in measures)} | p (Holm): {', '.join(measures[1:])} |",
        f"|---|---:|{'---:|' * len(measures)}---|",
    ]
    for r in sorted(rows, key=lambda r: r.get("validation", {}).get("difference", -9.0)):
        cells = [r["name"], f"{100 * np.mean(r['left_out']):.3f} %" if "left_out" in r else ""]
        for measure in measures:
            v = r.get(measure, {})
            digits = 1 if measure == "right" else 4
            if "difference" in v:
                cells.append(f"{v['difference']:+.{digits}f} [{v['low']:+.{digits}f}, {v['high']:+.{digits}f}]")
            else:
                cells.append(f"({np.mean(v['mean']):.{digits}f})" if v else "")
        tests = [r.get(measure, {}) for measure in measures[1:]]
        cells.append(", ".join(f"{v['p']:.3f} ({v['p_holm']:.3f})" if "p" in v else "-" for v in tests))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(summary: dict[str, dict[str, Any]], path: Path) -> None:
    panels = {name: [r for r in s["runs"] if "difference" in r.get("validation", {})] for name, s in summary.items()}
    tallest = max(len(rows) for rows in panels.values())
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    size = (6.5 * num_columns, (0.27 * tallest + 1.2) * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=False):
        rows = sorted(rows, key=lambda r: -r["validation"]["difference"])
        for place, r in enumerate(rows):
            for split, colour, shift in (("validation", "tab:blue", 0.15), ("test", "tab:orange", -0.15)):
                v = r.get(split, {})
                if "difference" in v:
                    axis.plot([v["low"], v["high"]], [place + shift] * 2, color=colour)
                    axis.plot(v["difference"], place + shift, "o", color=colour, markersize=4)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=8)
        axis.set(title=name, xlabel="NLL per token - best FFT (validation blue, test orange)")
        middle = sorted(abs(r["validation"]["difference"]) for r in rows)[len(rows) // 2]
        axis.set_xscale("symlog", linthresh=max(0.005, middle))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
