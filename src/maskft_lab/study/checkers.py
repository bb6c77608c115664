"""Checkers of generated answers for rows of one's own, by lm-eval's tasks: its filters and metrics, not its data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from maskft.errors import MaskftError
from maskft.evaluation.samples import Row
from maskft.evaluation.tasks import TaskSettings, load_tasks
from maskft.storage.json_text import json_objects

IsRight = Callable[[int, str], bool]
"""Whether an answer to the row of that number is right."""


@dataclass(frozen=True)
class _Checker:
    """A task's metric that decides, the files of its data, the columns that it needs, and its document for a row."""

    metric: str
    files: tuple[str, ...]
    needs: tuple[str, ...]
    document: Callable[[Row], Row]


def _content(turns: Any) -> str:
    return str(turns if isinstance(turns, str) else turns[-1]["content"])


def _ifeval(row: Row) -> Row:
    return {"prompt": _content(row["prompt"])} | {key: row[key] for key in ("instruction_id_list", "kwargs")}


def _gsm8k(row: Row) -> Row:
    return {"question": _content(row["prompt"]), "answer": _content(row["completion"])}


CHECKERS = {
    "ifeval": _Checker(
        "prompt_level_strict_acc,none",
        ("ifeval/input_data.jsonl",),
        ("prompt", "completion", "instruction_id_list", "kwargs"),
        _ifeval,
    ),
    "gsm8k": _Checker(
        "exact_match,strict-match", ("gsm8k/train.jsonl", "gsm8k/test.jsonl"), ("prompt", "completion"), _gsm8k
    ),
}
"""`ifeval`: all constraints of a row hold, strictly; `gsm8k`: the number after `####` is the completion's."""


def read_checker(path: str | Path, checker: str) -> IsRight:
    """The checker of that name over the rows of a .jsonl file of prompt-completion rows.

    Raises:
        MaskftError: a damaged line, or a row that the checker cannot use.
    """
    rows = json_objects(Path(path))
    for number, row in enumerate(rows, start=1):
        for key in CHECKERS[checker].needs:
            if row.get(key) is None:
                needs = ", ".join(CHECKERS[checker].needs)
                raise MaskftError(f"{path}, line {number}, has no {key!r}; the checker {checker} needs {needs}.")
    is_right = row_checker(checker, rows, str(path))
    for number, row in enumerate(rows):
        if checker == "gsm8k" and not is_right(number, _content(row["completion"])):
            raise MaskftError(
                f"{path}, line {number + 1}: the checker {checker} finds no answer in the row's own completion; end it "
                "as the checker expects (docs/how-to/study.md)."
            )
    return is_right


def row_checker(checker: str, rows: Sequence[Row], name: str = "rows") -> IsRight:
    """The checker of that name, one of `CHECKERS`, over rows of the file `name` that hold what it needs."""
    found = CHECKERS[checker]
    documents = [{"key": f"{name}, line {n}"} | found.document(row) for n, row in enumerate(rows, start=1)]
    with TemporaryDirectory() as folder:
        for file in found.files:
            path = Path(folder, file)
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (task,) = load_tasks(checker, TaskSettings(num_fewshot=0, data_dir=Path(folder)))
    return lambda number, answer: bool(task.judge(documents[number], answer)[found.metric])
