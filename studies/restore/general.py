"""General rows of the restore study: prompts that no task's training rows hold, with people's answers."""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_TEST, NUM_VALIDATION, NUM_POOL, NUM_FAR = 96, 48, 256, 48
STEP = 16  # of the pool, by which the rows of one seed begin after those of the one before
NOT_GENERAL = {"maths": "gsm8k", "code": "code", "constraints": "instructions"}
Pair = tuple[str, str]


def general_prompts(given: argparse.Namespace, task: str, seed: int) -> dict[str, list[Pair]]:
    """Prompts and answers: `test`, `validation` and `pool`, to learn from, are of all kinds alike but that of the task.

    `far` are prompts of IFEval, without answers, and a kind's name has its rows of `test`.
    """
    kinds = {kind: rows for kind, rows in _by_kind(given).items() if kind != NOT_GENERAL.get(task)}
    mixed = [row for rows in zip(*kinds.values(), strict=False) for row in rows]
    test, rest = mixed[:NUM_TEST], mixed[NUM_TEST:]
    validation, pool = rest[:NUM_VALIDATION], rest[NUM_VALIDATION:][:NUM_POOL]
    start = STEP * (seed - 1)
    far = [(row["prompt"], "") for row in _read(given.ifeval_dir / "input_data.jsonl")]
    splits = {"test": test, "validation": validation, "pool": pool[start:] + pool[:start], "far": far[:NUM_FAR]}
    return splits | {kind: test[number :: len(kinds)] for number, kind in enumerate(kinds)}


def _by_kind(given: argparse.Namespace) -> dict[str, list[Pair]]:
    """Each prompt once, in a drawn order; those that are short."""
    gsm8k = _read(given.gsm8k_dir / "test.jsonl")
    code = json.loads((given.codealpaca_dir / "code_alpaca_2k.json").read_text(encoding="utf-8"))
    found = {
        "gsm8k": [(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in gsm8k],
        "code": [(_with_input(row["instruction"], row["input"]), row["output"]) for row in code],
        "instructions": [
            (_with_input(row["instruction"], row["instances"][0]["input"]), row["instances"][0]["output"])
            for name in ("user_oriented_instructions", "seed_tasks")
            for row in _read(given.self_instruct_dir / f"{name}.jsonl")
        ],
    }
    for rows in found.values():
        rows[:] = dict(row for row in rows if len(row[0]) <= 400 and 0 < len(row[1]) <= 600).items()
        random.Random(0).shuffle(rows)
    return found


def _read(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _with_input(instruction: str, given: str) -> str:
    return "\n".join(part.strip() for part in (instruction, given) if part.strip())
