"""Train on two hosts, lose one, and see that the other says so and that a restart ends with the same mask.

    python benchmarks/two_hosts.py --output_file two_hosts.json

Two network namespaces of this machine stand in for the hosts, joined by a cable (a pair of virtual devices); each has
a name of its own and one worker of `torchrun --nnodes 2`. Their disk is one, as a cluster's is. It needs root, `ip` and
`unshare`. A host is lost by taking the cable out or by killing all that runs on it; either may be the one that keeps
the launcher's store.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import MASK, exit_on_sigterm, prepare
from harness import about

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 20


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces with a cable between them; both are gone afterwards."""
    names = [f"maskft{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], check=False)


def kill_all(name: str) -> None:
    """End all that runs in a namespace."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


class Host:
    """One host's part of a run."""

    def __init__(self, name: str, rank: int, command: list[str], output: Path, errors: Path) -> None:
        self.name, self.errors = name, errors
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29500"]
        flags = ["--output_dir", str(output), "--ddp_timeout", str(TIMEOUT), "--eval_strategy", "no"]
        flags += ["--load_best_model_at_end", "False", "--per_device_train_batch_size", "4"]
        # The command begins with the interpreter, whose place the launcher takes.
        words = [*launcher, *command[1:], *flags]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host-{'ab'[rank]}", *words]
        environment = {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, *named],
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End all that runs on it at once."""
        kill_all(self.name)

    def words(self) -> list[str]:
        """The lines in which maskft said why it ended."""
        return [line for line in self.errors.read_text(errors="replace").splitlines() if line.startswith("maskft")]


def start(hosts: list[str], command: list[str], output: Path) -> list[Host]:
    return [
        Host(name, rank, command, output, output.with_name(f"{output.name}.{rank}.err"))
        for rank, name in enumerate(hosts)
    ]


def wait_for(done: Any, seconds: float) -> float:
    """Seconds until `done()` is true."""
    begun = time.perf_counter()
    while not done():
        if time.perf_counter() - begun > seconds:
            raise TimeoutError(f"{done} is not true after {seconds} s")
        time.sleep(0.02)
    return round(time.perf_counter() - begun, 1)


def finish(hosts: list[str], command: list[str], output: Path) -> list[Host]:
    started = start(hosts, command, output)
    for host in started:
        if host.process.wait(timeout=300):
            raise RuntimeError(host.errors.read_text()[-3000:])
    return started


def lose(hosts: list[str], command: list[str], output: Path, lost: int, how: str) -> dict[str, Any]:
    """Lose a host once a checkpoint is there; what the other says and when; and whether a restart gets on."""
    begun = start(hosts, command, output)
    wait_for(lambda: (output / "checkpoint-6" / "trainer_state.json").exists(), 300)
    if how == "cable":
        ip("-n", hosts[lost], "link", "set", "cable", "down")
    else:
        begun[lost].kill()
    other = begun[1 - lost]
    seconds = wait_for(other.words, 4 * TIMEOUT)
    for host in begun:
        host.kill()
        host.process.wait()
    case = {"lost": f"host-{'ab'[lost]}", "how": how, "seconds_until_said": seconds, "words": other.words()[0][:400]}
    ip("-n", hosts[lost], "link", "set", "cable", "up")
    again = finish(hosts, command, output)
    return case | {"said_so": all("Resuming from" in host.errors.read_text() for host in again)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [f"{how}-{lost}" for how in ("cable", "killed") for lost in "ba"]
    parser.add_argument(
        "--cases", nargs="+", choices=cases, default=cases, help="How which host is lost. Default: all."
    )
    parser.add_argument("--output_file", help="Written anew after each case.")
    given = parser.parse_args()
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        sys.exit("Network namespaces need root, and the commands ip (iproute2) and unshare (util-linux).")
    rows: list[dict[str, Any]] = []
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
        folder = Path(name)
        command = prepare(folder, num_processes=1)
        finish(hosts, command, folder / "straight")
        wanted = (folder / "straight" / MASK).read_bytes()
        for case in given.cases:
            how, _, lost = case.partition("-")
            output = folder / case
            row = lose(hosts, command, output, "ab".index(lost), how)
            rows.append(row | {"same_mask": (output / MASK).read_bytes() == wanted})
            print(rows[-1], flush=True)
            survived = sum(row["same_mask"] and row["said_so"] for row in rows)
            if given.output_file:
                result = {"ddp_timeout": TIMEOUT, "survived": survived, "losses": rows} | about()
                Path(given.output_file).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{survived} of {len(rows)} losses of a host survived")


if __name__ == "__main__":
    main()
