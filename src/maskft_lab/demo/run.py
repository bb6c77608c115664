"""`maskft demo`: fine-tune a real small model, learn a mask over it, and compare on equal budgets."""

import json
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.data.rows import data_hash
from maskft.data.tokens import tokenise_rows
from maskft.evaluation.generation import generate_answers
from maskft.masks import pack_mask, shuffled_mask, unpack_mask
from maskft.report import (
    CONTROL_HEADER,
    HEADER,
    Page,
    PageTable,
    control_rows,
    render_tables,
    table_rows,
    training_curves,
    write_html,
)
from maskft.scoring.nll import NllResult, token_nll
from maskft.scoring.statistics import mcnemar_exact, paired_ratio_difference, ratio, share
from maskft.storage.environment import versions
from maskft.storage.files import atomic_write_text, require_empty_output, require_free_space, require_writable
from maskft.training.arguments import TrainingSettings
from maskft.training.run import build_trainer
from maskft.training.trainer import MaskTrainer
from maskft.tuner import MaskConfig, find_group
from maskft_lab.demo.model import fetch_demo_model
from maskft_lab.demo.task import DemoRecipe, build_task, score_answer


def run_demo(output_dir: Path, *, overwrite: bool = False, console: Console, recipe: DemoRecipe | None = None) -> None:
    """Run the whole comparison, print its table, and write `report.json`, `report.html` and the adapter.

    Raises:
        MaskftError: the output folder holds a run or cannot be one, the disk is too small, or the model cannot be had.
    """
    recipe = recipe or DemoRecipe()
    started = time.perf_counter()
    require_writable(output_dir)
    if not overwrite:
        require_empty_output(output_dir, what="the demo", or_else="write over it with --overwrite_output_dir")
    require_free_space(output_dir, 3 * 10**9, "the demo")
    disable_progress_bar()
    folder = fetch_demo_model(console=console)
    study = _Demo(output_dir, recipe, console, str(folder))
    study.run()
    report = study.report(time.perf_counter() - started)
    atomic_write_text(output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    page = Page(
        title=report["title"],
        caption=report["caption"],
        tables=[PageTable(HEADER, table_rows(report)), PageTable(CONTROL_HEADER, control_rows(report))],
        curves=report["curves"],
        details={"Sample answers": report["samples"], "Settings, versions and data": report["settings"]},
    )
    write_html(output_dir / "report.html", page)
    console.print(render_tables(report))
    console.print(f"Wrote {output_dir / 'report.html'} and report.json; the adapter is in {output_dir / 'mask'}.")


class _Demo:
    def __init__(self, output_dir: Path, recipe: DemoRecipe, console: Console, base: str) -> None:
        self.output_dir, self.recipe, self.console, self.base = output_dir, recipe, console, base
        self.task = build_task(
            recipe.num_train,
            recipe.num_validation,
            recipe.num_test,
            recipe.seed,
            num_terms=recipe.num_terms,
            num_digits=recipe.num_digits,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.tokenised_test = tokenise_rows(self.rows(self.task.test), self.tokenizer, max_length=recipe.max_length)
        self.nll: dict[str, NllResult] = {}
        self.correct: dict[str, np.ndarray[Any, Any]] = {}
        self.answers: dict[str, list[str]] = {}
        self.extras: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[dict[str, Any]]] = {}

    def run(self) -> None:
        base = self.load(self.base)
        trainer = self.trainer(base, "fft", self.recipe.learning_rate, self.recipe.num_train_epochs)
        self.score("base", base)
        seconds = self.train(trainer, "best FFT")
        best = self.output_dir / "fft-best"
        trainer.model.save_pretrained(best)
        self.tokenizer.save_pretrained(best)  # so that the other commands can go on with it
        self.score("best FFT", trainer.model, train_seconds=seconds)
        shutil.rmtree(self.output_dir / "fft")

        masked = get_peft_model(self.load(best), self.mask_config())
        trainer = self.trainer(masked, "mft", self.recipe.mask_learning_rate, self.recipe.num_mask_epochs)
        seconds = self.train(trainer, "MFT")
        trainer.model.save_pretrained(self.output_dir / "mask")
        shutil.rmtree(self.output_dir / "mft")
        self.score_masks(best, seconds)

        model = self.load(best)
        trainer = self.trainer(model, "continued", self.recipe.learning_rate, self.recipe.num_mask_epochs)
        seconds = self.train(trainer, "FFT continued")
        self.score("FFT continued", trainer.model, train_seconds=seconds)
        shutil.rmtree(self.output_dir / "continued")

    def mask_config(self) -> MaskConfig:
        return MaskConfig(
            task_type="CAUSAL_LM",
            layers_to_transform=list(self.recipe.layers_to_transform),
            selection="threshold",
            init_scores="keep_all",
            seed=self.recipe.seed,
        )

    def score_masks(self, best: Path, seconds: float) -> None:
        """Score the adapter as it was saved, then as many left-out weights at random places of the same tensors."""
        model = PeftModel.from_pretrained(self.load(best), self.output_dir / "mask")
        group = find_group(model, "default")
        share = 1 - group.kept_share()
        size = (self.output_dir / "mask" / "adapter_model.safetensors").stat().st_size
        model.merge_adapter()
        self.score("MFT", model, train_seconds=seconds, share_left_out=share, file_bytes=size)
        model.unmerge_adapter()
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for name, packed in group.masks().items():
            layer = group.layers[name]
            shuffled = shuffled_mask(unpack_mask(packed, layer.in_features), generator)
            layer.set_mask("default", pack_mask(shuffled))
        model.merge_adapter()
        self.score("random mask", model, share_left_out=share, file_bytes=size)

    def load(self, folder: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def rows(self, split: Dataset) -> Dataset:
        return split.select_columns(["prompt", "completion"])

    def trainer(self, model: Any, name: str, learning_rate: float, num_epochs: int) -> MaskTrainer:
        settings = TrainingSettings(
            output_dir=str(self.output_dir / name),
            learning_rate=learning_rate,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=self.recipe.per_device_train_batch_size,
            per_device_eval_batch_size=self.recipe.per_device_eval_batch_size,
            warmup_steps=self.recipe.warmup_share,
            logging_steps=5,
            save_only_model=True,
            save_total_limit=1,
            seed=self.recipe.seed,
            max_length=self.recipe.max_length,
        )
        return build_trainer(
            model, self.tokenizer, self.rows(self.task.train), self.rows(self.task.validation), settings
        )

    def train(self, trainer: MaskTrainer, name: str) -> float:
        self.console.rule(name)
        started = time.perf_counter()
        trainer.train()
        self.logs[name] = trainer.state.log_history
        return time.perf_counter() - started

    def score(self, name: str, model: Any, **extras: Any) -> None:
        prompts = list(self.task.test["prompt"])
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            losses = progress.add_task(f"{name}: test NLL", total=len(prompts))
            self.nll[name] = token_nll(model, self.tokenised_test, advance=partial(progress.advance, losses))
            answers = progress.add_task(f"{name}: test answers", total=len(prompts))
            self.answers[name] = generate_answers(
                model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.recipe.max_new_tokens,
                advance=partial(progress.advance, answers),
            )
        entries = self.task.test["entry"]
        scored = [score_answer(e, a) for e, a in zip(entries, self.answers[name], strict=True)]
        self.correct[name] = np.array(scored)
        self.extras[name] = extras
        self.console.print(f"{name}: test NLL {self.nll[name].mean:.4f}, accuracy {100 * np.mean(scored):.1f} %")

    def report(self, seconds: float) -> dict[str, Any]:
        names = [n for n in ("base", "best FFT", "FFT continued", "random mask", "MFT") if n in self.nll]
        n = len(self.task.test)
        return {
            "title": "maskft demo: SmolLM2-135M-Instruct on sums",
            "caption": f"n = {n} test items, one seed; [95 % intervals: Wilson's of accuracies, else a bootstrap over "
            f"items]; {seconds:.0f} s in all.",
            "models": [self.row(name) for name in names],
            "controls": [{"name": other} | self.difference(other, "MFT") for other in names if other != "MFT"],
            "curves": training_curves(self.logs),
            "samples": [
                {"question": self.task.test[i]["entry"]["question"], "right": self.task.test[i]["entry"]["answer"]}
                | {name: self.answers[name][i] for name in names}
                for i in range(10)
            ],
            "settings": {
                "recipe": asdict(self.recipe),
                "mask": self.mask_config().to_dict(),
                "versions": versions(),
                "threads": torch.get_num_threads(),
                "data": {
                    split: data_hash(self.rows(getattr(self.task, split))) for split in ("train", "validation", "test")
                },
            },
        }

    def row(self, name: str) -> dict[str, Any]:
        nll, correct = self.nll[name], self.correct[name]
        row = {
            "name": name,
            "nll": asdict(ratio(nll.sums, nll.num_tokens)),
            "accuracy": asdict(share(correct, np.ones(len(correct)))[0]),
        } | self.extras[name]
        return row if name == "best FFT" else row | self.difference("best FFT", name)

    def difference(self, from_name: str, to_name: str) -> dict[str, Any]:
        """What `to_name` has more than `from_name`, paired over the test items."""
        before, after = self.nll[from_name], self.nll[to_name]
        correct_before, correct_after = self.correct[from_name], self.correct[to_name]
        ones = np.ones(len(correct_before))
        return {
            "nll_difference": asdict(paired_ratio_difference(before.sums, after.sums, after.num_tokens)),
            "accuracy_difference": asdict(paired_ratio_difference(correct_before, correct_after, ones)),
            "mcnemar_p": mcnemar_exact(correct_before, correct_after),
        }
