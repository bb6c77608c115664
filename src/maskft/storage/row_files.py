"""Files of rows: JSON, CSV, Parquet and Arrow, plain or compressed, each row with where it stands."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from maskft.errors import MaskftError
from maskft.storage.json_text import json_lines, open_file, parse_json

Located = Iterable[tuple[str, Any]]
"""Where each row stands, for messages ("FILE, line 3" or "FILE, row 0"), and the row."""
UNREADABLE = (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError)
"""What reading a file may raise beside MaskftError, when its rows are asked for."""


def plain_name(path: Path) -> Path:
    """The path without the ending of a compressed file."""
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def kind_of(path: Path) -> str:
    """The ending that tells how a file is read, compressed or not."""
    return plain_name(path).suffix.lower()


def numbered(rows: Iterable[Any], where: object) -> Located:
    """Rows by their index, from 0."""
    return ((f"{where}, row {index}", row) for index, row in enumerate(rows))


def _json_rows(path: Path) -> Located:
    """Those of one array, or of an object on each line."""
    with open_file(path) as file:
        start = file.read(1 << 16)
        if not re.match(rb"(\xef\xbb\xbf)?\s*\[", start):
            return json_lines(path)
        rows = parse_json(start + file.read(), str(path))
    return numbered(rows, path)


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
    if kind_of(path) == ".parquet":
        table = pq.read_table(source)
    else:
        is_file = source.read_at(6, 0) == b"ARROW1"
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
    return numbered(Dataset(table), path)


READERS = {".jsonl": json_lines, ".json": _json_rows, ".csv": _csv_rows}
READERS |= dict.fromkeys((".parquet", ".arrow"), _table_rows)
