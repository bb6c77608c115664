"""One process at a time writes into an output folder, and takes away what a killed one left half-written there."""

import errno
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from maskft.errors import MaskftError
from maskft.storage.files import LOCK, disk_errors, require_writable
from maskft.storage.interrupts import HELD, uninterrupted

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{12}\.partial")
_RESULTS = ("config.json", "adapter_config.json", "report.json", "search.json", "landscape.json", "summary.json")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def locked(folder: str | Path, command: str, *, by_first_rank: bool = False, waits: bool = False) -> Iterator[None]:
    """Keep other processes out of an output folder; what an earlier one left half-written there is removed.

    The lock goes with the process, however it ends. Its file lies beside the folder, or in it where nothing can be
    written beside it, as with a mounted volume. A disk without locks is warned of.

    Args:
        command: what other processes are told is at work.
        by_first_rank: the processes of one run share the folder.
        waits: wait for another process, not refuse.

    Raises:
        MaskftError: another process holds it, or it cannot be made or written to.
    """
    if by_first_rank and os.environ.get("RANK", "0") != "0":
        yield
        return
    require_writable(folder)
    path = Path(os.path.realpath(folder))
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        with disk_errors(f"lock the output folder {folder}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire(path, f"maskft {command}", waits)
        HELD.append(path)
        try:
            _remove_partials(path)
            yield
            HELD.remove(path)
        finally:
            with uninterrupted():
                _remove_partials(path)
                if lock is not None:
                    Path(lock.lock_file).unlink(missing_ok=True)  # who has opened it notices, and tries again
                    lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # it holds something
                parent.rmdir()


def kept(folder: Path) -> str:
    """What a stopped command has left for the next start, for the end of a sentence."""
    numbers = [path.parent.name.rpartition("-")[2] for path in folder.glob("checkpoint-*/trainer_state.json")]
    checkpoint = max((int(number) for number in numbers if number.isdigit()), default=None)
    files = [*folder.glob("*/*/answers.jsonl"), *folder.glob("general.jsonl")]
    folds = [int(path.parts[-3].removeprefix("fold-")) + 1 for path in folder.glob("fold-*/mask/report.json")]
    counts = {
        "finished run": len([*folder.glob("*/*/*/*/result.json")]),
        "fine-tuning": len([*folder.glob("fine-tuning-*/report.json"), *folder.glob("model/report.json")]),
        "fold": max(folds, default=0),
        "finished task": len([*folder.glob("*/*/samples.jsonl")]),
        "answer": sum(path.read_bytes().count(b"\n") for path in files),
    }
    told = [f"{number} {what}{'s' * (number != 1)}" for what, number in counts.items() if number]
    if checkpoint is not None:
        told.insert(0, f"checkpoint-{checkpoint}")
    if any((folder / name).exists() for name in _RESULTS):
        return f"kept in {folder}: {', '.join(['a result', *told])}"
    if not told:
        return "nothing is kept"
    how = "the same command goes on" if checkpoint is None else "--resume_from_checkpoint auto goes on"
    return f"kept in {folder}: {', '.join(told)}; {how}"


def _acquire(folder: Path, command: str, waits: bool) -> FileLock | None:
    """The lock, and in its file who has it; None where the disk has no locks."""
    for path in (folder.parent / f".{folder.name}.lock", folder / LOCK):
        # For all users: one that may not open another's file would lock a file of its own.
        lock = FileLock(path, timeout=-1 if waits else 0, mode=0o666, fallback_to_soft=False)
        try:
            lock.acquire()
            break
        except Timeout as error:
            who = _holder(path)
            raise MaskftError(f"{who} is at work on {folder}; wait for it, or give another --output_dir.") from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                told = "The disk of %s has no locks (%s): see to it that no other process writes there."
                logger.warning(told, folder, error.strerror)
                return None
            if error.errno not in _REFUSED or path.exists() or path.parent == folder:
                raise
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    held = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):  # a full disk is told of by what is written next
        path.write_text(json.dumps(held) + "\n", encoding="utf-8")
    return lock


def _holder(path: Path) -> str:
    """Who has a lock, by what its file says."""
    try:
        return "{command} (pid {pid} on {host}, since {since})".format(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return "Another process"


def _remove_partials(folder: Path) -> None:
    """Remove what a killed process was writing, but not under a folder that another may be at work on."""
    for path in (*folder.parent.glob(".*.partial"), *folder.rglob(".*.partial")):
        named = _PARTIAL.fullmatch(path.name)
        target = path.parent / named[1] if named else folder.parent
        within = [each for each in (target, *target.parents) if folder in each.parents]
        if (target == folder or within) and not any((each.parent / f".{each.name}.lock").exists() for each in within):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
