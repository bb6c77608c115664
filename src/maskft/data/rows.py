"""Rows of users: found, read, checked, and hashed.

Nothing that is read is executed: no pickle, no loading script; and Transformers renders chat templates in a sandbox.
The forms of a row are those of :mod:`maskft.data.forms`.
"""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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

from maskft.data.forms import ALLOWED, Row, listed, read_row, shown, with_answer
from maskft.data.tokens import RowTokeniser, has_answer
from maskft.errors import MaskftError
from maskft.storage.files import PICKLE_SUFFIXES
from maskft.storage.json_text import canonical_json, json_lines, open_file, parse_json

logger = logging.getLogger(__name__)

# A folder's files are of the split that their own name or their folder's tells, whole: train_sft is not train.
_SPLIT = re.compile(r"(?:^|[^a-z])(?:train|validation|valid|val|dev|eval|test)(?:[^a-z]|$)")
_SHARD = re.compile(r"[-_.]\d+(?:-of-\d+)?$")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json")
_ROWS_PER_BLOCK = 10_000
_TOKENS = ("input_ids", "labels")

Located = Iterable[tuple[str, Any]]
"""Where each row stands, for messages ("FILE, line 3"), and the row."""


@dataclass
class Reader:
    """How rows are read, and what was found in them.

    Attributes:
        tokenise: its columns then stand beside the row's own, and rows without a token to train on are left out.
        columns: see :func:`maskft.data.forms.read_row`.
        skips_bad_rows: whether a row that cannot be used is left out and told of, not refused.
        missing_answer: what stands for the answer of a row that has none. Default: such a row cannot be used.
        found: numbers of rows by data set and by what they are.
    """

    tokenise: RowTokeniser | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    skips_bad_rows: bool = False
    missing_answer: str | None = None
    found: dict[str, dict[str, int]] = field(default_factory=dict)

    def read(self, located: Located, source: str) -> Dataset:
        """Check the rows of `source` and gather them, in blocks so that Python objects do not pile up.

        Raises:
            MaskftError: a row that cannot be used, or none that can.
        """
        count = self.found[source] = dict.fromkeys(("read", "skipped", "whole text", "no answer", "cut", "kept"), 0)
        bad: list[str] = []
        unread: set[str] = set()
        rows = self._checked(located, count, bad, unread)
        blocks = []
        while block := list(islice(rows, _ROWS_PER_BLOCK)):
            blocks.append(to_dataset(block))
        if not count["read"]:
            raise MaskftError(f"{source} holds no rows: give a data set with at least one row of the form {ALLOWED}.")
        within = f"within max_length {self.tokenise.max_length}" if self.tokenise else ""
        for number, told in (
            (len(unread), f"holds columns that are not read: {listed(unread)}"),
            (count["skipped"], f"{count['skipped']} of {count['read']} rows are skipped, the first: {' | '.join(bad)}"),
            (count["whole text"], f"the loss of {count['whole text']} rows of plain text falls on all their tokens"),
            (count["no answer"], f"{count['no answer']} rows have no token to train on {within}, and are left out"),
            (count["cut"], f"{count['cut']} rows lose a part of their answer, for it does not end {within}"),
        ):
            if number:
                logger.warning("%s: %s.", source, told)
        if not blocks:
            raise MaskftError(
                f"None of the {count['read']} rows of {source} is left to train on; raise max_length or correct them."
            )
        return concatenate_datasets(blocks)

    def _checked(self, located: Located, count: dict[str, int], bad: list[str], unread: set[str]) -> Iterator[Row]:
        for location, given in located:
            count["read"] += 1
            try:
                given = given if self.missing_answer is None else with_answer(given, self.missing_answer)
                row, not_read = read_row(given, self.columns)
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
        reader: how the rows are read. Default: as they are, without tokens.

    Returns:
        A data set with the columns `prompt` and `completion`, and others where a row has them, see
        :mod:`maskft.data.forms`.

    Raises:
        MaskftError: no such data, no rows, or a row that cannot be used, with its file and line (or its index, from 0).
    """
    reader = reader or Reader()
    try:
        return reader.read(_locate(dataset_name, dataset_config, split), dataset_name)
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        told = shown(str(error))
        raise MaskftError(f"{dataset_name} cannot be read ({told}): check or write it again.") from error


def load_held_out(
    dataset_name: str, split: str, *, dataset_config: str | None = None, reader: Reader | None = None
) -> Dataset:
    """Rows to validate or test on: those of a single file, or of that split of a folder or hub data set."""
    split = "train" if Path(dataset_name).expanduser().is_file() else split
    return load_rows(dataset_name, dataset_config=dataset_config, split=split, reader=reader)


def load_mixture(shares: Mapping[str, float], *, seed: int, reader: Reader) -> Dataset:
    """The rows of several data sets, of each the share that is named with it, drawn by the seed."""
    drawn = []
    for name, share in shares.items():
        rows = load_rows(name, reader=reader)
        drawn.append(rows.shuffle(seed=seed).select(range(max(1, round(share * len(rows))))))
        reader.found[name]["drawn"] = len(drawn[-1])
    return concatenate_datasets(drawn)


def to_dataset(rows: list[Row]) -> Dataset:
    """Rows with their tokens, where they have them; all else is JSON, so that rows may differ in form."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    features = Features({key: List(Value("int32")) if key in _TOKENS else Json() for key in keys})
    columns = {
        key: [
            row[key] if key in _TOKENS else None if row.get(key) is None else json.dumps(row[key], ensure_ascii=False)
            for row in rows
        ]
        for key in keys
    }
    return Dataset(pa.table(columns, schema=features.arrow_schema), DatasetInfo(features=features))


def tokenise_rows(rows: Dataset, tokenise: RowTokeniser) -> Dataset:
    """Rows that were read without tokens, with them: each in one part or more, whether or not it has an answer.

    Raises:
        MaskftError: a row that cannot be rendered, by its index.
    """
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


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the rows as canonical JSON, one a line, without tokens; the order of keys does not count."""
    left_out = (*_TOKENS, "assistant_only_loss")
    digest = hashlib.sha256()
    for row in rows:
        held = {key: value for key, value in row.items() if value is not None and key not in left_out}
        digest.update(canonical_json(held) + b"\n")
    return digest.hexdigest()


def token_hash(rows: Dataset) -> str:
    """SHA-256 (hex) over tokens and labels: what is trained on, whatever the chat template has made of the rows."""
    digest = hashlib.sha256()
    for row in rows.select_columns(_TOKENS):
        digest.update(canonical_json([row[key] for key in _TOKENS]))
    return digest.hexdigest()


def count_and_hash(rows: Dataset) -> dict[str, Any]:
    """What a report says of a split: `n` rows, their :func:`data_hash`, and of their tokens number and hash."""
    told: dict[str, Any] = {"n": len(rows), "sha256": data_hash(rows)}
    return told | ({"sha256_tokens": token_hash(rows)} if "labels" in rows.column_names else {})


def _locate(name: str, config: str | None, split: str) -> Located:
    path, kind = Path(name).expanduser(), _kind(Path(name))
    if kind in PICKLE_SUFFIXES:
        raise MaskftError(
            f"{name} is refused: reading a {kind} file can run code hidden in it; convert it to .jsonl or .parquet."
        )
    if not path.exists():
        if kind in _READERS or name.startswith((".", "/", "~")):
            raise MaskftError(f"There is no data file or folder {name}: check the path.")
        return _hub_rows(name, config, split)
    if config is not None:
        raise MaskftError(
            f"A dataset config ({config!r}) belongs to a hub data set, but {name} is a local path: leave it out."
        )
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return _saved_rows(path, split)
    if path.is_dir():
        return (located for file in _files_of_split(path, split) for located in _READERS[_kind(file)](file))
    if kind not in _READERS:
        raise MaskftError(
            f"{path} is a file of the kind {kind or '(no ending)'}: give one of {listed(_READERS)}, plain, .gz or .zst."
        )
    if split != "train":
        raise MaskftError(
            f"The split {split!r} cannot be taken from the single file {path}: give the file of that split, or a "
            "folder or hub data set that has it."
        )
    return _READERS[kind](path)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix.lower()


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files whose own name, or else their folder's, is that of the split; for train all, where none names one."""
    named: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if (
            _kind(path) in _READERS
            and path.is_file()
            and path.name not in _NOT_DATA
            and not any(p.startswith(".") for p in parts)
        ):
            own = _SHARD.sub(
                "",
                path.name.removesuffix(
                    "".join(path.suffixes[-2:] if path.suffix in (".gz", ".zst") else path.suffixes[-1:])
                ),
            )
            named[path] = next(
                (part for part in (own, *parts[-2::-1]) if part == split or _SPLIT.search(part.lower())), ""
            )
    files = [path for path, name in named.items() if name == split]
    if not files and split == "train" and not any(named.values()):
        files = list(named)
    if not files:
        held = listed(set(named.values())) if named else "none"
        raise MaskftError(
            f"The folder {folder} holds no data of the split {split!r}, but of {held}; name one of them with "
            "--dataset_train_split, or give a file instead of the folder."
        )
    for what, of in (("kinds", {_kind(path) for path in files}), ("folders", {str(path.parent) for path in files})):
        if len(of) > 1:
            raise MaskftError(
                f"The folder {folder} holds data of the split {split!r} in several {what} ({listed(of)}); give one."
            )
    return files


def _json_rows(path: Path) -> Located:
    """Those of one array, or of an object on each line."""
    with open_file(path) as file:
        start = file.read(1 << 16)
        if not re.match(rb"(\xef\xbb\xbf)?\s*\[", start):
            return json_lines(path)
        rows = parse_json(start + file.read(), str(path))
    return ((f"{path}, row {index}", row) for index, row in enumerate(rows))


def _csv_rows(path: Path) -> Located:
    """All values as text, for a number or "NA" may be an answer."""
    csv.field_size_limit(1 << 30)
    with open_file(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        for row in reader:
            location = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise MaskftError(f"{location}: the row has not as many values as the header has names; repair it.")
            yield location, row


def _table_rows(path: Path) -> Located:
    with open_file(path) as file:
        source = pa.BufferReader(file.read())
    if _kind(path) == ".parquet":
        table = pq.read_table(source)
    else:
        is_file = source.read_at(6, 0) == b"ARROW1"
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
    return ((f"{path}, row {index}", row) for index, row in enumerate(Dataset(table)))


_READERS = {
    ".jsonl": json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}


def _saved_rows(folder: Path, split: str) -> Located:
    saved = load_from_disk(str(folder))
    if isinstance(saved, Dataset):
        saved = {"train": saved}
    if split not in saved:
        raise MaskftError(
            f"The data set saved in {folder} has no split {split!r}, but {listed(saved)}; name one of them."
        )
    return ((f"{folder} ({split}), row {index}", row) for index, row in enumerate(saved[split]))


def _hub_rows(name: str, config: str | None, split: str) -> Located:
    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        chosen = f" with config {config!r}" if config is not None else ""
        raise MaskftError(
            f"The data set {name!r}{chosen}, split {split!r}, could not be loaded from the hub ({shown(str(error))}): "
            "check the name, config and split, or give the path of a local file."
        ) from error
    return ((f"{name} ({split}), row {i}", row) for i, row in enumerate(dataset))
