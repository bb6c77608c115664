"""`maskft eval`: several models and adapters over the same items, every answer kept, scores from the kept answers."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, PreTrainedTokenizerBase

from maskft.data.splits import group_key
from maskft.data.tokens import tokenise_row
from maskft.errors import MaskftError, nearest
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.generation import Decoding, generate_batches
from maskft.evaluation.lm_eval_tasks import CODE_TASKS, DEFINITIONS, LmEvalTask, check_files
from maskft.evaluation.models import ModelSpec, check_models, load_models, model_hashes, parse_models
from maskft.evaluation.samples import Row, SampleFile, sample_folder
from maskft.evaluation.scores import RESULTS_FILE, build_results, summarise
from maskft.evaluation.table import render_results
from maskft.evaluation.tasks import (
    GenerationTask,
    Item,
    NllTask,
    ReasoningGymTask,
    Task,
    TaskSettings,
    chat_template_of,
)
from maskft.scoring.nll import token_nll
from maskft.scoring.statistics import Array
from maskft.storage.environment import versions
from maskft.storage.files import atomic_write_text, require_writable
from maskft.storage.json_text import json_hash

logger = logging.getLogger(__name__)


def run_eval(arguments: EvalArguments, console: Console | None = None) -> Row:
    """Score every model on every task, keep the answers, write `results.json`, and print its tables.

    Answers lie in `output_dir/MODEL/TASK/samples.jsonl`; those that are there already are not asked for again.

    Returns:
        What `results.json` holds: `scores` and `comparisons`.

    Raises:
        MaskftError: something given cannot be used; nearly all of it is found before any weight is loaded.
    """
    console = Console(quiet=True) if console is None else console
    output_dir = Path(str(arguments.output_dir))
    require_writable(output_dir)
    if arguments.rescore:
        return _finish(output_dir, summarise(output_dir), console)
    specs = parse_models(str(arguments.models))
    tasks = load_tasks(str(arguments.tasks), settings_of(arguments))
    tokenizers = check_models(specs)
    for spec in specs:
        _check_templates(spec, tokenizers[spec.base], tasks, arguments.apply_chat_template)
    jobs = [_Job(spec, task, tokenizers[spec.base], arguments, output_dir) for spec in specs for task in tasks]
    for job in jobs:
        job.encode()
    for job in jobs:
        job.open()
    pending = [spec for spec in specs if any(job.spec == spec and not job.is_complete() for job in jobs)]
    for spec, model in load_models(pending, dtype=arguments.dtype, force=arguments.force):
        for job in jobs:
            if job.spec == spec and not job.is_complete():
                job.run(model, console)
    return _finish(output_dir, build_results([(job.protocol, job.folder) for job in jobs]), console)


def settings_of(arguments: EvalArguments) -> TaskSettings:
    """The part of the arguments that decides what the tasks hold."""
    return TaskSettings(
        data_dir=Path(arguments.data_dir) if arguments.data_dir else None,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        seed=arguments.seed,
        allow_code_execution=arguments.allow_code_execution,
    )


def load_tasks(names: str, settings: TaskSettings) -> list[Task]:
    """The tasks of a comma-separated list; all names and files are checked before the first one is loaded.

    Raises:
        MaskftError: an unknown name, a missing file, code that may not be executed, or nothing left to run.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        _check_task(name, settings)
    tasks = [_load_task(name, settings) for name in wanted]
    for task in tasks:
        num_shots = 0 if isinstance(task, NllTask) else task.protocol()["shots"]
        if settings.num_fewshot and settings.num_fewshot != num_shots:
            logger.warning(
                "%s is asked with %d worked examples: --num_fewshot %d has no effect on it.",
                task.name,
                num_shots,
                settings.num_fewshot,
            )
    return tasks


def _check_task(name: str, settings: TaskSettings) -> None:
    if name.startswith(("nll:", "reasoning_gym:")):
        return
    if name == "alpaca_eval":
        raise MaskftError(
            "maskft eval no longer asks AlpacaEval's judge; write answers with examples/alpaca_eval.py and give them "
            "to the command `alpaca_eval`."
        )
    if name not in DEFINITIONS:
        known = [*DEFINITIONS, "nll:FILE", "reasoning_gym:NAME"]
        raise MaskftError(f"There is no task {name!r}{nearest(name, known)}; correct its name.")
    if name in CODE_TASKS and not settings.allow_code_execution:
        raise MaskftError(
            f"{name} runs the code that the model writes; allow it with --allow_code_execution "
            "(docs/evaluation.md says what its sandbox stops)."
        )
    check_files(name, settings.data_dir)


def _load_task(name: str, settings: TaskSettings) -> Task:
    if name.startswith("nll:"):
        return NllTask(name, settings)
    if name.startswith("reasoning_gym:"):
        return ReasoningGymTask(name, settings)
    return LmEvalTask(name, settings)


def _check_templates(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], apply_chat_template: bool
) -> None:
    if tokenizer.chat_template is not None:
        return
    if apply_chat_template:
        raise MaskftError(
            f"The tokenizer of {spec.base!r} has no chat template for --apply_chat_template; leave the flag out "
            "or give the chat version of the model."
        )
    for task in tasks:
        if isinstance(task, NllTask) and task.needs_chat_template:
            raise MaskftError(
                f"The rows of {task.name} are conversations, but the tokenizer of {spec.base!r} has no chat template; "
                'give rows of plain {"prompt": "...", "completion": "..."} or a model with a template.'
            )


@dataclass
class _Job:
    """One model on one task."""

    spec: ModelSpec
    task: Task
    tokenizer: PreTrainedTokenizerBase
    arguments: EvalArguments
    output_dir: Path

    def __post_init__(self) -> None:
        self.encoded: dict[str, dict[str, list[int]]] = {}
        self.cut: set[str] = set()
        self.folder = sample_folder(self.output_dir, self.spec.name, self.task.name)
        self.protocol = self._protocol()

    def _protocol(self) -> Row:
        arguments = self.arguments
        protocol: Row = {"model": self.spec.name, "task": self.task.name}
        protocol |= self.task.protocol()
        protocol |= {
            "n": len(self.task.items),
            "limit": arguments.limit,
            "seed": arguments.seed,
            "dtype": resolved_dtype(self.spec.base, arguments.dtype),
            "batch_size": arguments.batch_size,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "weights": model_hashes(self.spec),
            "versions": versions("lm_eval", "reasoning_gym", "nltk", "langdetect"),
        }
        template = self.tokenizer.chat_template
        uses_template = (
            self.task.needs_chat_template if isinstance(self.task, NllTask) else arguments.apply_chat_template
        )
        protocol["chat_template"] = json_hash(template)[:16] if uses_template else None
        if isinstance(self.task, GenerationTask):
            protocol |= {
                "max_new_tokens": self.decoding.max_new_tokens,
                "stop": list(self.decoding.stop),
                "temperature": arguments.temperature,
                "num_samples": arguments.num_samples,
            }
        return protocol

    @property
    def decoding(self) -> Decoding:
        assert isinstance(self.task, GenerationTask)
        return Decoding(
            max_new_tokens=self.arguments.max_new_tokens or self.task.max_new_tokens,
            stop=tuple(self.task.stop),
            batch_size=self.arguments.batch_size,
            temperature=self.arguments.temperature,
            seed=self.arguments.seed,
        )

    @property
    def num_draws(self) -> int:
        return 1 if isinstance(self.task, NllTask) else self.arguments.num_samples

    def encode(self) -> None:
        """Tokenise the rows of a task of losses, as far as the model's context reaches.

        Raises:
            MaskftError: no token of the answers is within the context, or there are too few problems for an interval.
        """
        if not isinstance(self.task, NllTask):
            self._require_two({item.id for item in self.task.items})
            return
        context = getattr(AutoConfig.from_pretrained(self.spec.base), "max_position_embeddings", None)
        rows = {item.id: tokenise_row(item.content, self.tokenizer) for item in self.task.items}
        self.cut = {key for key, row in rows.items() if context is not None and len(row["input_ids"]) > context}
        self.encoded = {key: {column: ids[:context] for column, ids in row.items()} for key, row in rows.items()}
        # The first token is never scored, since nothing stands before it.
        scored = {key for key, row in self.encoded.items() if any(label != -100 for label in row["labels"][1:])}
        if not scored:
            raise MaskftError(
                f"{self.task.name} has no token that {self.spec.base} could score: all {len(rows)} prompts fill its "
                f"context of {context} tokens; give shorter rows or a model with a longer context."
            )
        self._require_two({group_key(item.content["prompt"]) for item in self.task.items if item.id in scored})

    def _require_two(self, problems: set[str]) -> None:
        if len(problems) < 2:
            raise MaskftError(
                f"{self.task.name} has {len(problems)} problem to score, and an interval needs at least 2 (rows of one "
                "prompt or conversation are one); give more rows."
            )

    def open(self) -> None:
        """Look what is there already.

        Raises:
            MaskftError: samples of another protocol, or damaged ones.
        """
        self.file = SampleFile(self.folder, self.protocol)

    def is_complete(self) -> bool:
        return all(self.file.has(item.id, draw) for item in self.task.items for draw in range(self.num_draws))

    def run(self, model: Any, console: Console) -> None:
        started = time.perf_counter()
        total = len(self.task.items) * self.num_draws
        num_tokens = 0
        with _progress(f"{self.spec.name}: {self.task.name}", total, console) as advance:
            batches = self._nll(model) if isinstance(self.task, NllTask) else self._answers(model)
            for rows in batches:
                self.file.append(rows)
                num_tokens += sum(row["num_tokens"] for row in rows)
                advance(len(rows))
        seconds = time.perf_counter() - started
        logger.info(
            "%s on %s: %d tokens in %.1f s (%.1f tokens/s).",
            self.spec.name,
            self.task.name,
            num_tokens,
            seconds,
            num_tokens / seconds,
        )

    def _answers(self, model: Any) -> Iterator[list[Row]]:
        task = self.task
        assert isinstance(task, GenerationTask)
        chat = chat_template_of(self.tokenizer) if self.arguments.apply_chat_template else None
        prompt_of = {item.id: task.prompt(item, chat) for item in task.items}
        entries: list[tuple[Item, int]] = [(item, draw) for item in task.items for draw in range(self.num_draws)]
        batches = generate_batches(
            model,
            self.tokenizer,
            [prompt_of[item.id] for item, _ in entries],
            self.decoding,
            ids=[f"{item.id} {draw:05}" for item, draw in entries],
            # A chat template writes its own beginning of the sequence.
            add_special_tokens=chat is None,
            done=lambda places: all(self.file.has(entries[i][0].id, entries[i][1]) for i in places),
        )
        for batch in batches:
            rows = []
            for place, answer in batch:
                item, draw = entries[place]
                verdict = task.judge(item, answer.text)
                rows.append(
                    {"item": item.id}
                    | ({"draw": draw} if self.num_draws > 1 else {})
                    | {"prompt": prompt_of[item.id], "output": answer.text, "num_tokens": answer.num_tokens}
                    | ({"prompt_cut": True} if answer.is_prompt_cut else {})
                    | {"extracted": verdict.extracted, "verdict": verdict.verdict}
                )
            if any("prompt_cut" in row for row in rows):
                logger.warning("%s: a prompt is longer than the model's context and lost its beginning.", task.name)
            yield rows

    def _nll(self, model: Any) -> Iterator[list[Row]]:
        order = sorted(self.task.items, key=lambda item: (len(self.encoded[item.id]["input_ids"]), item.id))
        if self.cut:
            logger.warning(
                "%s: %d of %d rows are longer than the context of %s and lost their end.",
                self.task.name,
                len(self.cut),
                len(order),
                self.spec.base,
            )
        size = self.arguments.batch_size
        for start in range(0, len(order), size):
            items = order[start : start + size]
            if all(self.file.has(item.id) for item in items):
                continue
            result = token_nll(model, Dataset.from_list([self.encoded[item.id] for item in items]), batch_size=size)
            self._check_finite(result.sums)
            yield [
                {
                    "item": item.id,
                    "prompt": item.content["prompt"],
                    "output": item.content["completion"],
                    "num_tokens": int(count),
                }
                | ({"row_cut": True} if item.id in self.cut else {})
                | {"extracted": None, "verdict": {"nll": {"sum": float(total), "count": int(count)}}}
                for item, total, count in zip(items, result.sums, result.num_tokens, strict=True)
            ]

    def _check_finite(self, sums: Array) -> None:
        if not np.isfinite(sums).all():
            raise MaskftError(
                f"{self.spec.name} gives {self.task.name} a loss that is no finite number, with weights in "
                f"{self.protocol['dtype']}; try --dtype float32, and if that changes nothing, its weights are damaged: "
                "give another model."
            )


def resolved_dtype(base: str, dtype: str) -> str:
    """The dtype that `--dtype auto` means for a model, from its configuration."""
    if dtype != "auto":
        return dtype
    return str(AutoConfig.from_pretrained(base).dtype or "auto").removeprefix("torch.")


def _finish(output_dir: Path, results: Row, console: Console) -> Row:
    atomic_write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    console.print(render_results(results))
    console.print(f"Wrote {output_dir / RESULTS_FILE}", highlight=False, markup=False)
    return results


@contextmanager
def _progress(title: str, total: int, console: Console) -> Iterator[Any]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda num: progress.advance(bar, num)
