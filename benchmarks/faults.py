"""Kill `maskft train` at random moments, fill its disk, make it read-only, and see that nothing is lost.

    python benchmarks/faults.py --num_kills 50 --output_file faults.json
    python benchmarks/faults.py --num_kills 10 --num_disks 0 --num_processes 2

A tiny model is trained to its end once. Then the same command is killed by SIGKILL at a random moment (every second
time while a checkpoint is being written) and started again; and it is run on a disk that becomes full, or read-only, in
each phase of it in turn (before anything is written, in training, while a checkpoint is written, while the result is),
and started again once that is mended. Each time the final mask has to be that of the run that nobody disturbed. The
disks need root, for a small tmpfs of their own.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from harness import about
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MASK = "adapter_model.safetensors"
FAULTS = ("full", "read-only")
PHASES = ("start", "training", "checkpoint", "result")


def prepare(folder: Path, num_processes: int) -> list[str]:
    """A tiny model, sums to train on, and the command that does it."""
    letters = ["<pad>", "</s>", *"0123456789+="]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "model"
    )
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(200)]
    rows = [json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in pairs]
    (folder / "sums.jsonl").write_text("".join(rows))
    flags = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "sums.jsonl",
        "learning_rate": "1e-2",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "resume_from_checkpoint": "auto",
    }
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return [*launcher, "-m", "maskft", "train", *(str(v) for k, f in flags.items() for v in (f"--{k}", f))]


@contextlib.contextmanager
def running(command: list[str], output: Path) -> Iterator[subprocess.Popen[str]]:
    """A run, of which nothing is left afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--output_dir", str(output)],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started; torchrun's workers are in groups of their own."""
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:  # it had ended
        return
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes, timeout=10)


def finish(command: list[str], output: Path) -> tuple[bool, str]:
    """Start again; whether it said where it goes on, and the last words of a start that failed."""
    with running(command, output) as process:
        _, words = process.communicate()
    return "Resuming from" in words, "" if process.returncode == 0 else words[-500:]


def kill_once(
    command: list[str], output: Path, seconds: float, draw: random.Random, while_saving: bool
) -> dict[str, Any]:
    """Kill the run at a random moment; while saving means as soon as an unfinished checkpoint is seen."""
    moment = draw.uniform(0.3, 1) * seconds
    begun = time.perf_counter()
    skipped = draw.randrange(6)
    seen: set[str] = set()
    with running(command, output) as process:
        while process.poll() is None and time.perf_counter() - begun < 3 * seconds:
            if while_saving:
                unfinished = [p for p in output.glob("checkpoint-*") if not _is_complete(p)]
                seen |= {p.name for p in unfinished}
                if unfinished and len(seen) > skipped:
                    time.sleep(draw.uniform(0, 0.02))
                    break
            elif time.perf_counter() - begun > moment:
                break
            time.sleep(0.0005)
    folders = sorted(output.glob("checkpoint-*"))
    complete = [p for p in folders if _is_complete(p)]
    return {"while_saving": while_saving, "checkpoints": len(complete), "unfinished": len(folders) - len(complete)}


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "trainer_state.json").exists()


def exit_on_sigterm() -> None:
    """End as Ctrl-C does, so that what was mounted or started is taken away."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=50)
    parser.add_argument("--num_disks", type=int, default=12)
    parser.add_argument("--num_processes", type=int, default=1, help="Started by torchrun where more than 1.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", help="Written anew after each case.")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = prepare(folder, given.num_processes)
        started = time.perf_counter()
        _, error = finish(command, folder / "straight")
        assert not error, error
        seconds = time.perf_counter() - started
        wanted = (folder / "straight" / MASK).read_bytes()
        last = max(int(path.name.rpartition("-")[2]) for path in (folder / "straight").glob("checkpoint-*"))

        kills: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        config = about(num_processes=given.num_processes, seed=given.seed, seconds_of_a_run=round(seconds, 1))

        def compare(rows: list[dict[str, Any]], case: dict[str, Any], output: Path) -> None:
            resumed, error = finish(command, output)
            same = not error and (output / MASK).read_bytes() == wanted
            shutil.rmtree(output, ignore_errors=True)
            row = case | {"said_so": resumed, "same_mask": same} | ({"error": error} if error else {})
            print(row, flush=True)
            rows.append(row)
            if given.output_file:
                found = {"survived": sum(r["same_mask"] for r in (*kills, *others)), "kills": kills, "others": others}
                Path(given.output_file).write_text(json.dumps(found | config, indent=1) + "\n")

        for i in range(given.num_kills):
            output = folder / f"kill{i}"
            compare(kills, kill_once(command, output, seconds, draw, i % 2 == 1), output)
        for i in range(given.num_disks if os.geteuid() == 0 else 0):
            fault, phase = FAULTS[i % 2], PHASES[i // 2 % 4]
            compare(others, *broken_disk(command, folder / f"disk{i}", fault, phase, last, draw))
        compare(others, *no_folder(command, folder / "file"))
    survived, mended = (sum(row["same_mask"] for row in rows) for rows in (kills, others))
    print(f"{survived} of {len(kills)} kills survived, and {mended} of {len(others)} other faults")


@contextlib.contextmanager
def small_disk(mount: Path) -> Iterator[None]:
    """A disk of its own at `mount`, gone afterwards."""
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def broken_disk(
    command: list[str], mount: Path, fault: str, phase: str, last: int, draw: random.Random
) -> tuple[dict[str, Any], Path]:
    """A run whose disk becomes full or read-only in a phase of it; then the disk is mended.

    `last` is the number of a run's last checkpoint, after which the result is written.
    """
    output, ballast, kept = mount / "run", mount / "ballast", mount.with_suffix(".kept")
    step = last if phase == "result" else 2 * draw.randrange(1, last // 2)
    with small_disk(mount), contextlib.ExitStack() as stack:
        if phase != "start":
            process = stack.enter_context(running(command, output))
            while process.poll() is None and not _is_reached(output / f"checkpoint-{step}", phase):
                time.sleep(0.0005)
        num_left = draw.randrange(40)
        if fault == "full":
            _fill(ballast, num_left)
        else:
            # Refused while a file is open for writing.
            while _remount(mount, "ro").returncode and process.poll() is None:
                time.sleep(0.0005)
        if phase == "start":
            process = stack.enter_context(running(command, output))
        while fault == "full" and process.poll() is None:
            _fill(ballast, num_left)  # older checkpoints are removed, which would mend it
            time.sleep(0.001)
        _, words = process.communicate()
        subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
        ballast.unlink(missing_ok=True)
        if output.exists():
            shutil.copytree(output, kept)
    case = {"fault": f"{fault} disk", "phase": phase, "at_step": step if phase != "start" else 0}
    return case | _ending(process.returncode, words), kept


def _is_reached(checkpoint: Path, phase: str) -> bool:
    """Whether a checkpoint is begun, and ended where it is not the phase itself."""
    return checkpoint.exists() and (phase == "checkpoint" or _is_complete(checkpoint))


def _fill(ballast: Path, num_blocks_left: int) -> None:
    """Take what is free on a disk but for some blocks."""
    with ballast.open("ab") as file:
        room = os.statvfs(ballast)
        size = (room.f_bavail - num_blocks_left) * room.f_bsize
        if size > 0:
            with contextlib.suppress(OSError):  # the run has written in between
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)


def _remount(mount: Path, how: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", "-o", f"remount,{how}", str(mount)], check=False, capture_output=True)


def no_folder(command: list[str], path: Path) -> tuple[dict[str, Any], Path]:
    """A file where the output folder should be; then it is gone."""
    path.write_text("")
    with running(command, path) as process:
        _, words = process.communicate()
    path.unlink()
    return {"fault": "a file in its place"} | _ending(process.returncode, words), path


def _ending(status: int, words: str) -> dict[str, Any]:
    """The exit status, and what a run that failed said last."""
    return {"status": status, "words": words.strip().splitlines()[-1][:200] if status else ""}


if __name__ == "__main__":
    main()
