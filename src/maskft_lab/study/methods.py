"""What each method of a study does: trains where it trains, and scores the model it ends with on the test rows."""

import json
import logging
import shutil
import time
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from maskft.adapters.model_files import load_model, read_tokenizer
from maskft.data.rows import data_hash, load_held_out, load_rows, tokenise_rows
from maskft.data.splits import problems_of, split_validation
from maskft.data.tokens import RowTokeniser
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
from maskft.tuner import MaskConfig, check_targets, find_group
from maskft.tuner.targets import default_target_modules
from maskft_lab.demo_model import fetch_demo_model
from maskft_lab.device import DEVICE
from maskft_lab.reasoning.sums import build_task, score_answer
from maskft_lab.study.checkers import IsRight, read_checker
from maskft_lab.study.config import CONTROLS, DEMO_MODEL, Domain, Method, mask_config
from maskft_lab.study.controls import control_masks
from maskft_lab.study.plan import Run

logger = logging.getLogger(__name__)

MODEL, ADAPTER, POINTS, TRAINER = "model", "adapter", "points", "trainer"
_KEPT = {"fft": MODEL, "mft": ADAPTER}  # what other runs start from


def load_domain(domain: Domain) -> tuple[DatasetDict, IsRight | None]:
    """Read or generate a domain's splits, and what scores an answer to a test row, if any are scored.

    The splits are `train`, `validation` and `test`, rows of `prompt` and `completion`. They do not depend on a run's
    seed, so that all runs share them.

    Raises:
        MaskftError: rows that are missing or malformed.
    """
    if domain.generated is not None:
        task = build_task(**{"seed": 1} | domain.generated)
        entries = list(task["test"]["entry"])
        return task.remove_columns("entry"), lambda number, answer: score_answer(entries[number], answer)
    train, test = load_rows(str(domain.dataset_name)), load_held_out(str(domain.test_dataset_name), "test")
    if domain.eval_dataset_name:
        validation = load_held_out(domain.eval_dataset_name, "validation")
    else:
        share = domain.validation_split_percentage
        train, validation = split_validation(train, validation_split_percentage=share, seed=0)
    is_right = read_checker(str(domain.test_dataset_name), domain.checker) if domain.checker else None
    return DatasetDict(train=train, validation=validation, test=test), is_right


def shared_rows(rows: Dataset, method: Method) -> Dataset:
    """The share of the training rows that a method uses."""
    return rows.select(range(max(1, round(len(rows) * method.train_share))))


def model_folder(model_name_or_path: str) -> str:
    """Where a model is read from; the demo's is fetched once."""
    return str(fetch_demo_model()) if model_name_or_path == DEMO_MODEL else model_name_or_path


def perform(run: Run) -> dict[str, Any]:
    """Carry out a run, going on from its newest checkpoint, and return its result.

    The result holds, for each test item, the sum of its NLL, at temperature 1 and at the one that suits the validation
    rows, and the number of its tokens (and whether the answer was right), the same sums at each checkpoint, and
    seconds; nothing of it was chosen on the test rows.
    """
    started = time.perf_counter()
    splits, is_right = load_domain(run.domain)
    check_inputs(run.folder, hash_inputs(splits))
    worker = _Worker(run, splits, is_right)
    result: dict[str, Any] = getattr(worker, "control" if run.method.kind in CONTROLS else run.method.kind)()
    data = {name: data_hash(rows) for name, rows in splits.items()}
    return result | {"data": data, "seconds": round(time.perf_counter() - started, 1)}


class _Worker:
    def __init__(self, run: Run, splits: DatasetDict, is_right: IsRight | None) -> None:
        self.run, self.study, self.splits, self.is_right = run, run.study, splits, is_right
        self.pretrained = model_folder(self.study.models[run.model])
        # All but the base model and the fine-tuning itself start from the best FFT.
        self.start = str(run.needs[0] / MODEL) if run.needs else self.pretrained
        self.tokenizer = read_tokenizer(self.pretrained)
        self.train_rows = shared_rows(splits["train"], run.method)
        tokenise = RowTokeniser(self.tokenizer, self.study.max_length)
        self.validation, self.test = (tokenise_rows(splits[name], tokenise) for name in ("validation", "test"))
        self.computing = torch.autocast(DEVICE, torch.bfloat16, enabled=self.study.bf16)

    def base(self) -> dict[str, Any]:
        return self.score(self.load())

    def fft(self) -> dict[str, Any]:
        return self.train(self.load())

    fft_continued = fft

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
        return self.train(model) | _size(model)

    def crossfit(self) -> dict[str, Any]:
        folder, method = self.run.folder, self.run.method
        if not (folder / ADAPTER).exists():
            run_crossfit(
                DataArguments(self.pretrained, self.run.domain.name, dtype=self.study.dtype),
                self.settings(),
                MaskArguments(**method.mask, mask_seed=self.run.seed),
                CrossFitArguments(**method.crossfit, fine_tuned_model_name_or_path=self.start),
                splits=(self.train_rows, self.splits["validation"]),
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

    def train(self, model: Any) -> dict[str, Any]:
        """Train, pick the best checkpoint on validation, score it on the test rows."""
        folder, settings, keep = self.run.folder, self.settings(), _KEPT.get(self.run.method.kind)
        tasks = load_eval_tasks(settings, self.tokenizer)
        trainer = build_trainer(model, self.tokenizer, self.train_rows, self.splits["validation"], settings)
        watch_tasks(trainer, self.tokenizer, tasks, settings)
        if self.study.curves:
            trainer.add_callback(_Points(self))
        checkpoint = newest_complete_checkpoint(folder / TRAINER)
        if checkpoint is not None:
            logger.info("Going on from %s.", checkpoint)
        with disk_errors(f"finish the run in {folder}"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if keep is not None and not (folder / keep).exists():
                with atomic_folder(folder / keep) as new:
                    trainer.model.save_pretrained(new)
                    self.tokenizer.save_pretrained(new)
        points = [read_json(path, "remove it") for path in (folder / POINTS).glob("*.json")]
        result = self.score(trainer.model) | {
            "best_step": trainer.state.best_global_step,
            "best_validation_loss": trainer.state.best_metric,
            "num_steps": trainer.state.max_steps,
            "points": sorted(points, key=lambda point: int(point["step"])),
        }
        shutil.rmtree(folder / TRAINER)
        return result

    def score(self, model: Any) -> dict[str, Any]:
        model.to(DEVICE)  # where a trainer's is already; else bf16 autocast of a GPU would not reach it
        if isinstance(model, PeftModel):
            model.merge_adapter()
        with self.computing:
            chosen_by, test = (token_nll(model, rows, at_temperatures=True) for rows in (self.validation, self.test))
            if self.is_right is not None:
                prompts, most = list(self.splits["test"]["prompt"]), self.run.domain.max_new_tokens
                answers, _ = generate_answers(model, self.tokenizer, prompts, max_new_tokens=most)
        temperature, sums = test.at_best_temperature(chosen_by)
        scores: dict[str, Any] = {"nll_sums": test.sums.tolist(), "num_tokens": test.num_tokens.tolist()}
        scores |= {"temperature": temperature, "nll_sums_at_temperature": sums.tolist()}
        numbers: dict[Any, int] = {}
        problems = [numbers.setdefault(problem, len(numbers)) for problem in problems_of(self.test)]
        if len(numbers) < len(problems):
            scores["problems"] = problems
        result: dict[str, Any] = {"test": scores}
        if self.is_right is not None:
            scores["correct"] = [int(self.is_right(number, answer)) for number, answer in enumerate(answers)]
            result["answers"] = answers[:10]
        if isinstance(model, PeftModel):
            model.unmerge_adapter()
        return result


def _size(model: Any) -> dict[str, Any]:
    group = find_group(model, "default")
    return {"kept_share": group.kept_share(), "num_trained": group.num_weights()}


def lora_config(model: Any, settings: dict[str, Any], mask: dict[str, Any]) -> LoraConfig:
    """LoRA on all linear layers, of the rank that matches a mask of these settings, where `settings` say nothing else.

    Raises:
        MaskftError: a layer that the model does not have.
    """
    # PEFT passes over a layer that the model does not have, where it has another.
    check_targets(MaskConfig(layers_to_transform=settings.get("layers_to_transform") or None), model)
    rank = settings.get("r") or matched_rank(model, mask)
    # Names, for PEFT takes layers_to_transform beside no "all-linear".
    default = {"r": rank, "lora_alpha": rank, "target_modules": default_target_modules(model)}
    return LoraConfig(task_type="CAUSAL_LM", **default | settings)


def matched_rank(model: Any, mask: dict[str, Any]) -> int:
    """The LoRA rank over all linear layers that trains about as many values as a mask of these settings, at least 1."""
    config = mask_config(mask, "the study's model")
    num_masked = sum(model.get_submodule(name).weight.numel() for name in check_targets(config, model))
    linear = tuple(f".{name}" for name in default_target_modules(model))
    per_rank = sum(sum(m.weight.shape) for name, m in model.named_modules() if f".{name}".endswith(linear))
    return max(1, round(num_masked / per_rank))


class _Points(TrainerCallback):
    """The test NLL of each checkpoint, for the figure alone: one small file a step, so that a resumed run has all."""

    def __init__(self, worker: _Worker) -> None:
        self.worker = worker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.on_evaluate(args, state, control, metrics={}, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.worker.computing:
            sums = token_nll(kwargs["model"], self.worker.test).sums.tolist()
        point = {"step": state.global_step, "validation_loss": kwargs["metrics"].get("eval_loss"), "nll_sums": sums}
        atomic_write_text(self.worker.run.folder / POINTS / f"{state.global_step}.json", json.dumps(point))
