"""Does preference tuning on a model's own graded answers get more of them right, by a mask of the change or by LoRA?

    python studies/effect/make_constraints.py seed_tasks.jsonl user_oriented_instructions.jsonl --output_dir data
    python studies/answers/preferences.py --data_dir data --work_dir work --seeds 1

The fine-tuned model answers the training prompts several times, lm-eval's checkers of IFEval's constraints grade the
answers, and DPO learns from pairs of a right and a wrong one (see `README.md`). Each method of a seed is one line of
`preferences.jsonl`, and what stands there is not run again.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from cells import BATCH_SIZE, Cell, Row, arguments, marks, write_table
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from maskft import MaskCallback, MaskConfig
from maskft.adapters.model_files import read_tokenizer
from maskft.data.rows import load_rows
from maskft.evaluation.generation import generate_answers
from maskft.storage.json_text import json_objects
from maskft_lab.device import DEVICE, has_bfloat16, load_on_device
from maskft_lab.study.checkers import row_checker

MAX_NEW_TOKENS, MAX_LENGTH = 64, 256
LEAST_GAIN = 2.0  # of LoRA with the first seed, in points, below which the study stops
NAMES = {
    "fine_tuned": "fine-tuned",
    "lora": "DPO, LoRA",
    "mask": "DPO, mask of the change",
    "weights": "DPO, all weights",
}
# A step moves each score by about its rate; at 5e-4 the loss had hardly moved after ten steps.
RATES = {"lora": (1e-4, 5e-4), "mask": (5e-4, 2e-3), "weights": (1e-6, 5e-6)}


def main() -> None:
    parser = arguments(__doc__, __file__)
    parser.add_argument("--num_draws", type=int, default=4, help="Answers drawn to each training prompt.")
    parser.add_argument("--num_prompts", type=int, default=400, help="Training prompts that are answered.")
    given = parser.parse_args()
    for seed in given.seeds:
        cell = PreferenceCell(given, seed)
        for method in (cell.fine_tuned, cell.lora):
            cell.carry_out(method)
        if seed == 1 and cell.find("lora") and cell.gain("lora") < LEAST_GAIN:
            print(f"LoRA gains {cell.gain('lora'):.1f} points with seed {seed}: the study stops by its rule.")
            break
        for method in (cell.mask, cell.weights):
            cell.carry_out(method)
    write_table(given, "Preference tuning on own graded answers", NAMES, [("mask", "lora"), ("weights", "lora")])


class PreferenceCell(Cell):
    """A seed: the fine-tuning, its own answers, and what DPO makes of them."""

    settings: ClassVar = {
        "learning_rate": 3e-5,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "max_length": MAX_LENGTH,
    }

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        super().__init__(given, seed)
        self.tokenizer = read_tokenizer(self.base)

    @cached_property
    def fine_tuning(self) -> Path:
        train, validation = (load_rows(str(self.given.data_dir / f"{name}.jsonl")) for name in ("train", "validation"))
        return self.fine_tune("all", train, validation)

    def prompts(self, split: str) -> list[Row]:
        return json_objects(self.given.data_dir / f"{split}_prompts.jsonl")

    @cached_property
    def pairs(self) -> Dataset:
        """A right and a wrong answer of the fine-tuned model, to each prompt that it answered in both ways."""
        path, rows = self.folder / "answers.json", self.prompts("train")[: self.given.num_prompts]
        if not path.exists():
            model = load_on_device(self.fine_tuning)
            torch.manual_seed(self.seed)
            drawn = [graded(model, self.tokenizer, rows, temperature=1.0) for _ in range(self.given.num_draws)]
            path.write_text(json.dumps(drawn))
        draws, draw, pairs = json.loads(path.read_text()), random.Random(self.seed), []
        for row, *answers in zip(rows, *draws, strict=True):
            right, wrong = ([text for text, is_right in answers if is_right is wanted] for wanted in (True, False))
            if right and wrong:
                chosen, rejected = ([{"role": "assistant", "content": draw.choice(of)}] for of in (right, wrong))
                pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
        num_right = sum(is_right for answers in draws for _, is_right in answers)
        print(f"{len(draws) * len(rows)} answers, {num_right} right, {len(pairs)} pairs", flush=True)
        return Dataset.from_list(pairs)

    def fine_tuned(self) -> Row:
        """The model that all others start from."""
        model = load_on_device(self.fine_tuning)
        return self.test(model) | {"validation": self.num_right(model)}

    def lora(self) -> Row:
        """LoRA on every linear layer."""
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return self.best("lora", RATES["lora"], lambda rate: self.learn("lora", rate, peft_config=config))

    def mask(self) -> Row:
        """A mask of the change, few of whose weights flip at a step."""
        given = {"reference_model_name_or_path": self.base, "task_type": "CAUSAL_LM", "seed": self.seed}
        config = MaskConfig.preset("preferences", **given)

        def learn(rate: float) -> Any:
            return self.learn("mask", rate, peft_config=config, callbacks=[MaskCallback()])

        return self.best("mask", RATES["mask"], learn)

    def weights(self) -> Row:
        """All weights."""
        return self.best("weights", RATES["weights"], lambda rate: self.learn("weights", rate))

    def gain(self, name: str) -> float:
        """Points of right answers that a method has beyond the fine-tuned model."""
        before, after = (self.find(method) for method in ("fine_tuned", name))
        assert before is not None
        assert after is not None
        return 100 * (after["right"].count("1") - before["right"].count("1")) / len(after["right"])

    def learn(self, name: str, rate: float, **others: Any) -> Any:
        """The model after one pass of DPO over the pairs."""
        args = DPOConfig(
            output_dir=str(self.folder / name),
            learning_rate=rate,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            max_length=MAX_LENGTH,
            warmup_steps=0.1,
            seed=self.seed,
            bf16=has_bfloat16(),
            use_cpu=DEVICE == "cpu",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = load_on_device(self.fine_tuning)
        trainer = DPOTrainer(model, args=args, train_dataset=self.pairs, processing_class=self.tokenizer, **others)
        trainer.train()
        return trainer.model.eval()

    def test(self, model: Any) -> Row:
        return marks(self.right(model, "test"))

    def num_right(self, model: Any) -> int:
        return int(self.right(model, "validation").sum())

    def right(self, model: Any, split: str) -> "np.ndarray[Any, Any]":
        """Which prompts of a split greedy answers get right."""
        return np.array([is_right for _, is_right in graded(model, self.tokenizer, self.prompts(split))])


def graded(model: Any, tokenizer: Any, rows: Sequence[Row], temperature: float = 0.0) -> list[tuple[str, bool]]:
    """An answer to each row's prompt, and whether it ended by itself and holds to all constraints, strictly."""
    is_right = row_checker("ifeval", rows)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH_SIZE, "temperature": temperature}
    answers, ended = generate_answers(model, tokenizer, [row["prompt"] for row in rows], **settings)
    return [(text, ended[i] and is_right(i, text)) for i, text in enumerate(answers)]


if __name__ == "__main__":
    main()
