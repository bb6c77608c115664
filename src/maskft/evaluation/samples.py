"""What one model answered to one task: lm-eval's samples in `samples.jsonl`, and the `protocol.json` of them.

A line is an item under one of the task's filters, with `draw` where several answers are drawn (docs/how-to/eval.md).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from maskft.errors import MaskftError, first_line
from maskft.storage.files import atomic_write_bytes, atomic_write_text, disk_errors
from maskft.storage.json_text import json_hash, json_objects, read_object

SAMPLES_FILE = "samples.jsonl"
PROTOCOL_FILE = "protocol.json"

Row = dict[str, Any]


class _Sample(BaseModel, extra="allow"):
    """What is read of a sample; its metrics are further keys."""

    doc_id: int | str
    filter: str
    metrics: list[str]
    draw: int = 0
    doc_hash: str = ""

    @model_validator(mode="after")
    def _has_verdicts(self) -> Self:
        held = self.model_extra or {}
        for name in self.metrics:
            if name not in held or isinstance(held[name], str):
                raise ValueError(f"the verdict {name} is missing or a text")
        if "nll" in self.metrics:
            TypeAdapter(_Doc).validate_python(held.get("doc"))
        return self


class _Doc(TypedDict):
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]


class _Data(TypedDict):
    sha256: str


class _Group(TypedDict):
    num_tasks: int
    metrics: dict[str, bool]


class _Protocol(BaseModel, extra="allow"):
    """What is read of a protocol."""

    model: str
    task: str
    n: int
    dtype: str
    data: _Data
    version: str
    num_samples: int
    generation_kwargs: dict[str, Any] | None
    groups: dict[str, _Group] = {}


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
    for number, row in enumerate(rows, start=1):
        _check(_Sample, row, f"{path}, sample {number}", "remove the file and run maskft eval again.")
    items = Counter((str(row["doc_id"]), str(row["filter"]), str(row.get("draw", 0))) for row in rows)
    for (item, _, draw), number in items.items():
        if number > 1:  # two processes of an earlier maskft answered it, and the scores would count it so often
            what = f"{path} holds item {item} of draw {draw} {number} times"
            raise MaskftError(f"{what}; remove the file and run maskft eval again.")
    return rows


def read_protocol(folder: Path) -> Row:
    """The protocol that a folder's samples were made under; a file that is missing or damaged is refused."""
    path = folder / PROTOCOL_FILE
    remedy = f"remove {folder} and run maskft eval again"
    protocol = read_object(path, remedy)
    _check(_Protocol, protocol, str(path), f"{remedy}.")
    return protocol


def _check(kind: type[BaseModel], row: Row, where: str, remedy: str) -> None:
    try:
        kind.model_validate(row, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "it"
        raise MaskftError(f"{where}: {name} is damaged ({first['msg']}); {remedy}") from error
    except UnicodeError as error:  # half of a character in a name
        raise MaskftError(f"{where} is damaged ({first_line(error)}); {remedy}") from error


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
