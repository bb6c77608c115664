"""What each method of a study does: trains where it trains, and scores the model it ends with on the test rows."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from maskft.adapters.model_files import load_model, read_tokenizer
from maskft.data.rows import data_hash, load_held_out, load_rows, tokenise_rows
from maskft.data.splits import problems_of, split_validation
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.evaluation.generation import generate_answers
from maskft.masks import pack_mask, unpack_mask
from maskft.scoring.nll import token_nll
from maskft.storage.files import atomic_folder, atomic_write_text, disk_errors
from maskft.storage.json_text import read_json
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings
from maskft.training.crossfit import CrossFitArguments, run_crossfit
from maskft.training.inputs import check_inputs, hash_inputs
from maskft.training.resume import newest_complete_checkpoint
from maskft.training.task_eval import load_eval_tasks, watch_tasks
from maskft.training.trainer import build_trainer
from maskft.tuner import check_targets, find_group
from maskft.tuner.targets import default_target_modules
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import DEVICE
from maskft_lab.reasoning.sums import build_task, score_answer
from maskft_lab.study.checkers import IsRight, read_checker
from maskft_lab.study.config import CONTROLS, DEMO_MODEL, Domain, Method, StudyModel, mask_config
from maskft_lab.study.controls import control_masks
from maskft_lab.study.plan import Run

logger = logging.getLogger(__name__)

MODEL, ADAPTER, POINTS, TRAINER = "model", "adapter", "points", "trainer"


@dataclass(frozen=True)
class Splits:
    """A domain's rows of `prompt` and `completion`; `is_right` scores an answer to a test row, if any are scored."""

    train: Dataset
    validation: Dataset
    test: Dataset
    is_right: IsRight | None

    def rows(self) -> dict[str, Dataset]:
        """Of each split, by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_domain(domain: Domain) -> Splits:
    """Read or generate a domain's rows; the split does not depend on a run's seed, so that all runs share it.

    Raises:
        MaskftError: rows that are missing or malformed.
    """
    if domain.generated is not None:
        task = build_task(**{"seed": 1} | domain.generated)
        entries = list(task.test["entry"])
        train, validation, test = (split.remove_columns("entry") for split in (task.train, task.validation, task.test))
        return Splits(train, validation, test, lambda number, answer: score_answer(entries[number], answer))
    train = load_rows(str(domain.dataset_name))
    if domain.eval_dataset_name:
        validation = load_held_out(domain.eval_dataset_name, "validation")
    else:
        share = domain.validation_split_percentage
        train, validation = split_validation(train, validation_split_percentage=share, seed=0)
    test = load_held_out(str(domain.test_dataset_name), "test")
    is_right = read_checker(str(domain.test_dataset_name), domain.checker) if domain.checker else None
    return Splits(train, validation, test, is_right)


def shared_rows(rows: Dataset, method: Method) -> Dataset:
    """The share of the training rows that a method uses."""
    return rows.select(range(max(1, round(len(rows) * method.train_share))))


def model_folder(model: StudyModel) -> str:
    """Where a model is read from; the demo's is fetched once."""
    return str(fetch_demo_model()) if model.model_name_or_path == DEMO_MODEL else model.model_name_or_path


def perform(run: Run) -> dict[str, Any]:
    """Carry out a run, going on from its newest checkpoint, and return its result.

    The result holds, for each test item, the sum of its NLL, at temperature 1 and at the one that suits the validation
    rows, and the number of its tokens (and whether the answer was right), the same sums at each checkpoint, and
    seconds; nothing of it was chosen on the test rows.
    """
    started = time.perf_counter()
    splits = load_domain(run.domain)
    check_inputs(run.folder, hash_inputs(splits.rows()))
    worker = _Worker(run, splits)
    result: dict[str, Any] = getattr(worker, "control" if run.method.kind in CONTROLS else run.method.kind)()
    data = {name: data_hash(rows) for name, rows in splits.rows().items()}
    return result | {"data": data, "seconds": round(time.perf_counter() - started, 1)}


class _Worker:
    def __init__(self, run: Run, splits: Splits) -> None:
        self.run, self.study, self.splits, self.pretrained = run, run.study, splits, model_folder(run.model)
        # All but the base model and the fine-tuning itself start from the best FFT.
        self.start = str(run.needs[0] / MODEL) if run.needs else self.pretrained
        self.tokenizer = read_tokenizer(self.pretrained)
        self.train_rows = shared_rows(splits.train, run.method)
        tokenise = RowTokeniser(self.tokenizer, self.study.max_length)
        self.validation, self.test = (tokenise_rows(rows, tokenise) for rows in (splits.validation, splits.test))

    def base(self) -> dict[str, Any]:
        return self.score(self.load())

    def fft(self) -> dict[str, Any]:
        return self.train(self.load(), keep=MODEL)

    def fft_continued(self) -> dict[str, Any]:
        return self.train(self.load())

    def lora(self) -> dict[str, Any]:
        model = self.load()
        config = lora_config(model, self.run.method.lora, self.study.matched_mask(self.run.method) or {})
        torch.manual_seed(self.run.seed)
        model = get_peft_model(model, config)
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return self.train(model) | {"rank": config.r, "num_trained": num_trained}

    def mft(self) -> dict[str, Any]:
        config = mask_config(self.run.method.mask, self.pretrained, self.run.seed)
        model = get_peft_model(self.load(), config)
        return self.train(model, keep=ADAPTER) | _size(model)

    def crossfit(self) -> dict[str, Any]:
        folder, method = self.run.folder, self.run.method
        if not (folder / ADAPTER).exists():
            run_crossfit(
                DataArguments(self.pretrained, self.run.domain.name, dtype=self.study.dtype),
                self.settings(),
                MaskArguments(**method.mask, mask_seed=self.run.seed),
                CrossFitArguments(**method.crossfit, fine_tuned_model_name_or_path=self.start),
                splits=(self.train_rows, self.splits.validation),
            )
            (folder / TRAINER / ADAPTER).rename(folder / ADAPTER)
        shutil.rmtree(folder / TRAINER, ignore_errors=True)  # gone already, where the run was killed after this
        model = PeftModel.from_pretrained(self.load(), folder / ADAPTER)
        return self.score(model) | _size(model)

    def control(self) -> dict[str, Any]:
        model = PeftModel.from_pretrained(self.load(), self.run.needs[1] / ADAPTER)
        group = find_group(model, "default")
        masks = {name: unpack_mask(m, group.layers[name].in_features) for name, m in group.masks().items()}
        weights = {name: layer.change("default") for name, layer in group.layers.items()}
        for name, mask in control_masks(self.run.method.kind, masks, weights, self.run.seed).items():
            group.layers[name].set_mask("default", pack_mask(mask))
        return self.score(model) | {"kept_share": group.kept_share()}

    def load(self) -> Any:
        return load_model(self.start, self.study.dtype)

    def settings(self) -> TrainingSettings:
        training = self.run.method.training
        given = {"disable_tqdm": True, "save_total_limit": 1, "bf16": self.study.bf16} | training
        if "eval_steps" in training:
            given |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": training["eval_steps"]}
        return TrainingSettings(output_dir=str(self.run.folder / TRAINER), seed=self.run.seed, **given)

    def train(self, model: Any, *, keep: str | None = None) -> dict[str, Any]:
        """Train, pick the best checkpoint on validation, score it on the test rows."""
        folder, settings = self.run.folder, self.settings()
        tasks = load_eval_tasks(settings, self.tokenizer)
        trainer = build_trainer(model, self.tokenizer, self.train_rows, self.splits.validation, settings)
        watch_tasks(trainer, self.tokenizer, tasks, settings)
        points = _Points(folder / POINTS, self.nll)
        if self.study.curves:
            trainer.add_callback(points)
        checkpoint = newest_complete_checkpoint(folder / TRAINER)
        if checkpoint is not None:
            logger.info("Going on from %s.", checkpoint)
        with disk_errors(f"finish the run in {folder}"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if keep is not None and not (folder / keep).exists():
                with atomic_folder(folder / keep) as new:
                    trainer.model.save_pretrained(new)
                    self.tokenizer.save_pretrained(new)
        result = self.score(trainer.model) | {
            "best_step": trainer.state.best_global_step,
            "best_validation_loss": trainer.state.best_metric,
            "num_steps": trainer.state.max_steps,
            "points": points.read(),
        }
        shutil.rmtree(folder / TRAINER)
        return result

    def score(self, model: Any) -> dict[str, Any]:
        model.to(DEVICE)  # where a trainer's is already; else bf16 autocast of a GPU would not reach it
        if isinstance(model, PeftModel):
            model.merge_adapter()
        prompts, is_right = list(self.splits.test["prompt"]), self.splits.is_right
        with self.autocast():
            chosen_by, test = (token_nll(model, rows, at_temperatures=True) for rows in (self.validation, self.test))
            if is_right is not None:
                most = self.run.domain.max_new_tokens
                answers, _ = generate_answers(model, self.tokenizer, prompts, max_new_tokens=most)
        temperature, sums = test.at_best_temperature(chosen_by)
        scores: dict[str, Any] = {"nll_sums": test.sums.tolist(), "num_tokens": test.num_tokens.tolist()}
        scores |= {"temperature": temperature, "nll_sums_at_temperature": sums.tolist()}
        numbers: dict[Any, int] = {}
        problems = [numbers.setdefault(problem, len(numbers)) for problem in problems_of(self.test)]
        if len(numbers) < len(problems):
            scores["problems"] = problems
        result: dict[str, Any] = {"test": scores}
        if is_right is not None:
            scores["correct"] = [int(is_right(number, answer)) for number, answer in enumerate(answers)]
            result["answers"] = answers[:10]
        if isinstance(model, PeftModel):
            model.unmerge_adapter()
        return result

    def nll(self, model: Any) -> list[float]:
        """Of the test rows, in the precision of the study."""
        with self.autocast():
            return token_nll(model, self.test).sums.tolist()

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.study.bf16)


def _size(model: Any) -> dict[str, Any]:
    group = find_group(model, "default")
    return {"kept_share": group.kept_share(), "num_trained": group.num_weights()}


def lora_config(model: Any, settings: dict[str, Any], mask: dict[str, Any]) -> LoraConfig:
    """LoRA on all linear layers, of the rank that matches a mask of these settings, where `settings` say nothing else.

    Raises:
        MaskftError: a layer that the model does not have.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = settings.get("layers_to_transform") or []
    for layer in [layers] if isinstance(layers, int) else layers:
        if not 0 <= layer < num_layers:
            raise MaskftError(f"`layers_to_transform` names layer {layer}; the model has layers 0 to {num_layers - 1}.")
    # Names, for PEFT takes layers_to_transform beside no "all-linear".
    given = {"target_modules": default_target_modules(model), "r": 0, **settings}
    given["r"] = given["r"] or matched_rank(model, mask)
    return LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": given["r"]} | given)


def matched_rank(model: Any, mask: dict[str, Any]) -> int:
    """The LoRA rank over all linear layers that trains about as many values as a mask of these settings, at least 1."""
    config = mask_config(mask, "the study's model")
    num_masked = sum(model.get_submodule(name).weight.numel() for name in check_targets(config, model))
    linear = tuple(f".{name}" for name in default_target_modules(model))
    per_rank = sum(sum(m.weight.shape) for name, m in model.named_modules() if f".{name}".endswith(linear))
    return max(1, round(num_masked / per_rank))


class _Points(TrainerCallback):
    """The test NLL of each checkpoint, for the figure alone: one small file a step, so that a resumed run has all."""

    def __init__(self, folder: Path, score: Callable[[Any], list[float]]) -> None:
        self.folder, self.score = folder, score

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.on_evaluate(args, state, control, metrics={}, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss, sums = kwargs["metrics"].get("eval_loss"), self.score(kwargs["model"])
        point = {"step": state.global_step, "validation_loss": loss, "nll_sums": sums}
        atomic_write_text(self.folder / f"{state.global_step}.json", json.dumps(point))

    def read(self) -> list[dict[str, Any]]:
        """The points by step."""
        points = [read_json(path, "remove it") for path in self.folder.glob("*.json")]
        return sorted(points, key=lambda point: int(point["step"]))
