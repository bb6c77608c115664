"""Seconds of maskft eval for a task, checks and files included, against lm-eval's own run of the same task.

    python benchmarks/eval_throughput.py [--model FOLDER] [--tasks reasoning_gym:chain_sum] [--rounds 3]

Both ask the same loaded model for the same items, in turn.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from harness import DEVICE, about, config_of, in_turn, rows_against, write_rows
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.evaluation.language_model import KeptAnswers, LanguageModel, ask
from maskft.evaluation.samples import write_samples
from maskft.evaluation.tasks import EvalTask, TaskSettings, load_tasks
from maskft_lab.demo_model import fetch_demo_model


def theirs(model: Any, tokenizer: Any, task: EvalTask, batch_size: int) -> None:
    """lm-eval's evaluation, with its samples."""
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with task.seeded():
        evaluate(
            language_model,
            {"tasks": {task.name: task.task}, "groups": {}},
            limit=task.settings.limit,
            bootstrap_iters=0,
            apply_chat_template=True,
        )


def ours(model: Any, tokenizer: Any, task: EvalTask, batch_size: int) -> None:
    """maskft eval's, which keeps every answer as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        language_model = LanguageModel(model, tokenizer, batch_size)
        language_model.cache_hook = KeptAnswers(Path(folder) / "answers.jsonl")
        write_samples(Path(folder), ask(language_model, task, apply_chat_template=True)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a chat model. Default: the demo's.")
    parser.add_argument("--tasks", default="reasoning_gym:chain_sum")
    parser.add_argument("--data_dir", type=Path, help="Local task data, as maskft eval reads them.")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    folder = given.model or str(fetch_demo_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE).eval()
    settings = TaskSettings(
        data_dir=given.data_dir, limit=given.limit, gen_kwargs={"max_gen_toks": given.max_new_tokens}
    )
    config = config_of(given, "eval_throughput", folder, "data_dir", "tasks")
    rows = []
    for task in load_tasks(given.tasks, settings):
        common = (model, tokenizer, task, given.batch_size)
        runs = {"lm-eval": partial(theirs, *common), "maskft eval": partial(ours, *common)}
        seconds = in_turn(runs, given.rounds)
        rows += [{"task": task.name} | row | about(**config) for row in rows_against(seconds, "lm-eval")]
    write_rows(rows, given.output_file)


if __name__ == "__main__":
    main()
