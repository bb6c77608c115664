"""Training rows: read from files or the hub, checked, hashed.

Nothing that is read is executed: no pickle, no loading script; and Transformers renders chat templates in a sandbox.
The forms of a row are those of :mod:`maskft.data.forms`, one for a whole data set.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from maskft.data.forms import ALLOWED, FIELDS, Row, expand, listed, shown
from maskft.errors import MaskftError
from maskft.storage.files import PICKLE_SUFFIXES
from maskft.storage.json_text import canonical_json, json_lines, parse_json

_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_ROWS_PER_BLOCK = 10_000
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]

Located = Iterator[tuple[str, Any]]
"""Where each row stands, for messages ("FILE, line 3"), and the row."""


def load_rows(dataset_name: str, *, dataset_config: str | None = None, split: str = "train") -> Dataset:
    """Read and check a data set.

    Args:
        dataset_name: a `.jsonl`, `.json` or `.parquet` file, a folder with files of one of these kinds, or the name of
            a data set on the Hugging Face hub. Other columns than a form's own are dropped.
        dataset_config: configuration of a hub data set.
        split: split of a hub data set; in a folder, the files named after it (`train.jsonl`, `train-00001.parquet`),
            or all files when none is named after a split.

    Returns:
        A data set with exactly the columns `prompt` and `completion`: both strings, or both lists of messages
        (`completion` then has one, of the assistant).

    Raises:
        MaskftError: no such data, no rows, or a row that cannot be used, with its file and line (for JSON arrays,
            Parquet and the hub: its index, counted from 0).
    """
    try:
        return _build(_locate(dataset_name, dataset_config, split), dataset_name)
    except OSError as error:
        told = shown(str(error))
        raise MaskftError(f"{dataset_name} cannot be read ({told}): check the path and its permissions.") from error


def load_held_out(dataset_name: str, split: str, *, dataset_config: str | None = None) -> Dataset:
    """Rows to validate or test on: those of a single file, or of that split of a folder or hub data set."""
    split = "train" if Path(dataset_name).expanduser().is_file() else split
    return load_rows(dataset_name, dataset_config=dataset_config, split=split)


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the rows as canonical JSON, one a line; the order of rows counts, of keys not."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row) + b"\n")
    return digest.hexdigest()


def count_and_hash(rows: Dataset) -> dict[str, Any]:
    """What a report says of a split: `n` rows, and their :func:`data_hash` as `sha256`."""
    return {"n": len(rows), "sha256": data_hash(rows)}


def _build(located: Located, source: str) -> Dataset:
    """Check the rows and gather them, in blocks so that Python objects do not pile up."""
    rows = _expanded(located)
    blocks = []
    while block := list(islice(rows, _ROWS_PER_BLOCK)):
        kind = Value("string") if isinstance(block[0]["prompt"], str) else _MESSAGES
        blocks.append(Dataset.from_list(block, features=Features({"prompt": kind, "completion": kind})))
    if not blocks:
        raise MaskftError(f"{source} holds no rows: give a data set with at least one row of the form {ALLOWED}.")
    return concatenate_datasets(blocks)


def _expanded(located: Located) -> Iterator[Row]:
    first: tuple[str, str] | None = None
    for location, row in located:
        form, rows = expand(row, location)
        first = first or (form, location)
        if form != first[0]:
            raise MaskftError(
                f"{location}: this row is of the form {form} but {first[1]} is of the form {first[0]}; write all rows "
                "of a data set in one form."
            )
        yield from rows


def _locate(name: str, config: str | None, split: str) -> Located:
    path, suffix = Path(name).expanduser(), Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise MaskftError(
            f"{name} is refused: reading a {suffix} file can run code hidden in it; convert it to .jsonl, .json or "
            ".parquet."
        )
    if not path.exists():
        if suffix in _READERS or name.startswith((".", "/", "~")):
            raise MaskftError(f"There is no data file or folder {name}: check the path.")
        return _hub_rows(name, config, split)
    if config is not None:
        raise MaskftError(
            f"A dataset config ({config!r}) belongs to a hub data set, but {name} is a local path: leave it out."
        )
    if path.is_dir():
        return (located for file in _files_of_split(path, split) for located in _file_rows(file))
    if split != "train":
        raise MaskftError(
            f"The split {split!r} cannot be taken from the single file {path}: give the file of that split, or a "
            "folder or hub data set that has it."
        )
    return _file_rows(path)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _READERS and path.is_file())
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise MaskftError(f"The folder {folder} holds no data: put .jsonl, .json or .parquet files there.")
    of_split = [path for path in files if _is_of_split(path, split)]
    # A folder with train and test files must not have its test rows trained on.
    if not of_split and (split != "train" or any(_is_of_split(file, word) for file in files for word in _SPLITS)):
        raise MaskftError(
            f"The folder {folder} holds no file of the split {split!r} (it holds {listed(f.name for f in files)}): "
            f"name one {split}.jsonl, {split}.json or {split}.parquet, or give a file instead of the folder."
        )
    files = of_split or files
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1:
        raise MaskftError(
            f"The folder {folder} holds data of several kinds ({listed(kinds)}): keep one kind or give a file."
        )
    return files


def _is_of_split(path: Path, split: str) -> bool:
    stem = path.stem.lower()
    return stem == split or stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def _file_rows(path: Path) -> Located:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise MaskftError(
            f"{path} is a file of the kind {suffix or '(no ending)'}: give a .jsonl, .json or .parquet file."
        )
    return _READERS[suffix](path)


def _json_rows(path: Path) -> Located:
    """Those of one array, or of an object on each line."""
    with path.open("rb") as file:
        if not re.match(rb"(\xef\xbb\xbf)?\s*\[", file.read(1 << 16)):
            return json_lines(path)
    rows = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path))
    return ((f"{path}, row {index}", row) for index, row in enumerate(rows))


def _parquet_rows(path: Path) -> Located:
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            keys = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=1000, columns=_read_columns(keys)):
                for row in batch.to_pylist():
                    yield f"{path}, row {index}", dict.fromkeys(keys) | row
                    index += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MaskftError(
            f"{path}: not a readable Parquet file after row {index} ({shown(str(error))}); write it again."
        ) from error


_READERS = {".jsonl": json_lines, ".json": _json_rows, ".parquet": _parquet_rows}


def _hub_rows(name: str, config: str | None, split: str) -> Located:
    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        chosen = f" with config {config!r}" if config is not None else ""
        raise MaskftError(
            f"The data set {name!r}{chosen}, split {split!r}, could not be loaded from the hub ({shown(str(error))}): "
            "check the name, config and split, or give the path of a local file."
        ) from error
    keys = dataset.column_names
    wanted = dataset.select_columns(_read_columns(keys))
    return ((f"{name} ({split}), row {i}", dict.fromkeys(keys) | row) for i, row in enumerate(wanted))


def _read_columns(keys: list[str]) -> list[str]:
    """The columns that are read; the others still stand in a row's keys, for the messages."""
    return [key for key in FIELDS if key in keys] or keys[:1]
