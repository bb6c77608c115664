"""The effect study's runs: plain fine-tuning, its controls, and recipes of mask learning, on equal budgets.

    python studies/effect/compare.py --config studies/effect/maths.yaml --output_dir runs/maths

A plain loop in which every idea is a switch, so that only what helps has to enter the package. What lies below the
lowest masked layer is computed once for each row, since it never changes; on a CPU that decides what can be tried at
all. Each seed and run gives one JSON file; what is finished is not run again. Runs choose their checkpoint on
validation; the test rows are scored only where a run asks for it, and then a second time at the temperature that the
validation rows choose (Guo et al., arXiv 1706.04599), since a model that is merely less sure of itself has a lower
loss too.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import yaml
from effect_run import Below, Rows, Run
from transformers import AutoTokenizer

from maskft.data.tokens import RowTokeniser
from maskft.storage.files import atomic_write_text
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.study.config import parse_study
from maskft_lab.study.methods import load_domain

OVER_ONE_MASK = ("carried", "random", "shuffled", "magnitude")
"""Kinds of runs whose mask is of the same weights, with the same first scores, as that of the run `of`."""

WITHOUT_TRAINING = ("base", "scaled", "soup", "start", "vote", *OVER_ONE_MASK)

DEFAULTS: dict[str, Any] = {
    # base, fft, fft_continued, lora, scaled, soup, mft, carried, start, vote, random, shuffled, magnitude
    "kind": "mft",
    "test": False,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "batch_size": 8,
    "optimizer": "adam",  # or momentum: a score moves by the size of its gradient, in units of all gradients' first RMS
    "num_evaluations": 2,
    # of a mask
    "layers": [4, 5, 6, 7],  # null: all
    "selection": "threshold",
    "density": 0.9,
    "init_scores": "keep_all",
    "init_std": 0.02,
    "ramp": 0.0,  # share of the steps in which the density comes down from 1, as a cubic (arXiv 1710.01878)
    "steadiness": 0.0,  # a weight may leave only where |mean g| is at least this share of the root mean square of g
    "max_flips": 0.0,  # largest share of the weights that may flip in one step
    "penalty": 0.0,  # nats per token that a weight left out has to bring
    "kl": 0.0,  # weight of the KL divergence from the unmasked model
    "label_smoothing": 0.0,
    "dropout": 0.0,  # of attention weights, while training
    "vote_checkpoints": False,  # a mask is what most of those at the evaluations say, and not the best of them
    "tempered": False,  # the loss is taken at the temperature that the rows to learn on choose at the start
    "dft": False,  # each token's loss times its probability: the gradient is that of the probability (arXiv 2508.05629)
    "reference": "zero",  # or pretrained: what is left out is the change that fine-tuning made to the weight
    "of": None,  # the mask that is carried over or that a control is matched to; masks that vote; models of a soup
    "folds": 0,  # the training rows in so many parts, dealt in turn
    "fold": 0,  # a mask trains on this part, and an FFT on all the others
    "scores_of": None,  # the run whose scores a mask goes on with
    "scale": 0.9,  # share of fine-tuning's change that is kept of every weight (WiSE-FT, arXiv 2109.01903)
    "start": "fft",  # name of the run that it starts from
    "way": 1.0,  # share of the way from the first scores to the learned ones at which a mask is carried over
    "save": False,  # whether a mask is kept as an adapter, for `maskft eval`, and a soup as a model
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", help="Names of runs.")
    parser.add_argument(
        "--again", action="store_true", help="Score finished runs again whose model can be had without training."
    )
    given = parser.parse_args()
    content = yaml.safe_load(given.config.read_text())
    base, rows = base_and_rows(content, str(given.config))
    for seed in given.seeds or content["seeds"]:
        folder = given.output_dir / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        below: Below = {}
        for name, own in content["runs"].items():
            path = folder / f"{name}.json"
            settings = {
                key: _number(value)
                for key, value in (DEFAULTS | content.get("defaults", {}) | {"name": name} | (own or {})).items()
            }
            kind, can_load = settings["kind"], (folder / f"{name}-model").exists()
            is_again = path.exists() and given.again and (kind in WITHOUT_TRAINING or can_load)
            if (path.exists() and not is_again) or (given.only and name not in given.only):
                continue
            if kind in OVER_ONE_MASK:
                carried = json.loads((folder / f"{settings['of']}.json").read_text())["settings"]
                settings |= {key: carried[key] for key in ("layers", "reference", "init_scores", "init_std")}
            started = time.perf_counter()
            run = Run(settings, base, folder, rows, seed, below)
            if is_again:
                result = json.loads(path.read_text())
                run.build(can_load=can_load)
                result |= run.scores()
            else:
                result = run.build() | run.scores()
                result |= {"seed": seed, "settings": settings, "seconds": round(time.perf_counter() - started, 1)}
            atomic_write_text(path, json.dumps(result, separators=(",", ":")) + "\n")
            print(_line(result, folder), flush=True)


def base_and_rows(content: dict[str, Any], where: str) -> tuple[str, dict[str, Rows]]:
    """The model before fine-tuning, and the encoded rows of each split, of a configuration read from `where`."""
    base = content.get("base_model") or str(fetch_demo_model())
    study = {"name": "effect", "seeds": [1], "models": {"m": base}, "methods": {"base": None}}
    splits, _ = load_domain(parse_study(study | {"domains": {"d": content["domain"]}}, where).domains[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenise = RowTokeniser(tokenizer, 256)
    return base, {name: [part for row in rows for part in tokenise(row)] for name, rows in splits.items()}


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4, which has no point, as text.
    return float(value) if isinstance(value, str) and value[0].isdigit() else value


def _line(result: dict[str, Any], folder: Path) -> str:
    name = result["settings"]["name"]
    line = f"seed {result['seed']} {name:24s} validation {result['validation']['nll']:.4f}"
    start = folder / f"{result['settings']['start']}.json"
    if start.exists() and name != "fft":
        line += f" ({result['validation']['nll'] - json.loads(start.read_text())['validation']['nll']:+.4f})"
    for point in result.get("evaluations", []):
        line += f" {point['step']}:{point['nll']:.4f}"
    if "left_out" in result:
        line += f" out {100 * result['left_out']:.3f} %"
    if result.get("train"):
        line += f" train {result['train'][0]:.3f}-{result['train'][-1]:.3f}"
    return f"{line} {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
