"""`maskft demo`: a real small model is fine-tuned on sums, forgets how to answer, and gets that back.

It runs what `maskft sft` and `maskft restore` run. Beside the mask stands what it has to beat: all changes scaled alike
(WiSE-FT), and all weights trained on the same rows for as many steps.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer

from maskft.data.tokens import RowTokeniser
from maskft.errors import NoGainError
from maskft.evaluation.generation import generate_answers
from maskft.report import Page, interval_text, narrow_table, tradeoff_curve, write_html
from maskft.scoring.nll import token_nll
from maskft.scoring.statistics import paired_ratio_difference, wilson
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_write_text, require_empty_output, require_free_space, require_writable
from maskft.storage.json_text import read_object
from maskft.storage.yaml_file import read_yaml
from maskft.training.arguments import RESTORED, DataArguments, TrainingSettings
from maskft.training.restore import RestoreArguments, RestoreSettings, Restoring
from maskft.training.retain import answer_rows, read_general_rows
from maskft.training.run import run_train
from maskft.training.wise_ft import scaled_changes
from maskft.tuner import MaskConfig
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import DEVICE, has_bfloat16, load_on_device
from maskft_lab.reasoning.sums import build_task, score_answer
from maskft_lab.study.summary import Columns, table_of

RECIPE: dict[str, Any] = read_yaml(Path(__file__).with_name("demo.yaml"), "The demo's file")
# Three of the models are rows of the table and folders of the output.
BEFORE, TUNED, WHOLE, MASK = "before", "fine-tuned", "all-weights", "restored"
GENERAL, KEPT = Path("general", "train.jsonl"), Path("general", "test.jsonl")
COLUMNS: Columns = (
    ("model", lambda row: row["name"]),
    ("sums right, %", lambda row: interval_text(row["right"], scale=100, digits=1, plus="")),
    ("minus fine-tuned", lambda row: interval_text(row.get("right_difference"), scale=100, digits=1)),
    ("general NLL", lambda row: f"{row['general_nll']:.3f}"),
    ("minus fine-tuned", lambda row: interval_text(row.get("general_difference"), digits=3)),
    ("train s", lambda row: f"{row['train_seconds']:.0f}" if "train_seconds" in row else ""),
    ("to ship", lambda row: f"{row['num_bytes'] / 1e6:.1f} MB" if "num_bytes" in row else ""),
)
"""Of the demo's table; sums in percent and points, NLL in nats per token, intervals of 95 %."""


def run_demo(
    output_dir: Path, *, overwrite: bool = False, console: Console, recipe: dict[str, Any] | None = None
) -> None:
    """Tell the whole story, print its table, and write `report.json`, `report.html`, `fine-tuned/` and `restored/`.

    Raises:
        MaskftError: the output folder holds a run or cannot be one, the disk is too small, the model cannot be had, or
            nothing could be given back.
    """
    started = time.perf_counter()
    require_writable(output_dir)
    if not overwrite:
        require_empty_output(output_dir, what="the demo", or_else="write over it with --overwrite_output_dir")
    require_free_space(output_dir, 5 * 10**9, "the demo")
    disable_progress_bar()
    demo = _Demo(recipe or RECIPE, output_dir, str(fetch_demo_model(console=console)), console)
    for name in (TUNED, WHOLE, MASK):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    demo.ask()
    demo.fine_tune()
    report = demo.give_back()
    report["caption"] += f"; {time.perf_counter() - started:.0f} s in all."
    atomic_write_text(output_dir / "report.json", json.dumps(report, indent=1) + "\n")
    table = table_of(report["models"], COLUMNS, caption=report["caption"])
    details = {"Answers to general prompts": report["samples"], "Settings and versions": report["settings"]}
    shown = {"verdict": report["verdict"], "tables": [table], "curves": [report["curve"]], "details": details}
    write_html(output_dir / "report.html", Page(report["title"], "", **shown))
    console.print(narrow_table(table, console.width))
    console.print(report["verdict"])
    console.print(f"Wrote {output_dir / 'report.html'} and report.json; the adapter is in {output_dir / MASK}.")


class _Demo:
    """The stages, and what each model is worth on test rows of both kinds."""

    def __init__(self, recipe: dict[str, Any], output_dir: Path, base: str, console: Console) -> None:
        self.recipe, self.output_dir, self.base, self.console = recipe, output_dir, base, console
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        self.task = build_task(**recipe["sums"])
        self.rows: list[dict[str, Any]] = []
        self.most_tokens = recipe["restoring"]["retain_max_new_tokens"]
        self.bf16 = has_bfloat16()
        self.computing = torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16)

    def ask(self) -> None:
        """The model before fine-tuning answers the prompts, of which a third is kept for the table."""
        self.console.rule("Before fine-tuning")
        before, prompts = load_on_device(self.base), [[{"role": "user", "content": p}] for p in self.recipe["prompts"]]
        rest, self.shown = [each for i, each in enumerate(prompts) if i % 3], prompts[:30:3]
        self.samples: list[dict[str, str]] = [{"prompt": prompt[0]["content"]} for prompt in self.shown]
        for name, some in {GENERAL: rest, KEPT: prompts[::3]}.items():
            atomic_write_text(self.output_dir / name, "".join(json.dumps({"prompt": each}) + "\n" for each in some))
        tokenise = RowTokeniser(self.tokenizer, self.recipe["training"]["max_length"])
        splits, answers = {"test": read_general_rows(str(self.output_dir / KEPT))}, KEPT.with_name("test-answers.jsonl")
        batch_size = self.recipe["training"]["per_device_eval_batch_size"]
        limits = {"max_new_tokens": self.most_tokens, "batch_size": batch_size}
        with self.computing:
            self.general = answer_rows(splits, before, tokenise, self.output_dir / answers, **limits)["test"]
        self.score(BEFORE, before)

    def fine_tune(self) -> None:
        """All weights learn sums."""
        self.console.rule("Fine-tuning on sums")
        seconds = self.train(TUNED, TrainingSettings, self.base)["log_history"][-1]["train_runtime"]
        self.score(TUNED, load_on_device(self.output_dir / TUNED), train_seconds=seconds)

    def give_back(self) -> dict[str, Any]:
        """A mask of the change, and what it has to beat, with the same rows and chosen alike; returns the report."""
        self.console.rule("What of the change can go back?")
        given = RestoreArguments(retain_dataset_name=str(self.output_dir / GENERAL), **self.recipe["restoring"])
        restoring, start = Restoring(given, self.base), str(self.output_dir / TUNED)
        mask = MaskConfig.preset("recommended", reference_model_name_or_path=self.base, task_type="CAUSAL_LM")
        masks = {MASK: mask, WHOLE: None}
        reports = {name: self.train(name, RestoreSettings, start, m, restoring=restoring) for name, m in masks.items()}
        tuned = load_on_device(start)
        nearest, _ = max(restoring.curve, key=lambda at: restoring.score(at[1])[RESTORED])
        for share in scaled_changes(tuned, load_on_device(self.base), [nearest]):
            self.score(f"WiSE-FT, {share:.0%} of the change", tuned)
        for name, file in ((WHOLE, "model.safetensors"), (MASK, "adapter_model.safetensors")):
            folder, seconds = self.output_dir / name, reports[name]["log_history"][-1]["train_runtime"]
            if not (folder / file).exists():
                self.console.print(f"{name}: {reports[name]['verdict']['sentence']}")
                continue
            model = (
                load_on_device(folder) if name == WHOLE else PeftModel.from_pretrained(tuned, folder).merge_and_unload()
            )
            self.score(name, model, train_seconds=seconds, num_bytes=(folder / file).stat().st_size)
        shutil.rmtree(self.output_dir / WHOLE)
        curve = tradeoff_curve(reports[MASK]["restore"])
        of_weights = reports[WHOLE]["restore"]["mask"]
        curve["lines"]["all weights, by step"] = [[point["retained"], point["task"]] for point in of_weights]
        return self.report() | {"curve": curve}

    def train(self, name: str, kind: Any, start: str, mask: MaskConfig | None = None, **of: Any) -> dict[str, Any]:
        """What `maskft sft` or `maskft restore` runs, the latter for all weights where there is no mask."""
        folder = self.output_dir / name
        settings = kind(**{"output_dir": str(folder), "bf16": self.bf16} | self.recipe["training"] | self.recipe[name])
        train, validation = (self.task[split].remove_columns("entry") for split in ("train", "validation"))
        try:
            report = run_train(DataArguments(start, "sums"), settings, mask, splits=(train, validation), **of)
        except NoGainError:
            if name != WHOLE:  # the story goes on without what the mask has to beat
                raise
            report = read_object(folder / "report.json", "start the demo again")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return report

    def score(self, name: str, model: Any, **told: float) -> None:
        """Note what a model is worth on test rows of both kinds, and what it has more than the fine-tuned one."""
        test, most = self.task["test"], self.recipe["sum_tokens"]
        with self.computing:
            sums, _ = generate_answers(model, self.tokenizer, list(test["prompt"]), max_new_tokens=most)
            said, _ = generate_answers(model, self.tokenizer, self.shown, max_new_tokens=self.most_tokens)
            general = token_nll(model, self.general)
        right = np.array([*map(score_answer, test["entry"], sums)], float)
        row = {"name": name, "right": vars(wilson(right.sum(), len(right))), "general_nll": general.mean} | told
        for sample, answer in zip(self.samples, said, strict=True):
            sample[name] = answer
        if name == TUNED:
            self.tuned = right, general
        elif name != BEFORE:
            pairs = {"right": (self.tuned[0], right, np.ones(len(right)))}
            pairs |= {"general": (self.tuned[1].sums, general.sums, general.num_tokens)}
            row |= {f"{kind}_difference": vars(paired_ratio_difference(*pair)) for kind, pair in pairs.items()}
        self.rows.append(row)
        self.console.print(f"{name}: {right.mean():.1%} of the sums right, general NLL {general.mean:.3f}")

    def report(self) -> dict[str, Any]:
        """All numbers but the curve, ready for the table and the page."""
        num_sums, num_general = len(self.task["test"]), len(self.general)
        before, tuned, mask = (self.rows[i]["general_nll"] for i in (0, 1, -1))
        back = f"the mask gives back {(tuned - mask) / (tuned - before):.0%} of what the fine-tuning cost."
        return {
            "verdict": f"On {num_general} prompts that chose nothing, {back}",
            "title": "maskft demo: SmolLM2-135M-Instruct learns sums; what of the rest comes back?",
            "caption": f"{num_sums} sums and {num_general} general prompts that chose nothing, one seed; general NLL: "
            "nats per token of the answers before fine-tuning; [95 % intervals: Wilson's of shares, else a paired "
            "bootstrap over items]; all-weights has the rows of the mask; to ship: beside the fine-tuned model",
            "models": self.rows,
            "samples": self.samples,
            "settings": {"recipe": self.recipe, "bf16": self.bf16, "versions": versions(), "machine": machine()},
        }
