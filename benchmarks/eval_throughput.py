"""maskft eval against lm-eval's own run of the same tasks: whether both say the same, and their seconds.

    python benchmarks/eval_throughput.py --data_dir FOLDER [--model FOLDER] [--tasks gsm8k,ifeval] [--rounds 3]

Every field of every sample is compared with those of lm-eval's `simple_evaluate`. For the seconds both ask the same
loaded model, in turn; ours keep each answer as it comes. FOLDER holds GSM8K and IFEval (docs/how-to/eval.md); ARC-Easy
and MMLU's astronomy are asked with the 24 questions of `astronomy.jsonl`, written for this.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
from harness import DEVICE, about, config_of, in_turn, rows_against, write_rows
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.evaluation.language_model import LanguageModel, ask
from maskft.evaluation.local_data import served
from maskft.evaluation.samples import read_samples, write_samples
from maskft.evaluation.tasks import EvalTask, TaskSettings, load_tasks
from maskft.storage.json_text import plain
from maskft_lab.demo_model import fetch_demo_model

QUESTIONS = Path(__file__).with_name("astronomy.jsonl")
Rows = list[dict[str, Any]]


def data_folder(folder: Path, given: Path) -> Path:
    """GSM8K and IFEval as given, and our questions in the layout of ARC-Easy and of MMLU's astronomy."""
    for name in ("gsm8k", "ifeval"):
        (folder / name).symlink_to((given / name).resolve())
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    labels = ["A", "B", "C", "D"]
    arc = [
        {
            "question": r["question"],
            "choices": {"text": r["choices"], "label": labels},
            "answerKey": labels[r["answer"]],
        }
        for r in rows
    ]
    layouts = {"ai2_arc/ARC-Easy": arc, "mmlu/astronomy": [row | {"subject": "astronomy"} for row in rows]}
    for name, of in layouts.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    return folder


def chat(task: EvalTask) -> dict[str, bool]:
    """IFEval is asked of a chat, the other tasks as text."""
    return {"apply_chat_template": task.name == "ifeval", "fewshot_as_multiturn": task.name == "ifeval"}


def ours(model: Any, tokenizer: Any, task: EvalTask, batch_size: int) -> Rows:
    """maskft eval's run, its files included."""
    with tempfile.TemporaryDirectory() as folder:
        language_model = LanguageModel(model, tokenizer, batch_size, Path(folder, "answers.jsonl"))
        write_samples(Path(folder), ask(language_model, task, **chat(task))[0])
        return read_samples(Path(folder))


def theirs(model: Any, tokenizer: Any, task: EvalTask, batch_size: int) -> None:
    """lm-eval's evaluation of the loaded task."""
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    given = {"limit": task.settings.limit, "bootstrap_iters": 0} | chat(task)
    with task.seeded():
        lm_eval.evaluate(language_model, {"tasks": {task.name: task.task}, "groups": {}}, **given)


def their_samples(model: Any, tokenizer: Any, task: EvalTask, batch_size: int) -> Rows:
    """Those of lm-eval's own `simple_evaluate`, which loads the task itself; its report of the machine takes 9 s."""
    folders = [path for path in (Path(lm_eval.__file__).parent / "tasks").iterdir() if task.name.startswith(path.name)]
    given = {"limit": task.settings.limit, "bootstrap_iters": 0} | chat(task)
    given |= {"task_manager": TaskManager(include_path=list(map(str, folders)), include_defaults=False)}
    given |= {"gen_kwargs": {"max_gen_toks": task.settings.gen_kwargs["max_gen_toks"]}} if task.generation else {}
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with served(task.name, task.settings.data_dir), patch("lm_eval.evaluator.add_env_info"):
        results = lm_eval.simple_evaluate(language_model, tasks=[task.name], **given)
    return list(plain(results["samples"][task.name]))


def count(run: Callable[[], object], seconds: list[float]) -> None:
    """Note the processor's seconds of a run, which other programs on the machine change little."""
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a chat model. Default: the demo's.")
    parser.add_argument("--tasks", default="gsm8k,ifeval,arc_easy,mmlu_astronomy")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with gsm8k and ifeval.")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", help="What else ran on the machine, for the rows.")
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    folder = given.model or str(fetch_demo_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE).eval()
    config = config_of(given, "eval_throughput", folder, "data_dir", "tasks")
    rows = []
    with tempfile.TemporaryDirectory() as data:
        data_dir = data_folder(Path(data), given.data_dir)
        gen_kwargs = {"max_gen_toks": given.max_new_tokens}
        for task in load_tasks(given.tasks, TaskSettings(data_dir, limit=given.limit, gen_kwargs=gen_kwargs)):
            common = (model, tokenizer, task, given.batch_size)
            found, expected = ours(*common), their_samples(*common)
            pairs = zip(found, expected, strict=True)
            same = {"task": task.name, "records": len(found), "different": sum(a != b for a, b in pairs)}
            runs = {"lm-eval": partial(theirs, *common), "maskft eval": partial(ours, *common)}
            cpu: dict[str, list[float]] = {name: [] for name in runs}
            counted = {name: partial(count, run, cpu[name]) for name, run in runs.items()}
            timed = rows_against(in_turn(counted, given.rounds, warm_up=0), "lm-eval")
            pairs = zip(cpu["maskft eval"], cpu["lm-eval"], strict=True)
            same["cpu_ratio"] = round(statistics.median(a / b for a, b in pairs), 4)
            rows += [same | row | about(**config) for row in timed]
    write_rows(rows, given.output_file)


if __name__ == "__main__":
    main()
