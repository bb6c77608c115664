"""Runs programs that a model wrote: no network, no files but the interpreter's, limits on all they can use up.

Two ways, the first that works on this machine: bubblewrap, or the kernel's namespaces through util-linux's `unshare`.
Where neither works nothing is run. Inside either, a program sees a file system that it cannot write to except an own
small folder in memory, no home folder, no network device and no process but its own; as root it also gives up root.
Neither stops a hole in the kernel, nor a program that sets out to forge its verdict: it shares its interpreter with
what watches it, so it could write the token itself. A virtual machine is the tool against both.
"""

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from maskft.errors import MaskftError

_CHILD = Path(__file__).with_name("sandboxed.py")
_NOBODY = 65534
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "OPENBLAS_NUM_THREADS": "1"}
_SCRATCH_BYTES = 64 * 2**20
_POLL_S = 0.02
_MOST_VERDICT_BYTES = 2**16
# Where a program may find libraries that its interpreter is linked against.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")


@dataclass(frozen=True)
class SandboxResult:
    """What became of a program.

    Attributes:
        passed: It ran to its end without an exception.
        reason: Why it did not pass; empty when it did.
        isolation: "bubblewrap" or "namespaces".
    """

    passed: bool
    reason: str
    isolation: str


def run_untrusted(
    program: str,
    *,
    timeout_s: float = 10.0,
    memory_bytes: int = 2**30,
    num_processes: int = 32,
    isolation: str | None = None,
) -> SandboxResult:
    """Run a Python program that nobody has read.

    Args:
        program: Source text; what it prints is thrown away.
        timeout_s: Seconds from start to end, after which all its processes are killed.
        memory_bytes: Most memory of all its processes together, its files included.
        num_processes: Most processes and threads at a time.
        isolation: "bubblewrap" or "namespaces"; None for the first that works here.

    Raises:
        MaskftError: no isolation works on this machine.
    """
    isolation = isolation or find_isolation()
    token = secrets.token_hex(16)
    request = {
        "program": program,
        "token": token,
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
        "file_bytes": _SCRATCH_BYTES,
        "num_processes": num_processes,
        "uid": _NOBODY if os.getuid() == 0 else None,
    }
    command = [*_ISOLATIONS[isolation](), sys.executable, "-I", "-c", _CHILD.read_text()]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=_ENVIRONMENT | {"HOST_HOME": str(Path.home())},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended before it read
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
    verdict = _watch(process, timeout_s, memory_bytes)
    return SandboxResult(verdict == token, "" if verdict == token else verdict, isolation)


def _watch(process: "subprocess.Popen[bytes]", timeout_s: float, memory_bytes: int) -> str:
    """The verdict that the program's watcher wrote, or why there is none; no process is left when this returns."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    said = b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(_POLL_S):
                    part = os.read(process.stdout.fileno(), 4096)
                    said += part
                    if not part or len(said) > _MOST_VERDICT_BYTES:
                        break
                if time.monotonic() > deadline:
                    return f"Still running after {timeout_s:g} s."
                if _memory_of(process.pid) > memory_bytes:
                    return f"More than {memory_bytes} bytes of memory."
    finally:
        _kill(process)
    return said.decode(errors="replace") or "Ended before its checks did."


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


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # Either isolation ends its process namespace with that namespace's first process, which is among these.
    processes = _processes_of(process.pid)
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(processes, timeout=10)
    if process.stdout is not None:
        process.stdout.close()


@functools.cache
def find_isolation() -> str:
    """The first isolation that works on this machine.

    Raises:
        MaskftError: none does.
    """
    for name in _ISOLATIONS:
        try:
            if run_untrusted("pass", timeout_s=30, isolation=name).passed:
                return name
        except OSError:
            continue
    raise MaskftError(
        "No sandbox for the model's code works on this machine; install bubblewrap (`apt-get install bubblewrap`), or "
        "let this user make namespaces (sysctl kernel.unprivileged_userns_clone=1)."
    )


def _interpreter_folders() -> list[str]:
    """Folders outside the system's own that the interpreter and its packages lie in."""
    found = {str(Path(folder).resolve()) for folder in (sys.prefix, sys.base_prefix)}
    found |= {folder for folder in (sys.prefix, sys.base_prefix) if Path(folder).is_dir()}
    return sorted(folder for folder in found if not folder.startswith("/usr/") and folder != "/usr")


def _bubblewrap() -> list[str]:
    program = shutil.which("bwrap") or "bwrap"
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:
        # Without a user namespace, so that the user it becomes is one that owns nothing here; those two to become it.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session"]
    for path in _SYSTEM:
        if Path(path).is_symlink():
            command += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(_SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for folder in _interpreter_folders():
        for parent in reversed(Path(folder).parents[:-1]):
            # Made by bubblewrap for its own user alone, and so closed to the one that the program runs as.
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


# The interpreter's folders are opened first, since they may lie under a folder that is hidden.
_NAMESPACE_SCRIPT = r"""
set -e
size=$1; shift
folders=$1; shift
number=3
for folder in $folders; do eval "exec $number<\"\$folder\""; number=$((number + 1)); done
for hidden in "$HOST_HOME" /home /root /mnt /media /srv /opt /run /var /work /tmp; do
    if [ -d "$hidden" ]; then mount -t tmpfs -o "size=$size,mode=1777" none "$hidden"; fi
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
    drop = ["--reuid", str(_NOBODY), "--regid", str(_NOBODY), "--clear-groups"] if os.getuid() == 0 else []
    command += [] if os.getuid() == 0 else ["--map-root-user"]
    folders = " ".join(_interpreter_folders())
    return [*command, "sh", "-c", _NAMESPACE_SCRIPT, "sandbox", str(_SCRATCH_BYTES), folders, *drop, "--"]


_ISOLATIONS: dict[str, Callable[[], list[str]]] = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}
