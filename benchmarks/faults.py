"""Kill `maskft train` at random moments, fill its disk, make it read-only, and see that nothing is lost.

    python benchmarks/faults.py --num_kills 50 --output_file faults.json
    python benchmarks/faults.py --num_kills 10 --num_disks 0 --num_processes 2

A tiny model is trained to its end once. Then the same command is killed by SIGKILL at a random moment (every second
time while a checkpoint is being written) and started again; and it is run on a disk that becomes full, or read-only, at
a random checkpoint, and started again once that is mended. Each time the final mask has to be that of the run that
nobody disturbed. The disks need root, for a small tmpfs of their own.
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
from pathlib import Path
from typing import Any

from harness import about
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MASK = "adapter_model.safetensors"


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


def start(command: list[str], output: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, "--output_dir", str(output)],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(command: list[str], output: Path) -> tuple[bool, str]:
    """Start again; whether it said where it goes on, and the last words of a start that failed."""
    process = start(command, output)
    _, words = process.communicate()
    return "Resuming from" in words, "" if process.returncode == 0 else words[-500:]


def kill_once(
    command: list[str], output: Path, seconds: float, draw: random.Random, while_saving: bool
) -> dict[str, Any]:
    """Kill the run at a random moment; while saving means as soon as an unfinished checkpoint is seen."""
    process = start(command, output)
    moment = draw.uniform(0.3, 1) * seconds
    begun = time.perf_counter()
    skipped = draw.randrange(6)
    seen: set[str] = set()
    while process.poll() is None and time.perf_counter() - begun < 3 * seconds:
        if while_saving:
            unfinished = [p for p in output.glob("checkpoint-*") if not (p / "trainer_state.json").exists()]
            seen |= {p.name for p in unfinished}
            if unfinished and len(seen) > skipped:
                time.sleep(draw.uniform(0, 0.02))
                break
        elif time.perf_counter() - begun > moment:
            break
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):  # it had ended
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    folders = sorted(output.glob("checkpoint-*")) if output.exists() else []
    complete = [p for p in folders if (p / "trainer_state.json").exists()]
    return {"while_saving": while_saving, "checkpoints": len(complete), "unfinished": len(folders) - len(complete)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=50)
    parser.add_argument("--num_disks", type=int, default=12)
    parser.add_argument("--num_processes", type=int, default=1, help="Started by torchrun where more than 1.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", help="Written anew after each case.")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = prepare(folder, given.num_processes)
        started = time.perf_counter()
        _, error = finish(command, folder / "straight")
        assert not error, error
        seconds = time.perf_counter() - started
        wanted = (folder / "straight" / MASK).read_bytes()

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
            fault = ("full", "read-only")[i % 2]
            compare(others, *broken_disk(command, folder / f"disk{i}", fault, draw))
        compare(others, *no_folder(command, folder / "file"))
    survived, mended = (sum(row["same_mask"] for row in rows) for rows in (kills, others))
    print(f"{survived} of {len(kills)} kills survived, and {mended} of {len(others)} other faults")


def broken_disk(command: list[str], mount: Path, fault: str, draw: random.Random) -> tuple[dict[str, Any], Path]:
    """A run whose disk becomes full or read-only once a random checkpoint is begun; then it is mended."""
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(mount)], check=True)
    output, ballast = mount / "run", mount / "ballast"
    num_before = draw.randrange(1, 24)
    process = start(command, output)
    seen: set[str] = set()
    while process.poll() is None and len(seen) < num_before:
        seen |= {path.name for path in output.glob("checkpoint-*")}
        time.sleep(0.0005)
    if fault == "full":
        with ballast.open("wb") as file:
            _fill(file.fileno(), mount, draw.randrange(40))
    else:
        # Refused while a file is open for writing.
        while process.poll() is None and _remount(mount, "ro").returncode:
            time.sleep(0.0005)
    _, words = process.communicate()
    subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
    ballast.unlink(missing_ok=True)
    kept = mount.with_suffix(".kept")
    if output.exists():
        shutil.copytree(output, kept)
    subprocess.run(["umount", str(mount)], check=True)
    case = {"fault": f"{fault} disk", "at_checkpoint": len(seen)}
    return case | _ending(process.returncode, words), kept


def _fill(file: int, mount: Path, num_blocks_left: int) -> None:
    while True:
        room = os.statvfs(mount)
        try:
            os.posix_fallocate(file, 0, max(1, (room.f_bavail - num_blocks_left) * room.f_bsize))
            return
        except OSError:  # the run has written in between
            num_blocks_left += 1


def _remount(mount: Path, how: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", "-o", f"remount,{how}", str(mount)], check=False, capture_output=True)


def no_folder(command: list[str], path: Path) -> tuple[dict[str, Any], Path]:
    """A file where the output folder should be; then it is gone."""
    path.write_text("")
    process = start(command, path)
    _, words = process.communicate()
    path.unlink()
    return {"fault": "a file in its place"} | _ending(process.returncode, words), path


def _ending(status: int, words: str) -> dict[str, Any]:
    """The exit status, and what a run that failed said last."""
    return {"status": status, "words": words.strip().splitlines()[-1][:200] if status else ""}


if __name__ == "__main__":
    main()
