"""What one model answered to one task: lm-eval's samples in `samples.jsonl`, and the `protocol.json` of them.

A line is an item under one of the task's filters, with `draw` where several answers are drawn (docs/how-to/eval.md).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_bytes, atomic_write_text, disk_errors
from maskft.storage.json_text import json_hash, json_objects

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


def write_samples(folder: Path, rows: Iterable[Row]) -> None:
    """Write all samples of a folder at once."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_bytes(folder / SAMPLES_FILE, text.encode("utf-8", "backslashreplace"))


def read_samples(folder: Path) -> list[Row]:
    """The samples of a folder; a file that is missing or damaged is refused."""
    path = folder / SAMPLES_FILE
    rows = json_objects(path)
    if not all({"doc_id", "filter", "metrics"} <= set(row) for row in rows):
        raise MaskftError(f"{path} holds lines that are no samples; remove the file and run maskft eval again.")
    return rows


def read_protocol(folder: Path) -> Row:
    """The protocol that a folder's samples were made under; a file that is missing or damaged is refused."""
    path = folder / PROTOCOL_FILE
    try:
        protocol: Row = json.loads(path.read_text(encoding="utf-8"))
        protocol["model"], protocol["task"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskftError(f"{path} cannot be read ({error}); remove {folder} and run maskft eval again.") from error
    return protocol


def open_folder(folder: Path, protocol: Row) -> list[Row]:
    """Note the protocol, and give the samples that are there already; those of another protocol are refused."""
    held = (folder / SAMPLES_FILE).exists()
    if (folder / PROTOCOL_FILE).exists():
        before, wanted = read_protocol(folder), json.loads(json.dumps(protocol))
        changed = [key for key in sorted({*before, *wanted}) if before.get(key) != wanted.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r} and is now {wanted.get(key)!r}" for key in changed[:3])
            hint = "give another --output_dir, or the earlier settings."
            raise MaskftError(f"{folder} holds samples of another protocol ({shown}); {hint}")
    elif held:
        raise MaskftError(f"{folder} holds samples without their {PROTOCOL_FILE}; give another --output_dir.")
    with disk_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / PROTOCOL_FILE, json.dumps(protocol, indent=1, ensure_ascii=False) + "\n")
    return read_samples(folder) if held else []
