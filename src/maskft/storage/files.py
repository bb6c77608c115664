"""Output files that appear under their final name only when they are complete."""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from maskft.errors import MaskftError
from maskft.storage.interrupts import uninterrupted

LOCK = ".lock"
"""The file by which a process holds an output folder that nothing can be written beside."""
# Files that can run code when they are read.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")

_DISK_ERRNOS = {
    errno.ENOSPC: "no space is left on the disk; free some space or choose another output folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output folder",
    errno.EROFS: "the file system is read-only; choose another output folder",
    errno.EACCES: "permission is denied; choose an output folder you may write to",
    errno.EPERM: "the operation is not permitted; choose an output folder you may write to",
    errno.EIO: "the disk reports an error of its own; check it or choose another output folder",
    errno.EXDEV: "a folder inside it lies on another disk; choose another output folder",
    errno.EEXIST: "a file is in the place of a folder; choose another name",
    errno.ENOTDIR: "a file is in the place of a folder; choose another name",
    errno.EISDIR: "a folder is in the place of a file; choose another name",
    errno.ELOOP: "a link is in the place of a file; remove it or choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}

# What comes last into a folder: what tells a loader that it holds a model or an adapter, then that a run is done.
_LAST_NAMES = ("config.json", "adapter_config.json", "report.json")


@contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Give a temporary folder whose content comes to lie in `final` when the block ends well.

    Everything is flushed to disk first. Where `final` is absent the whole folder takes its name in one step. A folder
    that is there stays, for it may be a mounted volume or hold checkpoints, and so does a link to one: the temporary
    folder lies inside it, on the same disk, and each file is moved out of there in one step. `config.json` and
    `adapter_config.json` come last, without which no loader takes the folder for a model, and then `report.json`, which
    tells that a run is done. When the block raises, the temporary folder is removed and `final` is left as it was.

    Raises:
        MaskftError: `final` is a file, holds a folder in the place of a file or the other way around, or the disk is
            full, read-only, not permitted or broken.
    """
    with disk_errors(f"write {final}"):
        folder = Path(os.path.realpath(final))
        if os.path.lexists(folder) and not folder.is_dir():
            raise MaskftError(f"Cannot write the folder {final}: a file of that name exists; give another name.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(folder if folder.exists() else folder.parent, folder.name)
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            with uninterrupted():
                if folder.exists():
                    _move_files(temporary, folder)
                else:
                    temporary.replace(folder)
                    sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def default_cache_dir() -> Path:
    """Where what is fetched or made once is kept: `$MASKFT_CACHE` where it is set, else `~/.cache/maskft`."""
    return Path(os.environ.get("MASKFT_CACHE") or Path.home() / ".cache" / "maskft")


def atomic_write_text(path: str | Path, data: str) -> None:
    """Write `data` as UTF-8 to `path`; see :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, data.encode("utf-8"))


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there in one step; missing parent folders are made.

    Raises:
        MaskftError: the disk is full, read-only or not permitted; `path` is then as it was before.
    """
    path = Path(path)
    with disk_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path.absolute().parent, path.name)
        try:
            temporary.write_bytes(data)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def require_own(files: Iterable[Path], folder: Path) -> None:
    """Refuse files of a folder that are links to what lies elsewhere, and would be copied from there.

    Those in a hub's cache are links to its `blobs`.

    Raises:
        MaskftError: one is such a link.
    """
    real = Path(os.path.realpath(folder))
    homes = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    for path in files:
        target = Path(os.path.realpath(path))
        if not any(map(target.is_relative_to, homes)):
            raise MaskftError(
                f"{path} is a link to {target}, outside its folder; put a copy in its place, or remove it."
            )


def is_file(name: object) -> bool:
    """Whether a name, of any length and characters, is one of a file; Path's own raises for some until Python 3.13."""
    return os.path.isfile(str(name))  # noqa: PTH113


def is_folder(name: object) -> bool:
    """The same of a folder."""
    return os.path.isdir(str(name))  # noqa: PTH112


def require_empty_output(path: str | Path, *, what: str, or_else: str = "") -> None:
    """Refuse an output folder that already holds something; what a killed `atomic_folder` left there does not count.

    For the message, `what` is to be written there ("the merged model"), and `or_else` is what the command offers beside
    another folder ("write over it with ...").

    Raises:
        MaskftError: `path` is a file, cannot be read, or is a folder that is not empty.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise MaskftError(f"The output folder {path} for {what} is a file; give another --output_dir.")
    with disk_errors(f"read the output folder {path}"):
        held = sorted(e.name for e in path.iterdir() if e.name != LOCK and not e.match(".*.partial"))
    if held:
        names = ", ".join(held[:4]) + (f" and {len(held) - 4} more" if len(held) > 4 else "")
        offer = f", or {or_else}" if or_else else ""
        raise MaskftError(
            f"The output folder {path} for {what} is not empty (it holds {names}): give another --output_dir{offer}."
        )


def require_writable(path: str | Path) -> None:
    """Refuse an output folder that cannot be made or written to, before any work; nothing is left there.

    Raises:
        MaskftError: a file is in its place or in that of a folder above it, or the disk refuses.
    """
    parent = _nearest(path)
    if not parent.is_dir():
        raise MaskftError(f"The output folder {path} cannot be made: {parent} is a file; give another --output_dir.")
    with disk_errors(f"write to the output folder {path}"), tempfile.TemporaryFile(dir=parent):
        pass


def require_free_space(path: str | Path, num_bytes: int, what: str) -> None:
    """Refuse to start when the disk that will hold `path` has fewer than `num_bytes` free for `what`.

    Raises:
        MaskftError: too little space, with the needed and the free amount in GB (10^9 bytes).
    """
    free = shutil.disk_usage(_nearest(path)).free
    if free < num_bytes:
        raise MaskftError(
            f"Writing {what} to {path} needs {num_bytes / 1e9:.2f} GB but the disk has "
            f"{free / 1e9:.2f} GB free: free some space or choose another output folder."
        )


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn "no space", "read-only" and the like inside the block into a sentence, "Cannot `what`: ...".

    safetensors and torch.save hide the system's error in exceptions of their own; those are understood too.
    All other exceptions pass through.

    Raises:
        MaskftError: the disk refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        named = error.filename if isinstance(error, OSError) else None
        where = f" ({named})" if named and str(named) not in what else ""
        raise MaskftError(f"Cannot {what}{where}: {reason}.") from error


def _disk_reason(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return _DISK_ERRNOS.get(error.errno or 0)
    text = str(error)
    if isinstance(error, SafetensorError):
        code = re.search(r"\(os error (\d+)\)", text)
        return _DISK_ERRNOS.get(int(code[1])) if code else None
    if "inline_container.cc" not in text:  # where torch.save writes its archives
        return None
    if "unexpected pos" in text:  # a short write: torch does not pass on the reason
        return _DISK_ERRNOS[errno.ENOSPC]
    return next((reason for code, reason in _DISK_ERRNOS.items() if os.strerror(code) in text), None)


def _nearest(path: str | Path) -> Path:
    """What is there of a path, behind its links: itself, or the nearest folder above it."""
    real = Path(os.path.realpath(path))
    return next(there for there in (real, *real.parents) if os.path.lexists(there))


def _temporary(parent: Path, name: str) -> Path:
    """A name in `parent`, so that renaming it stays on one file system; hidden from most globs."""
    return parent / f".{name}.{uuid.uuid4().hex[:12]}.partial"


def _move_files(source: Path, target: Path) -> None:
    def order(path: Path) -> tuple[bool, int, Path]:
        return not path.is_dir(), _LAST_NAMES.index(path.name) + 1 if path.name in _LAST_NAMES else 0, path

    moves = [(path, target / path.relative_to(source)) for path in sorted(source.rglob("*"), key=order)]
    for path, there in moves:
        if os.path.lexists(there) and there.is_dir() != path.is_dir():
            is_there, wanted = ("folder", "file") if there.is_dir() else ("file", "folder")
            raise MaskftError(
                f"Cannot write {there}: a {is_there} is in the place of the {wanted}; choose another output folder."
            )
    for path, there in moves:
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(there)
            sync(there.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
