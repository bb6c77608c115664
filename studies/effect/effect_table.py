"""Tables of the effect study: every run against the best FFT, over seeds, with paired intervals over items.

    python studies/effect/effect_table.py runs/effect/maths runs/explore --output_dir results --page README.md

For each folder of `compare.py`: mean change in NLL per token against the run that each started from, with its 95 %
interval over items (each with all its seeds) and its sign-flip p-value, on validation and, where a run was scored
there, on the test rows. Writes `summary.json`, `table.md` (first the methods against models and domains, then every
run) and `figure.png`. With --page, the first table also goes into that file, between its lines `<!-- overview -->`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from maskft.evaluation.statistics import holm, paired_ratio_difference, sign_flip_test

mpl.use("Agg")
from matplotlib import pyplot as plt

OVERVIEW = "<!-- overview -->\n"

# What the methods are called in the table of models and domains, and their runs.
METHODS = {
    "FFT continued": "fft_continued",
    "LoRA": "lora",
    "random mask of the change": "change-start-0.9",
    "as many of the smallest changes (magnitude)": "crossfit-magnitude",
    "all changes scaled by 0.9": "scaled-0.9",
    "average of the folds' fine-tunings and the best": "soup",
    "average of three seeds' best fine-tunings": "soup-seeds",
    "shuffled mask": "crossfit-shuffled",
    "MFT, the paper's recipe": "paper",
    "MFT on the fine-tuning's own rows": "change-keep",
    "MFT, cross-fitted (recommended)": "crossfit",
    "voted mask, shuffled": "crossfit-vote-shuffled",
    "MFT, three cross-fitted masks voted": "crossfit-vote",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    summary = {folder.name: summarise(folder) for folder in given.folders}
    given.output_dir.mkdir(parents=True, exist_ok=True)
    (given.output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    overall = overview(summary)
    text = "\n\n".join([overall, *(table(name, rows) for name, rows in summary.items())])
    (given.output_dir / "table.md").write_text(text + "\n")
    print(text)
    if given.page:
        before, _, after = given.page.read_text().split(OVERVIEW)
        given.page.write_text(f"{before}{OVERVIEW}{overall}\n{OVERVIEW}{after}")
    draw(summary, given.output_dir / "figure.png")


def summarise(folder: Path) -> list[dict[str, Any]]:
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("seed*/*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(path.stem, {})[result["seed"]] = result
    rows = [row(name, seeds, runs) for name, seeds in runs.items()]
    tested = [r for r in rows if "difference" in r.get("test", {})]
    for r, p in zip(tested, holm([r["test"]["p"] for r in tested]), strict=True):
        r["test"]["p_holm"] = p
    return rows


def row(name: str, seeds: dict[int, dict[str, Any]], runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    any_run = next(iter(seeds.values()))
    found: dict[str, Any] = {
        "name": name,
        "seeds": sorted(seeds),
        "settings": any_run["settings"],
        "seconds": [run["seconds"] for _, run in sorted(seeds.items())],
    }
    if "left_out" in any_run:
        found["left_out"] = [run["left_out"] for _, run in sorted(seeds.items())]
    start = runs.get(any_run["settings"]["start"], {})
    for split in ("validation", "test"):
        both = [seed for seed in sorted(seeds) if split in seeds[seed]]
        if not both:
            continue
        found[split] = {"nll": [round(seeds[seed][split]["nll"], 5) for seed in both]}
        if name == any_run["settings"]["start"] or any_run["settings"]["kind"] == "base":
            continue
        found[split] |= difference(seeds, start, split)
        if name == "crossfit":
            found[split]["against_shuffled"] = difference(seeds, runs.get("crossfit-shuffled", {}), split)
    return found


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], split: str) -> dict[str, Any]:
    """Of two runs on the items of a split, over the seeds that both have; nothing where they share none."""
    both = [seed for seed in sorted(ours) if split in ours[seed] and seed in theirs and split in theirs[seed]]
    if not both:
        return {}
    new, old = (np.array([group[seed][split]["sums"] for seed in both]) for group in (ours, theirs))
    counts = np.array([ours[seed][split]["num_tokens"] for seed in both])
    interval = paired_ratio_difference(old, new, counts)
    return {
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "num_seeds": len(both),
        "by_seed": [round(float((a - b).sum() / c.sum()), 5) for a, b, c in zip(new, old, counts, strict=True)],
        "p": sign_flip_test((new - old).sum(0)),
    }


def overview(summary: dict[str, list[dict[str, Any]]]) -> str:
    by_name = {folder: {r["name"]: r for r in rows} for folder, rows in summary.items()}
    # A folder of trials on validation has no column.
    by_name = {folder: rows for folder, rows in by_name.items() if "test" in rows.get("crossfit", {})}
    columns = list(by_name.values())
    lines = [f"| test NLL per token | {' | '.join(by_name)} |", f"|---|{'---:|' * len(columns)}"]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def seeds(count: int) -> str:
        return f"{count} seed{'s' if count > 1 else ''}"

    best = []
    for column in columns:
        by_seed = dict(zip(column["fft"]["seeds"], column["fft"]["test"]["nll"], strict=True))
        best.append([by_seed[seed] for seed in column["crossfit"]["seeds"]])
    before = [column.get("base", {}).get("test", {}).get("nll") for column in columns]
    line("before fine-tuning", [f"{np.mean(nll):.4f}" if nll else "not yet measured" for nll in before])
    line("best FFT", [f"{np.mean(nll):.4f} ({seeds(len(nll))})" for nll in best])
    found = {
        f"{name}, minus best FFT": [column.get(run, {}).get("test", {}) for column in columns]
        for name, run in METHODS.items()
    }
    found["cross-fitted minus shuffled"] = [
        column.get("crossfit", {}).get("test", {}).get("against_shuffled", {}) for column in columns
    ]
    for name, values in found.items():
        line(
            name,
            [
                f"{v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]"
                + ("" if v["num_seeds"] == len(nll) else f" ({seeds(v['num_seeds'])})")
                if "difference" in v
                else "not yet measured"
                for v, nll in zip(values, best, strict=True)
            ],
        )
    return "\n".join(lines)


def table(name: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"### {name}",
        "",
        "| run | left out | validation - start | seeds | test - start | p | p (Holm) |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: r.get("validation", {}).get("difference", -9.0)):
        left_out = f"{100 * np.mean(r['left_out']):.3f} %" if "left_out" in r else ""
        cells = [r["name"], left_out]
        for split in ("validation", "test"):
            v = r.get(split, {})
            if "difference" in v:
                cells.append(f"{v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]")
            else:
                cells.append(f"(NLL {np.mean(v['nll']):.4f})" if v else "")
            if split == "validation":
                cells.append(" ".join(f"{d:+.4f}" for d in v.get("by_seed", [])))
        test = r.get("test", {})
        cells += [f"{test[key]:.3f}" if key in test else "" for key in ("p", "p_holm")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(summary: dict[str, list[dict[str, Any]]], path: Path) -> None:
    panels = {name: [r for r in rows if "difference" in r.get("validation", {})] for name, rows in summary.items()}
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
