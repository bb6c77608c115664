"""How much memory there is for a value, before it is made; a container's limit counts as much as the machine's."""

from pathlib import Path

import psutil

from maskft.errors import MaskftError

# Names of a group's limit and use in cgroup v2, and in v1.
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
_CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))


def require_memory(num_bytes: int, what: str) -> None:
    """Refuse to make a value of `num_bytes` where fewer are free; `what` begins the sentence.

    Raises:
        MaskftError: there is less memory, with both amounts in GB (10^9 bytes).
    """
    free = free_memory()
    if num_bytes > free:
        raise MaskftError(
            f"{what} needs up to {num_bytes / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; the file "
            "is damaged, or use a larger machine."
        )


def free_memory() -> int:
    """Bytes that the machine, and every control group of this process, still have."""
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"), _CGROUPS)])


def _left_in_groups(groups: Path, roots: tuple[Path, ...]) -> list[int]:
    """What is left of the limit of each group above this process; inside a container its own group is the root."""
    names = [line.split(":", 2)[2] for line in groups.read_text().splitlines()] if groups.exists() else []
    inner = [root / name.lstrip("/") for root in roots for name in ["", *names]]
    folders = {folder for each in inner for folder in (each, *each.parents) if any(map(folder.is_relative_to, roots))}
    return [left for folder in folders for files in _FILES if (left := _left(folder, *files)) is not None]


def _left(folder: Path, limit: str, use: str) -> int | None:
    try:
        most, used = int((folder / limit).read_text()), int((folder / use).read_text())  # "max" is no limit
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Files that the system can drop at once count as used there.
        return max(most - used + int(dict(pairs).get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return None
