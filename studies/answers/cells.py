"""What the studies of right answers share: a seed's fine-tunings, a line for each method, and the tables of them."""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from maskft.adapters.model_files import weights_hash
from maskft.report import interval_text
from maskft.scoring.statistics import mcnemar_exact, paired_ratio_difference
from maskft.storage.environment import machine, versions
from maskft.storage.json_text import json_objects
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.run import run_sft
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import has_bfloat16

BATCH_SIZE = 50
Row = dict[str, Any]


def read(runs: Path) -> list[Row]:
    return json_objects(runs) if runs.exists() else []


def arguments(description: str | None, here: str) -> argparse.ArgumentParser:
    """The flags of each study in the folder of the file `here`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder of the rows.")
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder of what is trained.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", help="Some methods alone; default: all.")
    parser.add_argument("--runs", type=Path, default=Path(here).with_suffix(".jsonl"))
    return parser


class Cell:
    """A seed of a study: its folder, its lines, and fine-tunings of all weights."""

    settings: ClassVar[Mapping[str, Any]]  # of the fine-tuning, the best that validation chose in studies/effect

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        self.given, self.seed = given, seed
        self.folder = given.work_dir / f"seed{seed}"
        self.base = str(fetch_demo_model())

    def carry_out(self, method: Callable[[], Row]) -> None:
        """Write a method's line, where there is none yet and it is asked for."""
        asked = self.given.methods is None or method.__name__ in self.given.methods
        if asked and self.find(method.__name__) is None:
            weights = weights_hash(str(self.fine_tuning))
            if (self.find("fine_tuned") or {"weights": weights})["weights"] != weights:
                raise SystemExit(f"The fine-tuned model of seed {self.seed} is another one now; remove its lines.")
            began = time.perf_counter()
            line = {"seed": self.seed, "method": method.__name__} | method()
            line |= {
                "weights": weights,
                "seconds": round(time.perf_counter() - began, 1),
                "machine": machine(),
                "versions": versions(),
            }
            with self.given.runs.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(self.seed, method.__name__, line["right"].count("1"), line["seconds"], flush=True)

    def find(self, method: str) -> Row | None:
        wanted = {"seed": self.seed, "method": method}
        return next((line for line in read(self.given.runs) if wanted.items() <= line.items()), None)

    @cached_property
    def fine_tuning(self) -> Path:
        """The folder of the model that all methods start from."""
        raise NotImplementedError

    def fine_tune(
        self, name: str, rows: Dataset, validation: Dataset, start: Path | str | None = None, **settings: Any
    ) -> Path:
        """Fine-tune all weights of `start` (default: the base) on rows, where that has not been done to its end."""
        folder: Path = self.folder / name
        if not (folder / "report.json").exists():
            given = {**self.settings, **settings, "resume_from_checkpoint": "auto", "save_total_limit": 1}
            run_sft(
                DataArguments(str(start or self.base), "rows"),
                self.training(folder, **given),
                splits=(rows, validation),
            )
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return folder

    def test(self, model: Any) -> Row:
        """Which test rows a model gets right."""
        raise NotImplementedError

    def num_right(self, model: Any) -> int:
        """How many validation rows it gets right."""
        raise NotImplementedError

    def best(self, name: str, rates: Sequence[float], learn: Callable[[float], Any]) -> Row:
        """The test rows of the rate whose model has most validation rows right, the first of equals."""
        validation: dict[str, int] = {}
        line: Row = {}
        for rate in rates:
            model = learn(rate)
            found = self.num_right(model)
            print(name, rate, found, flush=True)
            if found > max(validation.values(), default=-1):
                line = self.test(model) | {"learning_rate": rate}
            validation[str(rate)] = found
        return line | {"validation": validation}

    def training(self, folder: Path, **settings: Any) -> TrainingSettings:
        """The settings of a run of this seed, and what all runs share."""
        own = {"output_dir": str(folder), "per_device_eval_batch_size": BATCH_SIZE, "seed": self.seed}
        return TrainingSettings(**settings, **own, bf16=has_bfloat16(), report_to=[], disable_tqdm=True)


def marks(right: "np.ndarray[Any, Any]") -> Row:
    """Which test rows are right, as a line holds it."""
    return {"right": "".join(map(str, right.astype(int)))}


def write_table(
    given: argparse.Namespace, title: str, names: Mapping[str, str], against: Sequence[tuple[str, str]]
) -> None:
    """Right answers, and differences from the seed's fine-tuned model, beside the lines: as .md and as .json.

    A line that holds `seeds` is of one model for all of them. A method of several seeds has their mean too.

    Args:
        against: pairs of methods that are compared with each other too, where a seed has both.
    """
    found, text = [], ["| model | seed | right, % | points above fine-tuned, or the model named | McNemar p |"]
    text.append("|---|---:|---:|---:|---:|")
    right = {
        (line["method"], seed): np.array([int(mark) for mark in line["right"]])
        for line in read(given.runs)
        for seed in line.get("seeds", [line["seed"]])
    }
    methods = sorted({method for method, _ in right}, key=list(names).index)
    for method, other in [*((name, "fine_tuned") for name in methods), *against]:
        # Without its fine-tuned model a line is an error, not left out.
        seeds = [seed for name, seed in right if name == method and (other == "fine_tuned" or (other, seed) in right)]
        for group in [*([seed] for seed in seeds), *([seeds] if len(seeds) > 1 else [])]:
            own, than = (np.array([right[name, seed] for seed in group]) for name in (method, other))
            entry: Row = {"seeds": group, "method": method, "right": own.sum(1).tolist(), "n": own.shape[1]}
            name = names[method] if other == "fine_tuned" else f"{names[method]}, above {names[other]}"
            cells = [name, ", ".join(map(str, group)), f"{100 * own.mean():.1f}", "", ""]
            if method != other:
                entry |= {"above": other} | vars(paired_ratio_difference(than, own, np.ones(own.shape)))
                cells[3] = interval_text(entry, scale=100, digits=1)
                if len(group) == 1:
                    entry["p"] = mcnemar_exact(than[0], own[0])
                    cells[4] = f"{entry['p']:.3g}"
            found.append(entry)
            text.append(f"| {' | '.join(cells)} |")
    intervals = "[95 % intervals] over rows, where several seeds stand of their mean"
    head = f"# {title}\n\nn = {found[0]['n']} a seed; {intervals}.\n\n"
    given.runs.with_suffix(".md").write_text(head + "\n".join(text) + "\n")
    given.runs.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
