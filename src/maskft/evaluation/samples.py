"""What one model answered to one task: lm-eval's samples in `samples.jsonl`, and the `protocol.json` of them.

A line is an item under one of the task's filters, with `draw` where several answers are drawn (docs/how-to/eval.md).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_bytes, atomic_write_text, disk_errors
from maskft.storage.json_text import json_hash, json_objects, read_object
from maskft.values import check_value

SAMPLES_FILE = "samples.jsonl"
PROTOCOL_FILE = "protocol.json"
ANSWERS_FILE = "answers.jsonl"
AGGREGATES_FILE = "lm_eval.json"

Row = dict[str, Any]

# What is read of a sample, of its document where that has a loss, of a protocol, and of a group in it.
_SAMPLE = {"doc_id": int | str, "filter": str, "metrics": list[str], "draw": int | None, "doc_hash": str | None}
_DOC = dict.fromkeys(("prompt", "completion"), str | list[dict[str, Any]])
_PROTOCOL: dict[str, Any] = dict.fromkeys(("model", "task", "dtype", "version"), str)
_PROTOCOL |= dict.fromkeys(("n", "num_samples"), int)
_PROTOCOL |= {"data": dict[str, str], "generation_kwargs": Row | None, "groups": dict[str, Row] | None}
_GROUP = {"num_tasks": int, "metrics": dict[str, bool]}


def sample_folder(output_dir: Path, model: str, task: str) -> Path:
    """Where the samples of a model and a task lie: readable, and different for different names."""
    return output_dir / _slug(model) / _slug(task)


def _slug(name: str) -> str:
    parts = [Path(part).name.strip(".") or "model" for part in name.split("+")]  # .. would lead out of the folder
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
    remedy = "remove the file and run maskft eval again."
    for number, row in enumerate(rows, start=1):
        where = f"{path}, sample {number}"
        _check(row, _SAMPLE, where, remedy)
        for name in row["metrics"]:  # further keys
            if name not in row or isinstance(row[name], str):
                raise MaskftError(f"{where}: the verdict {name} is missing or a text; {remedy}")
        if "nll" in row["metrics"]:
            _check(row, {"doc": Row}, where, remedy)
            _check(row["doc"], _DOC, where, remedy)
    items = Counter((str(row["doc_id"]), str(row["filter"]), str(row.get("draw", 0))) for row in rows)
    ((item, _, draw), number) = items.most_common(1)[0]
    if number > 1:  # two processes of an earlier maskft answered it, and the scores would count it so often
        raise MaskftError(f"{path} holds item {item} of draw {draw} {number} times; {remedy}")
    return rows


def read_protocol(folder: Path) -> Row:
    """The protocol that a folder's samples were made under; a file that is missing or damaged is refused."""
    path = folder / PROTOCOL_FILE
    remedy = f"remove {folder} and run maskft eval again"
    protocol = read_object(path, remedy)
    _check(protocol, _PROTOCOL, str(path), f"{remedy}.")
    _check(protocol["data"], {"sha256": str}, str(path), f"{remedy}.")
    for group in (protocol.get("groups") or {}).values():
        _check(group, _GROUP, str(path), f"{remedy}.")
    return protocol


def _check(row: Row, hints: Mapping[str, Any], where: str, remedy: str) -> None:
    try:
        for name, hint in hints.items():
            check_value(name, row.get(name), hint, f"{where}: ")
    except MaskftError as error:
        raise MaskftError(f"{str(error).removesuffix('.')}; {remedy}") from error


def open_folder(folder: Path, protocol: Row) -> list[Row]:
    """Note the protocol, and give the samples that are there already; those of another protocol are refused."""
    held = [name for name in (SAMPLES_FILE, ANSWERS_FILE) if (folder / name).exists()]
    if held:
        before, wanted = read_protocol(folder), json.loads(json.dumps(protocol))
        changed = [key for key in sorted({*before, *wanted}) if before.get(key) != wanted.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r} and is now {wanted.get(key)!r}" for key in changed[:3])
            hint = "give another --output_dir, or the earlier settings."
            raise MaskftError(f"{folder} holds samples of another protocol ({shown}); {hint}")
    with disk_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / PROTOCOL_FILE, json.dumps(protocol, indent=1, ensure_ascii=False) + "\n")
    return read_samples(folder) if SAMPLES_FILE in held else []
