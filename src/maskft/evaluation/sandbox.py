"""Runs programs that a model wrote: no network, no files but the interpreter's, limits on all they can use up.

Two ways, the first that works here: bubblewrap, or the kernel's namespaces through util-linux's `unshare`; else nothing
is run. Inside either, a program can write to a small folder in memory alone, and sees no home folder, no network device
and no process but its own; as root it also gives up root. Neither stops a hole in the kernel, nor a program that sets
out to forge its verdict: it shares its interpreter with what watches it. A virtual machine is the tool against both.
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
from collections.abc import Callable
from pathlib import Path

import psutil

from maskft.errors import MaskftError

_CHILD = Path(__file__).with_name("sandboxed.py")
_NOBODY = "65534"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "OPENBLAS_NUM_THREADS": "1"}
_SCRATCH_BYTES = 64 * 2**20
_POLL_S = 0.02
# Where a program may find libraries that its interpreter is linked against.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")


def run_untrusted(
    program: str, *, timeout_s: float = 10.0, memory_bytes: int = 2**30, isolation: str | None = None
) -> str:
    """Run the text of a Python program that nobody has read: why it did not come to its end, or "" if it did.

    Args:
        timeout_s: Seconds from start to end, after which all its processes are killed, of 32 at most at a time.
        memory_bytes: Most memory of all its processes together, its files included.
        isolation: "bubblewrap" or "namespaces"; None for the first that works here (MaskftError where none does).
    """
    isolation = isolation or find_isolation()
    token = secrets.token_hex(16)
    limits = {"as": memory_bytes, "fsize": _SCRATCH_BYTES, "cpu": int(timeout_s) + 1, "core": 0, "nofile": 64}
    limited = ["prlimit", *(f"--{name}={value}" for name, value in (limits | {"nproc": 32}).items()), "--"]
    process = subprocess.Popen(
        [*_ISOLATIONS[isolation](), *limited, sys.executable, "-I", "-c", _CHILD.read_text(encoding="utf-8")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=_ENVIRONMENT | {"HOST_HOME": str(Path.home())},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended before it read
        process.stdin.write(json.dumps({"program": program, "token": token}).encode())
        process.stdin.close()
    verdict = _watch(process, timeout_s, memory_bytes)
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
            total += process.memory_info().rss
    return total


@functools.cache
def find_isolation() -> str:
    """The first isolation that works on this machine; MaskftError where none does."""
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


def _drop() -> list[str]:
    """What setpriv is told so that a program that root starts is nobody's."""
    return ["--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"] if os.getuid() == 0 else []


def _bubblewrap() -> list[str]:
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --die-with-parent "
    if _drop():
        # Without a user namespace, so that the user it becomes is one that owns nothing here; those two to become it.
        options += "--new-session --cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        options += f"--new-session --cap-drop ALL --unshare-user --uid {_NOBODY} --gid {_NOBODY}"
    command = [shutil.which("bwrap") or "bwrap", *options.split()]
    for path in _SYSTEM:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            command += ["--ro-bind", path, path]
    command += f"--proc /proc --dev /dev --perms 1777 --size {_SCRATCH_BYTES} --tmpfs /tmp".split()
    for folder in _interpreter_folders():
        for parent in reversed(Path(folder).parents[:-1]):
            # Made by bubblewrap for its own user alone, and so closed to the one that the program runs as.
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--", *(["setpriv", *_drop(), "--"] if _drop() else [])]


# The interpreter's folders are opened first, since they may lie under a folder that is hidden.
_NAMESPACE_SCRIPT = r"""
set -e
size=$1; shift
folders=$1; shift
number=3
for folder in $folders; do eval "exec $number<\"\$folder\""; number=$((number + 1)); done
for hidden in "$HOST_HOME" /*; do
    case "$hidden" in /bin|/dev|/etc|/lib*|/proc|/sbin|/sys|/usr) ;;
    *) if [ -d "$hidden" ]; then mount -t tmpfs -o "size=$size,mode=1777" none "$hidden"; fi ;;
    esac
done
if [ -d /dev/shm ]; then mount -t tmpfs -o size=4k none /dev/shm; fi
number=3
for folder in $folders; do
    mkdir -p "$folder"
    mount --no-canonicalize --bind "/proc/self/fd/$number" "$folder"
    eval "exec $number<&-"
    number=$((number + 1))
done
while read -r _ _ _ _ point _; do
    case "$point" in /proc|/proc/*|/tmp|/dev/pts) ;;
    *) mount --no-canonicalize -o remount,bind,ro "$point" 2>/dev/null || [ "$point" != / ] ;;
    esac
done < /proc/self/mountinfo
cd /tmp
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def _namespaces() -> list[str]:
    command = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = ["sh", "-c", _NAMESPACE_SCRIPT, "sandbox", str(_SCRATCH_BYTES), " ".join(_interpreter_folders())]
    return [*command, *([] if _drop() else ["--map-root-user"]), *script, *_drop(), "--"]


_ISOLATIONS: dict[str, Callable[[], list[str]]] = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}
