"""`maskft eval`: several models and adapters on the same items, every answer kept, scores from the kept answers."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_files import model_limits
from maskft.adapters.model_layout import read_config
from maskft.data.forms import problem_of
from maskft.data.tokens import RowTokeniser, has_answer, render
from maskft.errors import MaskftError
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.models import ModelSpec, check_models, load_models, parse_models
from maskft.evaluation.samples import AGGREGATES_FILE, ANSWERS_FILE, Row, open_folder, sample_folder, write_samples
from maskft.evaluation.scores import RESULTS_FILE, build_results, summarise
from maskft.evaluation.table import render_results
from maskft.evaluation.tasks import EvalTask, load_tasks
from maskft.report import narrow_table
from maskft.storage.environment import versions
from maskft.storage.files import atomic_write_text, require_writable
from maskft.storage.json_text import json_hash


def run_eval(arguments: EvalArguments, console: Console | None = None) -> Row:
    """Score every model on every task, keep the answers, write `results.json` (the return value), print its tables.

    Answers lie in `output_dir/MODEL/TASK/samples.jsonl`, those of a task that has not ended in `answers.jsonl` beside
    it; those that are there already are not asked for again.

    Raises:
        MaskftError: something given cannot be used; nearly all of it is found before any weight is loaded.
    """
    console = Console(quiet=True) if console is None else console
    output_dir = Path(str(arguments.output_dir))
    require_writable(output_dir)
    results = summarise(output_dir) if arguments.rescore else _answered(output_dir, arguments, console)
    atomic_write_text(output_dir / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for table in render_results(results):
        console.print(narrow_table(table, console.width, num_keys=2))
    console.print(f"Wrote {output_dir / RESULTS_FILE}")
    return results


def _answered(output_dir: Path, arguments: EvalArguments, console: Console) -> Row:
    specs = parse_models(str(arguments.models))
    tasks = load_tasks(str(arguments.tasks), arguments.task_settings)
    tokenizers = check_models(specs)
    jobs = [_Job(spec, task, tokenizers[spec], arguments) for spec in specs for task in tasks]
    for job in jobs:
        job.check()
    for job in jobs:
        job.rows = open_folder(job.folder, job.protocol)
    pending = {spec: [job for job in jobs if job.spec == spec and job.missing_draws] for spec in specs}
    wanted = [spec for spec in specs if pending[spec]]
    for spec, model in load_models(wanted, dtype=arguments.dtype, force=arguments.force):
        for job in pending[spec]:
            console.print(f"{spec.name} on {job.task.name}")
            job.run(model)
        del model  # before the next base is loaded
    return build_results([(job.protocol, job.folder) for job in jobs])


@dataclass
class _Job:
    """One model on one task; `rows` are the samples that there are."""

    spec: ModelSpec
    task: EvalTask
    tokenizer: PreTrainedTokenizerBase
    arguments: EvalArguments
    rows: list[Row] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return sample_folder(Path(str(self.arguments.output_dir)), self.spec.name, self.task.name)

    @property
    def num_draws(self) -> int:
        return 1 if self.task.generation is None else self.arguments.num_samples

    @property
    def missing_draws(self) -> list[int]:
        """Which answers to each item are still to be drawn."""
        return sorted(set(range(self.num_draws)) - {row.get("draw", 0) for row in self.rows})

    @property
    def uses_template(self) -> bool:
        if self.task.is_nll:  # as training renders these rows
            return not isinstance(self.task.docs[0]["prompt"], str)
        return self.arguments.apply_chat_template

    @cached_property
    def protocol(self) -> Row:
        """What decides the scores."""
        task, config, arguments = self.task, self.task.task.config, self.arguments
        template: Any = self.tokenizer.chat_template if self.uses_template else None
        if "strftime_now" in str(template):  # which writes the date: tomorrow it is another template
            template = [template, render(self.tokenizer, [{"role": "user", "content": ""}], tokenize=False)]
        dtype = str(read_config(self.spec.base).dtype or "auto") if arguments.dtype == "auto" else arguments.dtype
        filters = [pipeline.name for pipeline in task.task._filters]
        row: Row = {"model": self.spec.name, "task": task.name, "groups": task.groups}
        row |= {"num_fewshot": config.num_fewshot, "filters": filters, "generation_kwargs": task.generation}
        row |= {"num_samples": self.num_draws, "chat_template": json_hash(template)[:16] if template else None}
        multiturn = bool(template and arguments.fewshot_as_multiturn)
        row |= {"fewshot_as_multiturn": multiturn, "version": str(task.task.VERSION)}
        row |= {name: getattr(arguments, name) for name in ("system_instruction", "limit", "seed", "batch_size")}
        row |= {"n": len(task.docs), "data": {"sha256": json_hash(task.docs)}, "dtype": dtype.removeprefix("torch.")}
        row |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "weights": self.spec.hashes()}
        return row | {"versions": versions("lm_eval", "reasoning_gym", "nltk", "langdetect")}

    def check(self) -> None:
        """Refuse what cannot be asked, before any weight is loaded."""
        base, name = self.spec.base, self.task.name
        if self.uses_template and self.tokenizer.chat_template is None:
            what = f"the rows of {name}" if self.task.is_nll else "--apply_chat_template"
            hint = "give plain prompts, or the chat version of the model."
            raise MaskftError(f"The tokenizer of {base!r} has no chat template for {what}; {hint}")
        context = getattr(read_config(base), "max_position_embeddings", None)
        longest = self.task.generation["max_gen_toks"] if self.task.generation else 0
        if context is not None and longest >= context:
            room = f"the context of {base} has {context} with the prompt; lower it with --max_new_tokens."
            raise MaskftError(f"Answers to {name} may have {longest} tokens, but {room}")
        num_problems = len(self._scored_prompts(context)) if self.task.is_nll else len(self.task.docs)
        if num_problems < 2:
            rule = "an interval needs at least 2 (rows of one prompt or conversation are one); give more rows."
            raise MaskftError(f"{name} has {num_problems} problem to score, and {rule}")

    def _scored_prompts(self, context: int | None) -> set[str]:
        tokenise = RowTokeniser(self.tokenizer, context, limits=model_limits(self.spec.base))
        scored = set()
        for index, doc in enumerate(self.task.docs):
            try:
                scored |= {problem_of(doc)} if any(map(has_answer, tokenise(doc))) else set()
            except MaskftError as error:
                raise MaskftError(f"{self.task.name}, row {index}: {error}") from error
        if not scored:
            why = f"all {len(self.task.docs)} prompts fill its context of {context} tokens"
            hint = "give shorter rows or a model with a longer context."
            raise MaskftError(f"{self.task.name} has no token that {self.spec.base} could score: {why}; {hint}")
        return scored

    def run(self, model: Any) -> None:
        """Ask for what is missing; samples are written after each draw."""
        from maskft.evaluation.language_model import LanguageModel, ask

        answers = self.folder / ANSWERS_FILE
        language_model = LanguageModel(model, self.tokenizer, self.arguments.batch_size, answers)
        for draw in self.missing_draws:
            rows, aggregates = ask(
                language_model,
                self.task,
                draw=draw,
                apply_chat_template=self.uses_template and not self.task.is_nll,
                fewshot_as_multiturn=self.protocol["fewshot_as_multiturn"],
                system_instruction=self.arguments.system_instruction,
            )
            self.rows += [({"draw": draw} if self.num_draws > 1 else {}) | row for row in rows]
            # The samples come last, since who finds them asks for nothing more.
            atomic_write_text(self.folder / AGGREGATES_FILE, json.dumps(aggregates, indent=1) + "\n")
            write_samples(self.folder, self.rows)
        answers.unlink(missing_ok=True)
