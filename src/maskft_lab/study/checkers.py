"""Checkers of generated answers for rows of one's own, by lm-eval's tasks: its filters and metrics, not its data."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from maskft.errors import MaskftError
from maskft.evaluation.samples import Row
from maskft.evaluation.tasks import TaskSettings, load_tasks
from maskft.storage.files import atomic_write_text
from maskft.storage.json_text import json_objects

IsRight = Callable[[int, str], bool]
"""Whether an answer to the row of that number is right."""


_TURNS = ("prompt", "completion")
CHECKERS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "ifeval": (
        "prompt_level_strict_acc,none",
        ("ifeval/input_data.jsonl",),
        {key: key for key in ("prompt", "instruction_id_list", "kwargs")},
    ),
    "gsm8k": (
        "exact_match,strict-match",
        ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
        {"question": "prompt", "answer": "completion"},
    ),
}
"""Of each task the metric that decides, the files of its data, and a row's column by key of its document.

`ifeval`: all constraints of a row hold, strictly; `gsm8k`: the number after `####` is the completion's.
"""


def _content(turns: Any) -> str:
    return str(turns if isinstance(turns, str) else turns[-1]["content"])


def read_checker(path: str | Path, checker: str) -> IsRight:
    """The checker of that name over the rows of a .jsonl file of prompt-completion rows.

    Raises:
        MaskftError: a damaged line, or a row that the checker cannot use.
    """
    rows, needs = json_objects(Path(path)), dict.fromkeys((*_TURNS, *CHECKERS[checker][2].values()))
    for number, row in enumerate(rows, start=1):
        for key in needs:
            if row.get(key) is None:
                told = f"the checker {checker} needs {', '.join(needs)}"
                raise MaskftError(f"{path}, line {number}, has no {key!r}; {told}.")
    is_right = row_checker(checker, rows, str(path))
    for number, row in enumerate(rows, start=1):
        if checker == "gsm8k" and not is_right(number - 1, _content(row["completion"])):
            raise MaskftError(
                f"{path}, line {number}: the checker {checker} finds no answer in the row's own completion; end it "
                "as the checker expects (docs/how-to/study.md)."
            )
    return is_right


def row_checker(checker: str, rows: Sequence[Row], name: str = "rows") -> IsRight:
    """The checker of that name, one of `CHECKERS`, over rows of the file `name` that hold what it needs."""
    metric, files, columns = CHECKERS[checker]
    documents: list[Row] = [
        {"key": f"{name}, line {number}"}
        | {key: _content(row[column]) if column in _TURNS else row[column] for key, column in columns.items()}
        for number, row in enumerate(rows, start=1)
    ]
    with TemporaryDirectory() as folder:
        for file in files:
            atomic_write_text(Path(folder, file), "".join(json.dumps(document) + "\n" for document in documents))
        (task,) = load_tasks(checker, TaskSettings(num_fewshot=0, data_dir=Path(folder)))
    return lambda number, answer: bool(task.judge(documents[number], answer)[metric])
