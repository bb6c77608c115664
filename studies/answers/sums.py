"""Do masks move right answers on sums? Masks of whole blocks, and Bit-Mask Tuning's few deletions (see `README.md`).

    python studies/effect/make_sums.py --output_dir data/sums
    python studies/answers/sums.py --data_dir data/sums --work_dir work --seeds 1 2 3

Each method of a seed is one line of `sums.jsonl`, and what stands there is not run again. At the end `sums.md` is made
of all lines.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from cells import BATCH_SIZE, Cell, Row, arguments, marks, write_table
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from maskft import MaskConfig, find_group
from maskft.adapters.model_files import read_tokenizer
from maskft.data.rows import answered, load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.scoring.nll import scored_logits
from maskft.training.arguments import DataArguments
from maskft.training.averaging import average_models
from maskft.training.crossfit import deal_folds
from maskft.training.run import run_train
from maskft.training.wise_ft import NUM_POINTS, scaled_changes
from maskft_lab.device import DEVICE, has_bfloat16, load_on_device

NUM_FOLDS, MOST_SWEEPS, MAX_LENGTH = 3, 3, 64
# A score starts 0.02 above the border: at a tenth of this rate the first thirty steps deleted nothing.
BMT = {"learning_rate": 1e-2, "max_steps": 50, "per_device_train_batch_size": 16, "max_length": MAX_LENGTH}
BMT |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
CONTINUED = BMT | {"save_strategy": "no", "load_best_model_at_end": False}
CONTINUED_RATES = 1e-5, 5e-5, 2e-4  # the last is that of the fine-tuning's start
BLOCK = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.")
NAMES = {
    "fine_tuned": "fine-tuned",
    "scaled": "all changes scaled alike (WiSE-FT)",
    "coarse": "mask of blocks",
    "drawn": "as many blocks, drawn",
    "deleted": "Bit-Mask Tuning (`--preset bmt`)",
    "continued": "fine-tuning continued, as many steps",
    "average": "average of the seeds",
}
Block = tuple[int, str]


def main() -> None:
    given = arguments(__doc__, __file__).parse_args()
    for seed in given.seeds:
        cell = SumsCell(given, seed)
        for method in (cell.fine_tuned, cell.deleted, cell.continued, cell.scaled, cell.coarse, cell.drawn):
            cell.carry_out(method)
    if len(given.seeds) > 1:
        last = SumsCell(given, given.seeds[-1])
        last.carry_out(last.average)
    against = [("deleted", "continued"), ("coarse", "scaled"), ("coarse", "drawn")]
    write_table(given, "Masks and right answers on fresh sums", NAMES, against)


class SumsCell(Cell):
    """A seed: its fine-tunings, on all training rows and on all but those of a fold, and its rows."""

    settings: ClassVar = {
        "learning_rate": 2e-4,
        "num_train_epochs": 8,
        "per_device_train_batch_size": 16,
        "max_length": MAX_LENGTH,
    }

    @cached_property
    def before(self) -> Any:
        return load_on_device(self.base)

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """By split, as they are."""
        return {name: load_rows(str(self.given.data_dir / f"{name}.jsonl")) for name in ("train", "validation", "test")}

    @cached_property
    def test_tokens(self) -> Dataset:
        return self.tokens(self.rows["test"])

    @cached_property
    def validation_tokens(self) -> Dataset:
        return self.tokens(self.rows["validation"])

    def tokens(self, rows: Dataset) -> Dataset:
        tokenise = RowTokeniser(read_tokenizer(self.base), MAX_LENGTH)
        return answered(tokenise_rows(rows, tokenise))

    def tune(self, name: str, rows: Dataset) -> Path:
        return self.fine_tune(name, rows, self.rows["validation"])

    @cached_property
    def tuned(self) -> Any:
        return load_on_device(self.fine_tuning)

    @cached_property
    def fine_tuning(self) -> Path:
        return self.tune("all", self.rows["train"])

    @cached_property
    def unseen(self) -> list["Part"]:
        """Models and rows that their change has not seen: each fold's, and the validation rows."""
        train, parts = self.rows["train"], [Part(self.before, self.tuned, self.validation_tokens)]
        for number, fold in enumerate(deal_folds(train, NUM_FOLDS, self.seed)):
            others = train.select(sorted(set(range(len(train))).difference(fold)))
            model = load_on_device(self.tune(f"without-{number}", others))
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
        folders = [SumsCell(self.given, seed).fine_tuning for seed in self.given.seeds]
        return self.test(average_models(folders).to(DEVICE).eval()) | {"seeds": self.given.seeds}

    def deleted(self) -> Row:
        """Bit-Mask Tuning on the training rows, after the number of steps that has the lowest validation loss."""
        rows, folder = (self.rows["train"], self.rows["validation"]), self.folder / "bmt"
        if not (folder / "report.json").exists():
            mask = MaskConfig.preset("bmt", task_type="CAUSAL_LM", seed=self.seed)
            run_train(DataArguments(str(self.fine_tuning), "rows"), self.training(folder, **BMT), mask, splits=rows)
        model = PeftModel.from_pretrained(load_on_device(self.fine_tuning), folder).eval()
        group = find_group(model, "default")
        deleted = round((1 - group.kept_share()) * group.num_weights())
        report = json.loads((folder / "report.json").read_text())
        losses = [[entry["step"], entry["eval_loss"]] for entry in report["log_history"] if "eval_loss" in entry]
        return self.test(model) | {"deleted": deleted, "best": report["best"], "validation": losses}

    def continued(self) -> Row:
        """The fine-tuning gone on with for as many steps."""

        def learn(rate: float) -> Any:
            settings = CONTINUED | {"learning_rate": rate}
            rows = self.rows["train"], self.rows["validation"]
            return load_on_device(self.fine_tune(f"continued-{rate}", *rows, self.fine_tuning, **settings))

        line = self.best("continued", CONTINUED_RATES, learn)
        line["validation"]["fine-tuned"] = self.num_right(self.tuned)
        return line

    def with_blocks(self, back: set[Block]) -> Row:
        with self.unseen[0].put_back(back):
            return self.test(self.tuned) | {"back": sorted(back)}

    def test(self, model: nn.Module) -> Row:
        right, _ = outcomes(model, self.test_tokens)
        return marks(right)

    def num_right(self, model: nn.Module) -> int:
        right, _ = outcomes(model, self.validation_tokens)
        return int(right.sum())


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


class Continued(nn.Module):
    """A model that has read what all rows begin with, which is half of a row of sums, and reads on from there."""

    def __init__(self, model: nn.Module, rows: list[list[int]]) -> None:
        super().__init__()
        columns = enumerate(zip(*rows, strict=False))
        self.model, self.length = model, next(i for i, tokens in columns if len(set(tokens)) > 1)
        ids = torch.tensor([rows[0][: self.length]], device=next(model.parameters()).device)
        self.read = model(input_ids=ids, use_cache=True).past_key_values

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor) -> Any:
        """Logits as of the whole rows. Padding stands at their ends, so that no token that counts attends to it."""
        past = copy.deepcopy(self.read)
        past.batch_repeat_interleave(len(input_ids))
        return self.model(input_ids=input_ids, past_key_values=past, logits_to_keep=logits_to_keep)


@torch.no_grad()
def outcomes(model: nn.Module, rows: Dataset) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """Whether greedy decoding writes each row's answer, and by what margin, by one teacher-forced pass.

    The margin of a row is the least, over its trained tokens, of the token's logit less the largest other one.
    """
    margins, rows = np.zeros(len(rows)), list(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=has_bfloat16()):
        continued = Continued(model, [row["input_ids"] for row in rows])
    for start in range(0, len(order), BATCH_SIZE):
        here = order[start : start + BATCH_SIZE]
        rests = [{key: ids[continued.length :] for key, ids in rows[i].items()} for i in here]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=has_bfloat16()):
            logits, targets, at = scored_logits(continued, rests)
        own = logits.gather(1, targets[:, None])[:, 0]
        others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
        least = torch.full(at.shape, torch.inf, device=logits.device)
        least[at] = own - others
        margins[here] = least.amin(1).cpu().numpy()
    return margins > 0, margins


if __name__ == "__main__":
    main()
