"""Do masks of whole blocks move right answers? One bit for each layer's attention and MLP (see `README.md`).

    python studies/effect/make_sums.py --output_dir data/sums
    python studies/answers/coarse.py --data_dir data/sums --work_dir work --seeds 1 2 3

Each method of a seed is one line of `runs.jsonl`, and what stands there is not run again. At the end `table.md` is made
of all lines.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from maskft.adapters.model_files import read_tokenizer
from maskft.data.rows import answered, load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.report import interval_text
from maskft.scoring.nll import scored_logits
from maskft.scoring.statistics import mcnemar_exact, paired_ratio_difference
from maskft.storage.environment import machine, versions
from maskft.training.arguments import DataArguments, TrainingSettings
from maskft.training.averaging import average_models
from maskft.training.crossfit import deal_folds
from maskft.training.run import run_sft
from maskft.training.wise_ft import NUM_POINTS, scaled_changes
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import DEVICE, has_bfloat16, load_on_device

SUMS = {"learning_rate": 2e-4, "num_train_epochs": 8, "per_device_train_batch_size": 16}  # the best of studies/effect
NUM_FOLDS, MOST_SWEEPS, BATCH_SIZE, MAX_LENGTH = 3, 3, 50, 64
BLOCK = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.")
NAMES = {
    "scaled": "all changes scaled alike (WiSE-FT)",
    "coarse": "mask of blocks",
    "drawn": "as many blocks, drawn",
    "average": "average of the seeds",
}
Block = tuple[int, str]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What make_sums.py wrote.")
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder of the fine-tunings.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path(__file__).with_name("runs.jsonl"))
    given = parser.parse_args()
    for seed in given.seeds:
        cell = Cell(given, seed)
        for method in (cell.fine_tuned, cell.scaled, cell.coarse, cell.drawn):
            cell.carry_out(method)
    last = Cell(given, given.seeds[-1])
    last.carry_out(last.average)
    given.runs.with_name("table.md").write_text(table(read(given.runs)))


def read(runs: Path) -> list[Row]:
    return [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []


class Cell:
    """A seed: its fine-tunings, on all training rows and on all but those of a fold, and its rows."""

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        self.given, self.seed = given, seed
        self.base = str(fetch_demo_model())

    @cached_property
    def before(self) -> Any:
        return load_on_device(self.base)

    def carry_out(self, method: Callable[[], Row]) -> None:
        """Write a method's line, where there is none yet."""
        if self.find(method.__name__) is None:
            began = time.perf_counter()
            line = {"seed": self.seed, "method": method.__name__} | method()
            line |= {"seconds": round(time.perf_counter() - began, 1), "machine": machine(), "versions": versions()}
            with self.given.runs.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(self.seed, method.__name__, line["right"].count("1"), line["seconds"], flush=True)

    def find(self, method: str) -> Row | None:
        wanted = {"seed": self.seed, "method": method}
        return next((line for line in read(self.given.runs) if wanted.items() <= line.items()), None)

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """By split, as they are."""
        return {name: load_rows(str(self.given.data_dir / f"{name}.jsonl")) for name in ("train", "validation", "test")}

    @cached_property
    def test_tokens(self) -> Dataset:
        return self.tokens(self.rows["test"])

    def tokens(self, rows: Dataset) -> Dataset:
        tokenise = RowTokeniser(read_tokenizer(self.base), MAX_LENGTH)
        return answered(tokenise_rows(rows, tokenise))

    def fine_tune(self, name: str, rows: Dataset) -> Path:
        """Fine-tune all weights on rows, where that has not been done to its end."""
        folder = self.given.work_dir / f"sums-{self.seed}" / name
        if not (folder / "report.json").exists():
            own = {"output_dir": str(folder), "resume_from_checkpoint": "auto", "save_total_limit": 1}
            own |= {"per_device_eval_batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "seed": self.seed}
            settings = TrainingSettings(**SUMS, **own, bf16=has_bfloat16(), report_to=[], disable_tqdm=True)
            run_sft(DataArguments(self.base, "sums"), settings, splits=(rows, self.rows["validation"]))
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return folder

    @cached_property
    def tuned(self) -> Any:
        return load_on_device(self.fine_tune("all", self.rows["train"]))

    @cached_property
    def unseen(self) -> list["Part"]:
        """Models and rows that their change has not seen: each fold's, and the validation rows."""
        train, parts = self.rows["train"], [Part(self.before, self.tuned, self.tokens(self.rows["validation"]))]
        for number, fold in enumerate(deal_folds(train, NUM_FOLDS, self.seed)):
            others = train.select(sorted(set(range(len(train))).difference(fold)))
            model = load_on_device(self.fine_tune(f"without-{number}", others))
            parts.append(Part(self.before, model, self.tokens(train.select(fold))))
        return parts

    def fine_tuned(self) -> Row:
        """The model that all others are compared with."""
        return self.test(self.tuned)

    def scaled(self) -> Row:
        """All changes scaled alike, by the share that the unseen rows like best."""
        shares = [i / (NUM_POINTS - 1) for i in range(NUM_POINTS)]
        scores = np.sum([part.at_shares(shares) for part in self.unseen], axis=0)
        best = max(range(NUM_POINTS), key=lambda number: tuple(scores[number]))
        (tested,) = (self.test(self.tuned) for _ in scaled_changes(self.tuned, self.before, [shares[best]]))
        return tested | {"share": shares[best], "unseen": scores.tolist()}

    def coarse(self) -> Row:
        """Blocks whose change is put back, chosen one after another by the unseen rows, the last layer first."""
        back: set[Block] = set()
        best = scores_with(self.unseen, back)
        path = [{"blocks": 0, "unseen": best}]
        for _ in range(MOST_SWEEPS):
            before_sweep = best
            for block in sorted(self.unseen[0].blocks, reverse=True):
                score = scores_with(self.unseen, back ^ {block})
                if score > best:
                    back, best = back ^ {block}, score
                    path.append({"blocks": len(back), "unseen": best})
                    print(*block, *best, flush=True)
            if best == before_sweep:
                break
        return self.with_blocks(back) | {"path": path}

    def drawn(self) -> Row:
        """As many blocks of each kind as the mask puts back, drawn."""
        line, draw = self.find("coarse"), np.random.default_rng(self.seed)
        assert line is not None
        drawn: set[Block] = set()
        for kind in ("mlp", "self_attn"):
            blocks = sorted(block for block in self.unseen[0].blocks if block[1] == kind)
            number = sum(each[1] == kind for each in line["back"])
            drawn |= {blocks[i] for i in draw.permutation(len(blocks))[:number]}
        return self.with_blocks(drawn)

    def average(self) -> Row:
        """The average of the fine-tunings of all seeds, which stands under the last."""
        folders = [Cell(self.given, seed).fine_tune("all", self.rows["train"]) for seed in self.given.seeds]
        return self.test(average_models(folders).to(DEVICE).eval()) | {"seeds": self.given.seeds}

    def with_blocks(self, back: set[Block]) -> Row:
        with self.unseen[0].put_back(back):
            return self.test(self.tuned) | {"back": sorted(back)}

    def test(self, model: nn.Module) -> Row:
        right, _ = outcomes(model, self.test_tokens)
        return {"right": "".join(map(str, right.astype(int)))}


@dataclass
class Part:
    """A fine-tuned model, the model before it, and rows that the change between them has not seen."""

    before: nn.Module
    tuned: nn.Module
    rows: Dataset

    @cached_property
    def blocks(self) -> dict[Block, list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]]:
        """The weights of each block: in the model, before fine-tuning, and after it."""
        found: dict[Block, list[Any]] = {}
        start = dict(self.before.named_parameters())
        for name, weight in self.tuned.named_parameters():
            if match := BLOCK.search(name):
                block = (int(match[1]), match[2])
                found.setdefault(block, []).append((weight, start[name].detach(), weight.detach().clone()))
        return found

    @contextmanager
    def put_back(self, back: set[Block]) -> Iterator[None]:
        """Has these blocks as they were before fine-tuning, until it ends."""
        with torch.no_grad():
            for block in back:
                for weight, before, _ in self.blocks[block]:
                    weight.copy_(before)
        yield
        with torch.no_grad():
            for block in back:
                for weight, _, after in self.blocks[block]:
                    weight.copy_(after)

    def score(self) -> tuple[int, float]:
        """How many rows are right, and the sum of their margins, which decides between equals."""
        right, margins = outcomes(self.tuned, self.rows)
        return int(right.sum()), float(margins.sum())

    def at_shares(self, shares: Sequence[float]) -> list[tuple[int, float]]:
        """The score with all changes scaled by each share."""
        return [self.score() for _ in scaled_changes(self.tuned, self.before, shares)]


def scores_with(parts: Sequence[Part], back: set[Block]) -> tuple[int, float]:
    """The sum over all parts with these blocks as they were before fine-tuning."""
    scores = []
    for part in parts:
        with part.put_back(back):
            scores.append(part.score())
    return sum(right for right, _ in scores), sum(margin for _, margin in scores)


@torch.no_grad()
def outcomes(model: nn.Module, rows: Dataset) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Whether greedy decoding writes each row's answer, and by what margin, by one teacher-forced pass.

    The margin of a row is the least, over its trained tokens, of the token's logit less the largest other one.
    """
    margins = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), BATCH_SIZE):
        here = order[start : start + BATCH_SIZE]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=has_bfloat16()):
            logits, targets, at = scored_logits(model, [rows[i] for i in here])
        own = logits.gather(1, targets[:, None])[:, 0]
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        least = torch.full(at.shape, torch.inf, device=logits.device)
        least[at] = own - others
        margins[here] = least.amin(1).cpu().numpy()
    return margins > 0, margins


def table(lines: list[Row]) -> str:
    """Right answers of each seed, and differences from its fine-tuned model."""
    marks = {(line["seed"], line["method"]): np.array([int(mark) for mark in line["right"]]) for line in lines}
    text = ["| seed | model | right, % | points above fine-tuned | McNemar p |", "|---:|---|---:|---:|---:|"]
    for (seed, method), right in marks.items():
        cells = [str(seed), NAMES.get(method, "fine-tuned"), f"{100 * right.mean():.1f}", "", ""]
        if method in NAMES:
            tuned = marks[seed, "fine_tuned"]
            cells[3] = interval_text(
                vars(paired_ratio_difference(tuned, right, np.ones(len(right)))), scale=100, digits=1
            )
            cells[4] = f"{mcnemar_exact(tuned, right):.3g}"
        text.append(f"| {' | '.join(cells)} |")
    n = len(next(iter(marks.values()))) if marks else 0
    head = f"# Masks of whole blocks\n\nMade by `coarse.py`: {n} fresh sums, [95 % intervals] over them.\n\n"
    return head + "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
