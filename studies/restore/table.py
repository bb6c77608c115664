"""Table, numbers and picture of the restore study, from the lines of `study.py`.

    python studies/restore/table.py

Writes `summary.json`, `table.md` and `figure.png` beside `runs.jsonl`. A point of a curve is what a model pays on the
task (nats per token above the fine-tuned one) and the share of the forgetting that it undoes. Intervals are 95 %
percentile bootstraps over test rows, the same draws for all methods, each row with all its seeds.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from maskft.report import interval_text
from maskft.scoring.statistics import paired_ratio_difference

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
NUM_DRAWS, BUDGET, NUM_BETWEEN = 2000, 0.1, 10
RIVALS = ("wise_ft", "size", "ratio", "ties", "dare")  # of prediction (a)
LEARNED = ("mask", "all_weights", "lora")  # their curves begin with the fine-tuned model
NAMES = {
    "wise_ft": "WiSE-FT, 11 points",
    "mask": "mask of the change",
    "all_weights": "all weights",
    "lora": "LoRA",
    "replay": "replay from the start",
    "size": "trimming by change",
    "ratio": "trimming by change / weight",
    "ties": "TIES",
    "dare": "DARE",
    "shuffled": "shuffled mask",
    "drawn": "drawn mask",
}
Array = np.ndarray[Any, Any]
Row = dict[str, Any]


class Draws:
    """How often each test row stands in each resample; the first counts each row once."""

    def __init__(self, fine_tuned: Row) -> None:
        generator = np.random.default_rng(0)
        self.counts, self.tokens = {}, {}
        for name, tokens in fine_tuned["num_tokens"].items():
            drawn = generator.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), NUM_DRAWS)
            self.counts[name] = np.vstack([np.ones(len(tokens)), drawn])
            self.tokens[name] = self.counts[name] @ np.array(tokens)
        before, tuned = (self.nll(point) for point in fine_tuned["curve"])
        self.tuned, self.lost = tuned, tuned["general"] - before["general"]

    def nll(self, point: Row) -> dict[str, Array]:
        """NLL per token of task and general rows, (1 + draws,)."""
        return {name: self.counts[name] @ np.array(sums) / self.tokens[name] for name, sums in point["items"].items()}

    def paid_and_undone(self, point: Row) -> tuple[Array, Array]:
        """What the task pays, and the share undone."""
        nll = self.nll(point)
        return nll["task"] - self.tuned["task"], (self.tuned["general"] - nll["general"]) / self.lost


def undone_within(curve: list[tuple[Array, Array]], price: Array, *, is_joined: bool = True) -> Array:
    """The largest share undone for at most these prices on a curve.

    Args:
        is_joined: whether its points are joined by straight lines, as models between two others can be had.
        price: (prices, 1 + draws), at least 0; staying with the fine-tuned model undoes 0 for 0.

    Returns:
        As `price`.
    """
    paid, undone = (np.stack(part) for part in zip(*curve, strict=True))  # (points, 1 + draws)
    steps = np.linspace(0, 1, NUM_BETWEEN + 1 if is_joined else 2)[:, None, None]
    paid, undone = ((part[:-1] + steps * (part[1:] - part[:-1])).reshape(-1, part.shape[1]) for part in (paid, undone))
    best = np.zeros_like(price)
    for number, limit in enumerate(price):
        best[number] = np.where(paid <= limit + 1e-12, undone, 0.0).max(0).clip(min=0.0)
    return best


def curve_of(draws: Draws, lines: dict[str, Row], name: str) -> list[tuple[Array, Array]]:
    """A method's points from the fine-tuned model on."""
    before, tuned = lines["fine_tuned"]["curve"]
    points = [point for key in (name, f"{name}_at_share") if key in lines for point in lines[key]["curve"]]
    if name in RIVALS:  # by the share kept
        points = sorted(points + [before] * (name == "wise_ft"), key=lambda point: -point["at"])
    points = points if name in LEARNED else [tuned, *points]
    return [draws.paid_and_undone(point) for point in points]


def interval(values: list[Array]) -> Row:
    """Of a statistic by seed, (1 + draws,) each: the mean over seeds."""
    mean = np.mean(values, axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    return {"estimate": float(mean[0]), "low": float(low), "high": float(high)}


def summarise(cells: list[dict[str, Row]]) -> Row:
    """All methods of one model, task and number of general rows, over its seeds."""
    seeds = [(lines, Draws(lines["fine_tuned"])) for lines in cells]
    budget = np.linspace(0, BUDGET, 51)[:, None] + np.zeros((1, NUM_DRAWS + 1))
    ends = [point | {"nll": draws.nll(point)} for lines, draws in seeds for point in lines["fine_tuned"]["curve"]]
    found: Row = {"n": {name: len(of) for name, of in cells[0]["fine_tuned"]["num_tokens"].items()}, "methods": {}}
    for index, name in enumerate(("before", "fine_tuned")):
        own = ends[index::2]
        found[name] = {kind: interval([point["nll"][kind] for point in own]) for kind in ("task", "general")}
        found[name]["right"] = [point["right"].count("1") for point in own]
        found[name]["others"] = [lines["fine_tuned"]["others"][index] for lines in cells]
    for name in NAMES:
        have = [(lines, draws) for lines, draws in seeds if name in lines or f"{name}_at_share" in lines]
        if have:
            curves = [curve_of(draws, lines, name) for lines, draws in have]
            is_joined = name != "replay"
            area = [undone_within(curve, budget, is_joined=is_joined).mean(0) for curve in curves]
            found["methods"][name] = method = chosen(have, name) | {"area": interval(area)}
            if name != "mask" and all("mask" in lines for lines, _ in have):
                pairs = zip(have, curves, strict=True)
                method["mask_above"] = interval([lead(*pair, curve, is_joined) for pair, curve in pairs])
    return found


def lead(lines: dict[str, Row], draws: Draws, curve: list[tuple[Array, Array]], is_joined: bool) -> Array:
    """The share that the chosen mask undoes, minus the largest that a rival undoes for the mask's price or for 0."""
    mask, tuned = lines["mask"], lines["fine_tuned"]["curve"][1]
    paid, undone = draws.paid_and_undone(tuned if mask["chosen"] is None else at_chosen(mask))
    result: Array = undone - undone_within(curve, paid.clip(min=0.0)[None], is_joined=is_joined)[0]
    return result


def at_chosen(line: Row) -> Row:
    return next(point for point in line["curve"] if point["at"] == line["chosen"])


def chosen(have: list[tuple[dict[str, Row], Draws]], name: str) -> Row:
    """What a method ends with: its point that validation chose, the fine-tuned model where that chose none."""
    measured, right, others, told = [], [], [], []
    for lines, draws in have:
        own = [lines[key] for key in (name, f"{name}_at_share") if key in lines]
        # Of two lines of one method, shares that are fixed and that of the mask, the one that validation prefers.
        picked = [line for line in own if line["chosen"] is not None]
        picked.sort(key=lambda line: at_chosen(line)["validation"][1])
        told.append(picked[0] if picked else own[0])
        tuned = lines["fine_tuned"]["curve"][1]
        point = at_chosen(picked[0]) if picked else tuned
        measured.append(draws.paid_and_undone(point))
        right.append([[int(mark) for mark in each["right"]] for each in (tuned, point)])
        others.append(told[-1]["others"])
    without, masked = np.sum(right, axis=0)
    moved = paired_ratio_difference(100 * without, 100 * masked, np.full(len(without), len(have)))
    return {
        "seeds": len(have),
        "undone": interval([undone for _, undone in measured]),
        "paid": interval([paid for paid, _ in measured]),
        "right_moved": {key: getattr(moved, key) for key in ("estimate", "low", "high", "n")},
        "chosen": [line["chosen"] for line in told],
        "settings": [line["settings"] for line in told],
        "others": others,
        "seconds": float(np.mean([line["seconds"] for line in told])),
        "bytes": max(line["bytes"] for line in told),
    }


def table(summary: dict[str, Row]) -> str:
    """All cells as Markdown."""
    text = ["# Restore study: all methods\n\nMade by `table.py`; what the columns mean: [README](README.md).\n"]
    for name, cell in summary.items():
        before, tuned = (
            ", ".join(f"{kind} {cell[key][kind]['estimate']:.3f}" for kind in ("task", "general"))
            for key in ("before", "fine_tuned")
        )
        text.append(
            f"## {name}\n\nNLL per token on {cell['n']['task']} task and {cell['n']['general']} general test rows, "
            f"before fine-tuning: {before}; after it: {tuned}.\n\n"
            "| method | seeds | undone, % | task pays, nats | right answers, points | area, % | mask above, points "
            "| seconds | MB |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        for key, method in cell["methods"].items():
            cells = [NAMES[key], str(method["seeds"])]
            cells += [interval_text(method["undone"], scale=100, digits=0, plus="")]
            cells += [interval_text(method["paid"]), interval_text(method["right_moved"], digits=1)]
            cells += [interval_text(method["area"], scale=100, digits=0, plus="")]
            cells += [interval_text(method.get("mask_above"), scale=100, digits=0)]
            cells += [f"{method['seconds']:.0f}", f"{method['bytes'] / 1e6:.1f}"]
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def draw(cells: dict[str, list[dict[str, Row]]]) -> None:
    """A panel for each cell: its first seed's test losses, the fine-tuned model at the right, and what was chosen."""
    figure, axes = plt.subplots(1, len(cells), figsize=(6 * len(cells), 4.8), layout="constrained", squeeze=False)
    for panel, (title, (lines, *_)) in zip(axes[0], cells.items(), strict=True):
        before, tuned = lines["fine_tuned"]["curve"]
        panel.set(
            title=title.replace(", ", "\n", 1),
            xlabel="task, NLL per token (nats)",
            ylabel="general rows, NLL per token (nats)",
        )
        for number, name in enumerate(NAMES):
            own = [lines[key] for key in (name, f"{name}_at_share") if key in lines]
            points = sorted((p for line in own for p in line["curve"]), key=lambda p: p["at"])
            points = [before, *points, tuned] if name == "wise_ft" else points
            if not points:
                continue
            is_curve = name in ("wise_ft", *LEARNED)
            style = {"linestyle": "-" if is_curve else "none", "marker": "." if is_curve else "x"}
            style |= {
                "color": "black" if name == "wise_ft" else f"C{number}",
                "linewidth": 2.5 if name == "mask" else 1,
            }
            panel.plot([p["task"] for p in points], [p["general"] for p in points], label=NAMES[name], **style)
            for line in own:
                if line["chosen"] is not None:
                    point = at_chosen(line)
                    panel.plot(point["task"], point["general"], "*", markersize=12, color=style["color"])
        panel.plot(tuned["task"], tuned["general"], "o", color="black", label="fine-tuned")
        panel.axhline(before["general"], color="grey", linestyle=":", label="before fine-tuning")
        spread = max(0.05, 0.2 * (before["task"] - tuned["task"]))
        panel.set_xlim(tuned["task"] - spread / 2, tuned["task"] + spread)
        panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(FOLDER / "figure.png", dpi=110)


def main() -> None:
    runs = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text().splitlines()]
    cells: dict[str, list[dict[str, Row]]] = {}
    for model, task, rows in sorted({(run["model"], run["task"], run["rows"]) for run in runs if run["rows"]}):
        here = [run for run in runs if (run["model"], run["task"]) == (model, task) and run["rows"] in (0, rows)]
        for seed in sorted({run["seed"] for run in here if run["rows"]}):
            lines = {run["method"]: run for run in here if run["seed"] == seed}
            cells.setdefault(f"{model}, {task}, {rows} general rows", []).append(lines)
    summary = {name: summarise(found) for name, found in cells.items()}
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (FOLDER / "table.md").write_text(table(summary))
    draw(cells)


if __name__ == "__main__":
    main()
