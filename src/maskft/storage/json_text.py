"""JSON: files of lines that a user or a tool wrote, plain values, and the hash of a value."""

import codecs
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from maskft.errors import MaskftError, first_line
from maskft.storage.memory import require_memory

_OF_ROWS = "write one JSON object on each line of a .jsonl file, or one array of objects in a .json file"
# Python's parser, and all that goes through a value afterwards, ends at some hundred levels.
_MAX_DEPTH = 64
# An empty list takes three bytes of text and 64 of memory.
_MOST_EXPANDED = 25
_SMALL = 1 << 20


def canonical_json(value: Any) -> bytes:
    """The one text of a value: the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "backslashreplace")


def json_hash(value: Any) -> str:
    """SHA-256 (hex) of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON gives it back: numbers of arrays as Python's own, all else that JSON does not know as text."""
    return json.loads(json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other)))


def open_file(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed where its name ends in .gz or .zst."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Location ("FILE, line 3") and value of each line that is not blank; see :func:`open_file`.

    Raises:
        MaskftError: a file that cannot be read, or see :func:`parse_json`.
    """
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                data = line.rstrip()
                if data.removeprefix(codecs.BOM_UTF8):
                    location = f"{path}, line {number}"
                    yield location, parse_json(data, location)
    except (OSError, pa.ArrowException) as error:
        raise MaskftError(f"{path} cannot be read ({error}); check the path, or get the file again.") from error


def json_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of :func:`json_lines`.

    Raises:
        MaskftError: see there; or a line holds another value than an object, or there is none.
    """
    rows = []
    for location, row in json_lines(path):
        if not isinstance(row, dict):
            raise MaskftError(f"{location}, must hold a JSON object; repair or remove it.")
        rows.append(row)
    if not rows:
        raise MaskftError(f"{path} holds no rows; give a file with a JSON object on each line.")
    return rows


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file; `remedy` ends the messages.

    Raises:
        MaskftError: it is no file, or cannot be read, or see :func:`parse_json`.
    """
    try:
        if not path.is_file():  # a folder, or a pipe that never ends
            raise MaskftError(f"{path} is no file; {remedy}.")
        if (size := path.stat().st_size) > _SMALL:
            require_memory(_MOST_EXPANDED * size, str(path))
        return parse_json(path.read_bytes(), str(path), remedy)
    except OSError as error:
        raise MaskftError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        MaskftError: see :func:`read_json`, or it holds another value.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise MaskftError(f"{path} must hold a JSON object, but it holds a {type(value).__name__}; {remedy}.")
    return value


def parse_json(data: bytes, location: str, remedy: str = _OF_ROWS) -> Any:
    """The value of a JSON text; `location` is where it stands, for messages, which end with `remedy`.

    Raises:
        MaskftError: it is not in UTF-8, or no JSON, or more than Python's reader takes, or nested deeper than 64 times.
    """
    try:
        value = json.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deep(value):
            raise RecursionError(f"it is nested deeper than {_MAX_DEPTH} times")
        return value
    except UnicodeDecodeError as error:
        raise MaskftError(
            f"{location}: the text is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); save the file as "
            "UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise MaskftError(f"{location}: not valid JSON ({error.msg} at {where}); {remedy}.") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or nested too deep
        raise MaskftError(f"{location}: this JSON cannot be read ({first_line(error)}); {remedy}.") from error


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [part for each in level for part in _parts(each)]
    return bool(level)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
