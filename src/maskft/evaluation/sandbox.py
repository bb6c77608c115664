"""Runs programs that a model wrote: no network, no files but the interpreter's, limits on all they can use up.

Two ways, the first that works here: bubblewrap, or the kernel's namespaces through util-linux's `unshare`; else nothing
is run. Inside either, a program can write to small folders in memory alone, and sees no home folder, no network device
and no process but its own; started by root, it has a user of its own. Its tests run beside it, where it cannot look
(`sandboxed.py`). None of this stops a hole in the kernel: a virtual machine is the tool against that.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from maskft.errors import MaskftError
from maskft.evaluation.sandboxed import CALLS

_CHILD = Path(__file__).with_name("sandboxed.py")
_NOBODY = "65534"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp"}
# A thread of OpenBLAS, or another arena of malloc's, is address space that is counted and not used.
_ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_SCRATCH_BYTES = 64 * 2**20
_POLL_S = 0.02
# Where a program may find libraries that its interpreter is linked against.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")


def run_untrusted(
    program: str, tests: str = "", *, timeout_s: float = 10.0, memory_bytes: int = 2**31, isolation: str | None = None
) -> str:
    """Run the text of a Python program that nobody has read: why it did not come to its end, or "" if it did.

    Args:
        tests: The text of a Python program that is trusted, and calls functions of the other's, which cannot read it.
            Where these are asked for more than plain values, the reason begins with `sandboxed.NOT_PLAIN`.
        timeout_s: Seconds from start to end, after which all its processes are killed, of 32 at most at a time.
        memory_bytes: Most address space of all its processes together, the tests' included, and in a control group,
            where one can be made, most memory of any kind.
        isolation: "bubblewrap" or "namespaces"; None for the first that works here (MaskftError where none does).
    """
    isolation = isolation or find_isolation()
    token = secrets.token_hex(16)
    limits = {"as": memory_bytes, "fsize": _SCRATCH_BYTES, "cpu": int(timeout_s) + 1, "core": 0, "nofile": 64}
    limited = ["prlimit", *(f"--{name}={value}" for name, value in (limits | {"nproc": 32}).items()), "--"]
    judge = [sys.executable, "-I", "-c", _CHILD.read_text(encoding="utf-8")]
    with _control_group(memory_bytes) as group:
        joined = [] if group is None else ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group)]
        process = subprocess.Popen(
            [*joined, *_ISOLATIONS[isolation](), *limited, *judge],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env=_ENVIRONMENT | {"HOST_HOME": str(Path.home())},
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before it read
            process.stdin.write(json.dumps({"program": program, "tests": tests, "token": token}).encode())
            process.stdin.close()
        verdict = _watch(process, timeout_s, memory_bytes)
        if group is not None and "oom_kill 0" not in (group / "memory.events").read_text():
            verdict = f"More than {memory_bytes} bytes of memory."
    return "" if verdict == token else verdict


def _watch(process: "subprocess.Popen[bytes]", timeout_s: float, memory_bytes: int) -> str:
    """The verdict that the program's watcher wrote, or why there is none; no process is left when this returns."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    reason = ""
    try:
        while not reason and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            if _memory_of(process.pid) > memory_bytes:
                reason = f"More than {memory_bytes} bytes of memory."
            elif process.poll() is None and time.monotonic() > deadline:
                reason = f"Still running after {timeout_s:g} s."
    finally:
        # Either isolation ends its process namespace with that namespace's first process, which is among these.
        processes = _processes_of(process.pid)
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(processes, timeout=10)
    with process.stdout:
        said = process.stdout.read(2**16).decode(errors="replace")
    return reason or said or "Ended before its checks did."


def _processes_of(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _memory_of(pid: int) -> int:
    total = 0
    for process in _processes_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().vms  # not what is resident: shared memory can be held and not be
    return total


@functools.cache
def find_isolation() -> str:
    """The first isolation that works on this machine; MaskftError where none does."""
    if os.uname().machine not in CALLS:
        what = f"knows the system calls of {' and '.join(CALLS)}, not those of {os.uname().machine}"
        raise MaskftError(f"The sandbox for the model's code {what}; run these tasks on one of the former.")
    for name in _ISOLATIONS:
        with contextlib.suppress(OSError):
            if not run_untrusted("pass", timeout_s=30, isolation=name):
                return name
    hint = "install bubblewrap, or let this user make namespaces (sysctl kernel.unprivileged_userns_clone=1)."
    raise MaskftError(f"No sandbox for the model's code works on this machine; {hint}")


def _interpreter_folders() -> list[str]:
    """Folders outside the system's own that the interpreter and its packages lie in."""
    given = [folder for folder in (sys.prefix, sys.base_prefix) if Path(folder).is_dir()]
    return sorted(f for f in {*given, *(str(Path(f).resolve()) for f in given)} if not f"{f}/".startswith("/usr/"))


@contextlib.contextmanager
def _control_group(memory_bytes: int) -> Iterator[Path | None]:
    """A control group (version 2) for one program, beside this process's own, where the system lets it be made."""
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "/")
    group = Path(f"/sys/fs/cgroup{Path(own).parent}", f"maskft-{secrets.token_hex(8)}")
    limits = {"memory.max": memory_bytes, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": 64}
    made: Path | None = None
    with contextlib.suppress(OSError):
        group.mkdir()
        for name, value in limits.items():
            with (group / name).open("r+") as file:  # there, or no file of a control group
                file.write(str(value))
        made = group
    try:
        yield made
    finally:
        for _ in range(100 if group.exists() else 0):  # until the last of its processes is gone
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(_POLL_S)


def _drop() -> list[str]:
    """What setpriv is told so that a program that root starts is a user's that nobody is.

    A user of its own, since the kernel counts processes and keeps keys for each user.
    """
    if os.getuid() != 0:
        return []
    ranges = [[int(part) for part in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda each: each[2])
    user = str(first + count // 2 + 1 + secrets.randbelow(max(count // 4, 1)))
    return ["--reuid", user, "--regid", user, "--clear-groups"]


def _bubblewrap() -> list[str]:
    drop = _drop()
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent "
    options += "--new-session --as-pid-1 --cap-drop ALL "  # the first process, so that all others end before it does
    if drop:
        # Without a user namespace, so that the user it becomes is one that owns nothing here; those two to become it.
        options += "--cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        options += f"--unshare-user --uid {_NOBODY} --gid {_NOBODY}"
    command = [shutil.which("bwrap") or "bwrap", *options.split()]
    for path in _SYSTEM:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            command += ["--ro-bind", path, path]
    small = f"--perms 1777 --size {_SCRATCH_BYTES} --tmpfs"
    command += f"--proc /proc --dev /dev {small} /dev/shm --remount-ro /dev {small} /tmp".split()
    for folder in _interpreter_folders():
        for parent in reversed(Path(folder).parents[:-1]):
            # Made by bubblewrap for its own user alone, and so closed to the one that the program runs as.
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--", *(["setpriv", *drop, "--"] if drop else [])]


# The interpreter's folders, and /dev, are opened first, since they may lie under a folder that is hidden.
_NAMESPACE_SCRIPT = r"""
set -e
size=$1; folders=$2; shift 2
IFS='
'
number=3
for folder in $folders; do eval "exec $number<\"\$folder\""; number=$((number + 1)); done
exec 9</dev
for hidden in "$HOST_HOME" /*; do
    case "$hidden" in /bin|/etc|/lib*|/proc|/sbin|/sys|/usr) ;;
    *) if [ -d "$hidden" ]; then mount -t tmpfs -o "size=$size,mode=1777" none "$hidden"; fi ;;
    esac
done
chmod 755 /dev  # in a sticky folder that all may write to, the kernel opens no foreign device for writing
for device in full null random urandom zero; do
    : > "/dev/$device"
    mount --no-canonicalize --bind "/proc/self/fd/9/$device" "/dev/$device"
done
exec 9<&-
number=3
for folder in $folders; do
    mkdir -p "$folder"
    mount --no-canonicalize --bind "/proc/self/fd/$number" "$folder"
    eval "exec $number<&-"
    number=$((number + 1))
done
while IFS=' ' read -r _ _ _ _ point _; do
    point=$(printf %b "$point")  # a space is written \040 there
    case "$point" in /proc|/proc/*|/tmp) ;;
    *) mount --no-canonicalize -o remount,bind,ro "$point" 2>/dev/null || [ "$point" != / ] ;;
    esac
done < /proc/self/mountinfo
cd /tmp
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def _namespaces() -> list[str]:
    command = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = ["sh", "-c", _NAMESPACE_SCRIPT, "sandbox", str(_SCRATCH_BYTES), "\n".join(_interpreter_folders())]
    drop = _drop()
    return [*command, *([] if drop else ["--map-root-user"]), *script, *drop, "--"]


_ISOLATIONS: dict[str, Callable[[], list[str]]] = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}
