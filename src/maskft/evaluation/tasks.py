"""What a task is; and the tasks that are not lm-eval's: reasoning-gym's, and the NLL of any data set."""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from maskft.data.rows import data_hash, load_rows
from maskft.errors import MaskftError, nearest
from maskft.evaluation.samples import Row
from maskft.storage.json_text import json_hash

ChatTemplate = Callable[..., str]

# lm-eval's default for tasks that name no length.
DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULT_GENERATED = 200


@dataclass(frozen=True)
class Item:
    """One problem of a task: a hash of its content, and what the task needs of it."""

    id: str
    content: Any


@dataclass(frozen=True)
class Verdict:
    """What a task's checker made of an output: the extracted answer by filter, and a value by metric."""

    extracted: dict[str, Any]
    verdict: dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """What tasks are loaded with."""

    data_dir: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    allow_code_execution: bool = False


class GenerationTask(ABC):
    """A task whose outputs are generated and checked."""

    name: str
    stop: Sequence[str] = ()
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    items: list[Item]

    @abstractmethod
    def prompt(self, item: Item, chat_template: ChatTemplate | None) -> str:
        """The text that the model continues; with a template, messages are rendered by it."""

    @abstractmethod
    def judge(self, item: Item, output: str) -> Verdict:
        """Check an output; the same output always gets the same verdict."""

    @abstractmethod
    def protocol(self) -> Row:
        """What decides a score: `shots`, `matching`, the version of the definition, and the hash of the data."""


class ReasoningGymTask(GenerationTask):
    """Problems that reasoning-gym generates from a seed, scored by its own checkers.

    `accuracy` is the share of full scores, `score` the mean score, which gives some parts of a point.

    Raises:
        MaskftError: reasoning-gym has no such problems, or it makes too few different ones.
    """

    def __init__(self, name: str, settings: TaskSettings) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        dataset = name.partition(":")[2]
        if dataset not in DATASETS:
            raise MaskftError(f"reasoning-gym has no task {dataset!r}{nearest(dataset, list(DATASETS))}.")
        self.name = name
        self.scorer = reasoning_gym.get_score_answer_fn(dataset)
        num_wanted = settings.limit or _DEFAULT_GENERATED
        # reasoning-gym draws item i from the seed `seed + i`: neighbouring seeds would share nearly all items.
        stream = reasoning_gym.create_dataset(dataset, seed=settings.seed * 10**6, size=20 * num_wanted)
        distinct: dict[str, Any] = {}
        for entry in stream:
            distinct.setdefault(entry["question"], entry)
            if len(distinct) == num_wanted:
                break
        else:
            raise MaskftError(
                f"{name} makes only {len(distinct)} different problems of {num_wanted}; give a lower --limit."
            )
        self.items = [Item(json_hash(entry)[:16], entry) for entry in distinct.values()]
        self.seed = settings.seed

    def prompt(self, item: Item, chat_template: ChatTemplate | None) -> str:
        return single_turn(item.content["question"], chat_template)

    def judge(self, item: Item, output: str) -> Verdict:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(output) or output.strip()
        score = float(self.scorer(answer, item.content))
        return Verdict({"answer": answer}, {"accuracy": score == 1.0, "score": score})

    def protocol(self) -> Row:
        return {
            "shots": 0,
            "matching": "reasoning-gym's scorer on the text in <answer> tags, else on the whole output",
            "data": {"seed": self.seed, "sha256": json_hash(sorted(item.id for item in self.items))},
        }


class NllTask:
    """Negative log-likelihood per completion token of rows in one of TRL's forms.

    Raises:
        MaskftError: no such data, or a row that cannot be used.
    """

    def __init__(self, name: str, settings: TaskSettings) -> None:
        self.name = name
        path = name.partition(":")[2]
        if not path:
            raise MaskftError("`nll:` needs a data set, as in nll:validation.jsonl.")
        self.rows: Dataset = load_rows(path)
        ids = unique_ids([json_hash(row)[:16] for row in self.rows])
        self.items = choose(
            [Item(i, row) for i, row in zip(ids, self.rows, strict=True)], settings.limit, settings.seed
        )

    @property
    def needs_chat_template(self) -> bool:
        """Whether the rows are conversations."""
        return not isinstance(self.rows[0]["prompt"], str)

    def protocol(self) -> Row:
        return {
            "shots": 0,
            "matching": "NLL of the completion's tokens, the end token included, in nats",
            "data": {"sha256": data_hash(self.rows)},
        }


Task = GenerationTask | NllTask


def unique_ids(hashes: Sequence[str]) -> list[str]:
    """The hashes, the second of equal ones as `hash#2` and so on."""
    seen: Counter[str] = Counter()
    ids = []
    for value in hashes:
        seen[value] += 1
        ids.append(value if seen[value] == 1 else f"{value}#{seen[value]}")
    return ids


def choose(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """A random part of the items that does not depend on their order; a larger limit keeps those of a smaller one."""
    if limit is None or limit >= len(items):
        return items
    order = sorted(items, key=lambda item: sha256(f"{seed}:{item.id}".encode()).hexdigest())
    kept = {item.id for item in order[:limit]}
    return [item for item in items if item.id in kept]


def seeded(seed: int, item: Item) -> random.Random:
    """A generator of random numbers that belongs to an item, wherever it stands."""
    return random.Random(f"{seed}:{item.id}")


def single_turn(question: str, chat_template: ChatTemplate | None) -> str:
    """A question as the whole prompt: the user's turn of a chat, or a line."""
    if chat_template is None:
        return f"{question}\n"
    return chat_template([{"role": "user", "content": question}])


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """How lm-eval's tasks ask for messages to be rendered; without a generation prompt the last message goes on."""

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    return render
