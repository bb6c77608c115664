"""Checkers of generated answers for rows of one's own, by lm-eval's tasks: its filters and metrics, not its data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.evaluation.samples import Row
from maskft.evaluation.task import TaskSettings
from maskft.evaluation.tasks import load_tasks
from maskft.storage.json_text import json_objects

IsRight = Callable[[int, str], bool]
"""Whether an answer to the row of that number is right."""


@dataclass(frozen=True)
class _Checker:
    """How a task's checker is used: the metric that decides, the columns it needs, and its document for a row."""

    metric: str
    needs: tuple[str, ...]
    document: Callable[[Row], Row]
    completion_is_right: bool


def _content(turns: Any) -> str:
    return str(turns if isinstance(turns, str) else turns[-1]["content"])


def _ifeval(row: Row) -> Row:
    return {"prompt": _content(row["prompt"])} | {key: row[key] for key in ("instruction_id_list", "kwargs")}


def _gsm8k(row: Row) -> Row:
    return {"question": _content(row["prompt"]), "answer": _content(row["completion"])}


CHECKERS = {
    "ifeval": _Checker(
        "prompt_level_strict_acc,none", ("prompt", "completion", "instruction_id_list", "kwargs"), _ifeval, False
    ),
    "gsm8k": _Checker("exact_match,strict-match", ("prompt", "completion"), _gsm8k, True),
}
"""`ifeval`: all constraints of a row hold, strictly; `gsm8k`: the number after `####` is the completion's."""


def read_checker(path: str | Path, checker: str) -> IsRight:
    """The checker of that name over the rows of a .jsonl file of prompt-completion rows.

    Raises:
        MaskftError: a damaged line, or a row that the checker cannot use.
    """
    rows = json_objects(Path(path))
    found = CHECKERS[checker]
    for number, row in enumerate(rows, start=1):
        missing = [key for key in found.needs if row.get(key) is None]
        if missing:
            raise MaskftError(
                f"{path}, line {number}, has no {missing[0]!r}; the checker {checker} needs {', '.join(found.needs)}."
            )
    is_right = row_checker(checker, rows)
    for number, row in enumerate(rows):
        try:
            passes = is_right(number, _content(row["completion"]))
        except (LookupError, TypeError, ValueError) as error:
            raise MaskftError(
                f"{path}, line {number + 1}, cannot be checked by {checker} ({type(error).__name__}: {error}); correct "
                "or remove it."
            ) from error
        if found.completion_is_right and not passes:
            raise MaskftError(
                f"{path}, line {number + 1}: the checker {checker} finds no answer in the row's own completion; end it "
                "as the checker expects (docs/study.md)."
            )
    return is_right


def row_checker(checker: str, rows: Sequence[Row]) -> IsRight:
    """The checker of that name, one of `CHECKERS`, over rows that hold what it needs."""
    found = CHECKERS[checker]
    documents = [{"key": number} | found.document(row) for number, row in enumerate(rows)]
    (task,) = load_tasks(checker, TaskSettings(num_fewshot=0), documents)
    return lambda number, answer: bool(task.judge(documents[number], answer)[found.metric])
