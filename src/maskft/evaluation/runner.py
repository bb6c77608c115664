"""`maskft eval`: several models and adapters on the same items, every answer kept, scores from the kept answers."""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config
from maskft.data.splits import group_key
from maskft.data.tokens import tokenise_row
from maskft.errors import MaskftError
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.models import ModelSpec, check_models, load_models, model_hashes, parse_models
from maskft.evaluation.samples import Row, open_folder, sample_folder, write_samples
from maskft.evaluation.scores import AGGREGATES_FILE, RESULTS_FILE, build_results, summarise
from maskft.evaluation.table import render_results
from maskft.evaluation.task import DEFAULT_MAX_NEW_TOKENS, EvalTask
from maskft.evaluation.tasks import load_tasks
from maskft.storage.environment import versions
from maskft.storage.files import atomic_write_text, require_writable
from maskft.storage.json_text import json_hash

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"


def run_eval(arguments: EvalArguments, console: Console | None = None) -> Row:
    """Score every model on every task, keep the answers, write `results.json`, and print its tables.

    Answers lie in `output_dir/MODEL/TASK/samples.jsonl`, those of a task that has not ended in `answers.jsonl` beside
    it; those that are there already are not asked for again.

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
    tasks = load_tasks(str(arguments.tasks), arguments.task_settings)
    tokenizers = check_models(specs)
    hashes = {spec: model_hashes(spec) for spec in specs}
    jobs = [_Job(spec, task, tokenizers[spec.base], arguments, hashes[spec]) for spec in specs for task in tasks]
    for job in jobs:
        job.check()
    for job in jobs:
        job.open()
    pending = [spec for spec in specs if any(job.spec == spec and job.missing_draws for job in jobs)]
    for spec, model in load_models(pending, dtype=arguments.dtype, force=arguments.force):
        for job in jobs:
            if job.spec == spec and job.missing_draws:
                console.print(f"{spec.name} on {job.task.name}", markup=False)
                job.run(model)
    return _finish(output_dir, build_results([(job.protocol, job.folder) for job in jobs]), console)


@dataclass
class _Job:
    """One model on one task."""

    spec: ModelSpec
    task: EvalTask
    tokenizer: PreTrainedTokenizerBase
    arguments: EvalArguments
    weights: dict[str, str]

    def __post_init__(self) -> None:
        self.folder = sample_folder(Path(str(self.arguments.output_dir)), self.spec.name, self.task.name)
        self.rows: list[Row] = []

    @cached_property
    def docs(self) -> list[Row]:
        """The items that are asked."""
        return self.task.docs()

    @property
    def missing_draws(self) -> list[int]:
        """Which answers to each item are still to be drawn."""
        done = {row.get("draw", 0) for row in self.rows}
        return [draw for draw in range(self.num_draws) if draw not in done]

    @property
    def num_draws(self) -> int:
        return 1 if self.task.generation is None else self.arguments.num_samples

    @cached_property
    def protocol(self) -> Row:
        """What decides the scores."""
        task, config, arguments = self.task, self.task.task.config, self.arguments
        template = self.tokenizer.chat_template if self._uses_template else None
        generation = self.task.generation
        return {
            "model": self.spec.name,
            "task": task.name,
            "groups": task.groups,
            "version": str(task.task.VERSION),
            "num_fewshot": config.num_fewshot,
            "filters": [pipeline.name for pipeline in task.task._filters],
            "generation_kwargs": generation,
            "num_samples": self.num_draws,
            "chat_template": json_hash(template)[:16] if template else None,
            "fewshot_as_multiturn": bool(template and arguments.fewshot_as_multiturn),
            "system_instruction": arguments.system_instruction,
            "limit": arguments.limit,
            "seed": arguments.seed,
            "n": len(self.docs),
            "data": {"sha256": json_hash(self.docs)},
            "dtype": resolved_dtype(self.spec.base, arguments.dtype),
            "batch_size": arguments.batch_size,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "weights": self.weights,
            "versions": versions("lm_eval", "reasoning_gym", "nltk", "langdetect"),
        }

    @property
    def _uses_template(self) -> bool:
        if self.task.is_nll:  # as training renders these rows
            return not isinstance(self.docs[0]["prompt"], str)
        return self.arguments.apply_chat_template

    def check(self) -> None:
        """Refuse what cannot be asked, before any weight is loaded."""
        if self._uses_template and self.tokenizer.chat_template is None:
            what = f"the rows of {self.task.name}" if self.task.is_nll else "--apply_chat_template"
            raise MaskftError(
                f"The tokenizer of {self.spec.base!r} has no chat template for {what}; give plain prompts, or the chat "
                "version of the model."
            )
        context = getattr(read_config(self.spec.base), "max_position_embeddings", None)
        if self.task.generation is not None:
            longest = self.task.generation.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS)
            if context is not None and longest >= context:
                raise MaskftError(
                    f"Answers to {self.task.name} may have {longest} tokens, but the context of {self.spec.base} has "
                    f"{context} for prompt and answer together; lower it with --max_new_tokens."
                )
        problems = {str(number) for number in range(len(self.docs))}
        if self.task.is_nll:
            problems = self._scored_prompts(context)
        if len(problems) < 2:
            raise MaskftError(
                f"{self.task.name} has {len(problems)} problem to score, and an interval needs at least 2 (rows of one "
                "prompt or conversation are one); give more rows."
            )

    def _scored_prompts(self, context: int | None) -> set[str]:
        scored = set()
        for doc in self.docs:
            labels = tokenise_row(doc, self.tokenizer, context)["labels"]
            # The first token is never scored, since nothing stands before it.
            if any(label != -100 for label in labels[1:]):
                scored.add(group_key(doc["prompt"]))
        if not scored:
            raise MaskftError(
                f"{self.task.name} has no token that {self.spec.base} could score: all {len(self.docs)} prompts fill "
                f"its context of {context} tokens; give shorter rows or a model with a longer context."
            )
        return scored

    def open(self) -> None:
        """Look what is there already."""
        self.rows = open_folder(self.folder, self.protocol)

    def run(self, model: Any) -> None:
        """Ask for what is missing; samples are written after each draw."""
        from maskft.evaluation.language_model import KeptAnswers, LanguageModel, ask

        language_model = LanguageModel(model, self.tokenizer, self.arguments.batch_size)
        language_model.cache_hook = KeptAnswers(self.folder / ANSWERS_FILE)
        for draw in self.missing_draws:
            rows, aggregates = ask(
                language_model,
                self.task,
                draw=draw,
                apply_chat_template=self._uses_template and not self.task.is_nll,
                fewshot_as_multiturn=self.protocol["fewshot_as_multiturn"],
                system_instruction=self.arguments.system_instruction,
            )
            self.rows += [({"draw": draw} if self.num_draws > 1 else {}) | row for row in rows]
            write_samples(self.folder, self.rows)
            atomic_write_text(self.folder / AGGREGATES_FILE, json.dumps(aggregates, indent=1) + "\n")
        (self.folder / ANSWERS_FILE).unlink(missing_ok=True)


def resolved_dtype(base: str, dtype: str) -> str:
    """The dtype that `--dtype auto` means for a model, from its configuration."""
    if dtype != "auto":
        return dtype
    return str(read_config(base).dtype or "auto").removeprefix("torch.")


def _finish(output_dir: Path, results: Row, console: Console) -> Row:
    atomic_write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    console.print(render_results(results))
    console.print(f"Wrote {output_dir / RESULTS_FILE}", highlight=False, markup=False)
    return results
