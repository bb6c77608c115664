"""Sums of two numbers, the made-up task of these examples: as rows, as pairs of answers, and as a reward."""

import random
from typing import Any


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with `prompt` and `completion`, as SFTTrainer and `maskft train` take them."""
    draw = random.Random(seed)
    numbers = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(count)]
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in numbers]


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows with `prompt`, `chosen` and `rejected`, as DPOTrainer takes them: the wrong answer is off by one."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": str(int(row["completion"]) + 1)}
        for row in sums(count, seed)
    ]


def digits(completions: list[str], **_: Any) -> list[float]:
    """The reward of GRPO: the share of an answer's characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
