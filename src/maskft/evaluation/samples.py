"""What one model answered to one task: `samples.jsonl`, one line an item, beside the `protocol.json` it was made under.

A line holds `item` (a hash of the problem), `draw` where several answers are drawn, `prompt`, `output`, `num_tokens`,
`extracted` and `verdict`: for each metric a number, a list of booleans (several instructions in one prompt), or
{"sum": ..., "count": ...}.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_text, disk_errors
from maskft.storage.json_text import json_hash

SAMPLES_FILE = "samples.jsonl"
PROTOCOL_FILE = "protocol.json"

Row = dict[str, Any]


def sample_folder(output_dir: Path, model: str, task: str) -> Path:
    """Where the samples of a model and a task lie: readable, and different for different names."""
    return output_dir / _slug(model) / _slug(task)


def _slug(name: str) -> str:
    parts = [Path(part).name or "model" for part in name.split("+")]
    readable = re.sub(r"[^\w.+-]+", "_", "+".join(parts))[:60]
    return readable if readable == name else f"{readable}-{json_hash(name)[:8]}"


class SampleFile:
    """The samples of one folder; lines are only ever added.

    Raises:
        MaskftError: the folder holds samples that were made under another protocol, or a damaged line.
    """

    def __init__(self, folder: Path, protocol: Row) -> None:
        self.path = folder / SAMPLES_FILE
        _check_protocol(folder, protocol)
        with disk_errors(f"write {self.path}"):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(folder / PROTOCOL_FILE, json.dumps(protocol, indent=1, ensure_ascii=False) + "\n")
            rows, num_bytes = _read(self.path)
            if self.path.exists() and self.path.stat().st_size > num_bytes:
                with self.path.open("r+b") as file:
                    file.truncate(num_bytes)
        self.keys = {_key(row) for row in rows}

    def has(self, item: str, draw: int = 0) -> bool:
        """Whether the item's answer is there already."""
        return (item, draw) in self.keys

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows that are not there yet, in one write."""
        new = [row for row in rows if _key(row) not in self.keys]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
        with disk_errors(f"write {self.path}"), self.path.open("ab") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        self.keys |= {_key(row) for row in new}


def read_samples(folder: Path) -> list[Row]:
    """The complete lines of a folder's samples; a last line that was cut short is left out.

    Raises:
        MaskftError: no such file, or a damaged line.
    """
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise MaskftError(f"There is no {path}; run maskft eval first, or correct the folder.")
    return _read(path)[0]


def read_protocol(folder: Path) -> Row:
    """The protocol that a folder's samples were made under.

    Raises:
        MaskftError: it is missing or damaged.
    """
    path = folder / PROTOCOL_FILE
    try:
        protocol = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaskftError(f"{path} cannot be read ({error}); remove {folder} and run maskft eval again.") from error
    if not isinstance(protocol, dict):
        raise MaskftError(f"{path} holds no protocol; remove {folder} and run maskft eval again.")
    return protocol


def _key(row: Row) -> tuple[str, int]:
    return row["item"], row.get("draw", 0)


def _read(path: Path) -> tuple[list[Row], int]:
    """The rows of the complete lines, and how many bytes these lines have."""
    if not path.exists():
        return [], 0
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
            _key(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MaskftError(
                f"{path}, line {number}, is damaged ({error}); remove the file and run maskft eval again."
            ) from error
        rows.append(row)
    return rows, len(complete)


def _check_protocol(folder: Path, protocol: Row) -> None:
    if not (folder / PROTOCOL_FILE).exists():
        if (folder / SAMPLES_FILE).exists():
            raise MaskftError(f"{folder} holds samples without their {PROTOCOL_FILE}; give another --output_dir.")
        return
    held = read_protocol(folder)
    wanted = json.loads(json.dumps(protocol))
    changed = [key for key in sorted(set(held) | set(wanted)) if held.get(key) != wanted.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {held.get(key)!r} and is now {wanted.get(key)!r}" for key in changed[:3])
        raise MaskftError(
            f"{folder} holds samples of another protocol ({shown}); give another --output_dir, or the earlier settings."
        )
