"""Rows of users: found, read, checked, and hashed.

Nothing that is read is executed: no pickle, no loading script; and Transformers renders chat templates in a sandbox.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    Json,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from maskft.data.forms import ALLOWED, Row, listed, read_row, shown
from maskft.data.tokens import RowTokeniser, has_answer
from maskft.errors import MaskftError
from maskft.storage.files import PICKLE_SUFFIXES
from maskft.storage.json_text import canonical_json
from maskft.storage.row_files import READERS, UNREADABLE, Located, kind_of, numbered, plain_name

logger = logging.getLogger(__name__)

_SPLIT = re.compile(r"(?:^|[^a-z])(?:train|validation|valid|val|dev|eval|test)(?:[^a-z]|$)")
_SHARD = re.compile(r"[-_.]\d+(?:-of-\d+)?$")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json")
_ROWS_PER_BLOCK = 10_000
_TOKENS = ("input_ids", "labels")
_COUNTED = ("read", "skipped", "whole text", "no answer", "cut", "kept")


@dataclass
class Reader:
    """How rows are read, and what was found in them.

    Attributes:
        tokenise: its columns then stand beside the row's own, and rows without a token to train on are left out.
        columns: see :func:`maskft.data.forms.read_row`.
        skips_bad_rows: whether a row that cannot be used is left out and told of, not refused.
        filled: what is done to a row before it is read.
        found: numbers of rows by data set and by what they are.
    """

    tokenise: RowTokeniser | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    skips_bad_rows: bool = False
    filled: Callable[[Any], Any] = lambda row: row
    found: dict[str, dict[str, int]] = field(default_factory=dict)

    def read(self, located: Located, source: str) -> Dataset:
        """The rows of `source`, in blocks so that Python objects do not pile up; MaskftError if none is left."""
        bad: list[str] = []
        unread: set[str] = set()
        count = self.found[source] = dict.fromkeys(_COUNTED, 0)
        rows = self._checked(located, count, bad, unread)
        blocks = []
        while block := list(islice(rows, _ROWS_PER_BLOCK)):
            blocks.append(to_dataset(block))
        within = f"within max_length {self.tokenise.max_length}" if self.tokenise else ""
        for number, told in (
            (len(unread), f"columns that are not read: {listed(unread)}"),
            (count["skipped"], f"rows of {count['read']} are skipped, the first: {' | '.join(bad)}"),
            (count["whole text"], "rows of plain text, whose loss falls on all their tokens"),
            (count["no answer"], f"rows have no token to train on {within}, and are left out"),
            (count["cut"], f"rows lose a part of their answer, for it does not end {within}"),
        ):
            if number:
                logger.warning("%s: %d %s", source, number, told)
        if not count["read"]:
            raise MaskftError(f"{source} holds no rows: give a data set with at least one row of the form {ALLOWED}.")
        if not blocks:
            raise MaskftError(f"None of the {count['read']} rows of {source} is left; raise max_length, or repair.")
        return concatenate_datasets(blocks)

    def _checked(self, located: Located, count: dict[str, int], bad: list[str], unread: set[str]) -> Iterator[Row]:
        for location, given in located:
            count["read"] += 1
            try:
                row, not_read = read_row(self.filled(given), self.columns)
                parts = [{}] if self.tokenise is None else self.tokenise(row)
            except MaskftError as error:
                if not self.skips_bad_rows:
                    raise MaskftError(f"{location}: {error}") from error
                count["skipped"] += 1
                bad += [f"{location}: {error}"] if len(bad) < 3 else []
                continue
            unread |= not_read
            count["whole text"] += row["prompt"] == ""
            count["cut"] += any(part.pop("is_cut", False) for part in parts)
            kept = [part for part in parts if self.tokenise is None or has_answer(part)]
            count["kept" if kept else "no answer"] += 1
            yield from (row | part for part in kept)


def load_rows(
    dataset_name: str, *, dataset_config: str | None = None, split: str = "train", reader: Reader | None = None
) -> Dataset:
    """Read and check a data set.

    Args:
        dataset_name: a file of JSON lines, JSON, CSV, Parquet or Arrow, plain or compressed (.gz, .zst); a folder of
            such files or one that `datasets` saved; or the name of a data set on the Hugging Face hub.
        dataset_config: configuration of a hub data set.
        split: of a folder, or of a hub data set.
        reader: how the rows are read. Default: without tokens.

    Returns:
        Columns `prompt` and `completion`, and others where a row has them, see :mod:`maskft.data.forms`.

    Raises:
        MaskftError: no such data, no rows, or a row that cannot be used, with where it stands.
    """
    try:
        return (reader or Reader()).read(_locate(dataset_name, dataset_config, split), dataset_name)
    except UNREADABLE as error:
        raise MaskftError(f"{dataset_name} cannot be read ({shown(str(error))}): check or write it again.") from error


def load_held_out(dataset_name: str, split: str, **given: Any) -> Dataset:
    """Rows to validate or test on: those of a single file, or of that split of a folder or hub data set."""
    return load_rows(dataset_name, split="train" if Path(dataset_name).expanduser().is_file() else split, **given)


def load_mixture(shares: Mapping[str, float], *, seed: int, reader: Reader) -> Dataset:
    """The rows of several data sets, of each the share that is named with it, drawn by the seed."""
    drawn = []
    for name, share in shares.items():
        rows = load_rows(name, reader=reader)
        drawn.append(rows.shuffle(seed=seed).select(range(max(1, round(share * len(rows))))))
        reader.found[name]["drawn"] = len(drawn[-1])
    return concatenate_datasets(drawn)


def tokenise_rows(rows: Dataset, tokenise: RowTokeniser) -> Dataset:
    """Rows with their tokens, in one part or more, with an answer or not; MaskftError for one that has no rendering."""
    if "labels" in rows.column_names:
        return rows
    parts = []
    for index, row in enumerate(rows):
        try:
            parts += [row | {key: part[key] for key in _TOKENS} for part in tokenise(row)]
        except MaskftError as error:
            raise MaskftError(f"row {index}: {error}") from error
    return to_dataset(parts)


def answered(rows: Dataset) -> Dataset:
    """Those of the rows with tokens that have one to train on."""
    return rows.select([index for index, row in enumerate(rows.select_columns("labels")) if has_answer(row)])


def to_dataset(rows: list[Row]) -> Dataset:
    """Rows with their tokens, where they have them; all else is JSON, so that rows may differ in form."""
    keys = dict.fromkeys(key for row in rows for key in row)
    features = Features({key: List(Value("int32")) if key in _TOKENS else Json() for key in keys})
    columns: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in keys}
    for key in set(keys).difference(_TOKENS):
        columns[key] = [None if value is None else json.dumps(value, ensure_ascii=False) for value in columns[key]]
    return Dataset(pa.table(columns, schema=features.arrow_schema), DatasetInfo(features=features))


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the rows as canonical JSON, one a line, without tokens; the order of keys does not count."""
    digest = hashlib.sha256()
    for row in rows:
        held = {key: row[key] for key in row if row[key] is not None and key not in (*_TOKENS, "assistant_only_loss")}
        digest.update(canonical_json(held) + b"\n")
    return digest.hexdigest()


def token_hash(rows: Dataset) -> str:
    """SHA-256 (hex) over tokens and labels: what is trained on, whatever the chat template has made of the rows."""
    digest = hashlib.sha256()
    for row in rows.select_columns(_TOKENS):
        digest.update(canonical_json([row[key] for key in _TOKENS]))
    return digest.hexdigest()


def _locate(name: str, config: str | None, split: str) -> Located:
    path, kind = Path(name).expanduser(), kind_of(Path(name))
    if kind in PICKLE_SUFFIXES:
        raise MaskftError(f"{name} is refused: reading a {kind} file can run code hidden in it; convert it to .jsonl.")
    if not path.exists():
        if kind in READERS or name.startswith((".", "/", "~")):
            raise MaskftError(f"There is no data file or folder {name}: check the path.")
        return _hub_rows(name, config, split)
    if config is not None:
        raise MaskftError(f"A dataset config ({config!r}) belongs to a hub data set, but {name} is none: leave it out.")
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _saved_rows(path, split)
    if path.is_dir():
        return (located for file in _files_of_split(path, split) for located in READERS[kind_of(file)](file))
    if kind not in READERS:
        raise MaskftError(f"{path} is of the kind {kind or '(none)'}: give one of {listed(READERS)}, or .gz, .zst.")
    if split != "train":
        told = f"The split {split!r} cannot be taken from the single file {path}"
        raise MaskftError(f"{told}: give the file of that split, or a folder or hub data set that has it.")
    return READERS[kind](path)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split, by their own name or their folder's, which counts whole: train_sft is not train."""
    named: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts) or path.name in _NOT_DATA
        if kind_of(path) in READERS and path.is_file() and not is_hidden:
            names = (_SHARD.sub("", plain_name(path).stem), *parts[-2::-1])
            named[path] = next((name for name in names if name == split or _SPLIT.search(name.lower())), "")
    files = [path for path, name in named.items() if name == split]
    if not files and split == "train" and not any(named.values()):
        files = list(named)
    held = listed(set(named.values())) if named else "none"
    if not files:
        told = f"The folder {folder} holds no data of the split {split!r}, but of {held}"
        raise MaskftError(f"{told}; name one of them with --dataset_train_split, or give a file instead of the folder.")
    for what, of in (("kinds", {*map(kind_of, files)}), ("folders", {str(path.parent) for path in files})):
        if len(of) > 1:
            told = f"The folder {folder} holds data of the split {split!r} in several {what}"
            raise MaskftError(f"{told} ({listed(of)}); give one of them.")
    return files


def _saved_rows(folder: Path, split: str) -> Located:
    saved = load_from_disk(str(folder))
    saved = {"train": saved} if isinstance(saved, Dataset) else saved
    if split not in saved:
        raise MaskftError(f"The data set saved in {folder} has no split {split!r}, but {listed(saved)}; name one.")
    return numbered(saved[split], f"{folder} ({split})")


def _hub_rows(name: str, config: str | None, split: str) -> Located:
    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        chosen = f"{name!r}{f' with config {config!r}' if config else ''}, split {split!r},"
        hint = "check the name, config and split, or give the path of a local file."
        raise MaskftError(f"The data set {chosen} could not be loaded ({shown(str(error))}): {hint}") from error
    return numbered(dataset, f"{name} ({split})")
