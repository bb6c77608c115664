"""Kill each command at drawn moments, press Ctrl-C, fill its disk, and see that the next start ends as if nothing was.

    python benchmarks/faults_by_command.py --num_kills 20 --num_stops 20 --num_disks 10 --output_file faults.json

Tiny models. Each command runs to its end once. Then it is started again and again, and ended by SIGKILL, or by SIGINT,
at a drawn moment; or it runs on a small disk of a drawn size, which is enlarged once it is full. Each time the same
command follows (sft, train and restore have --resume_from_checkpoint auto), and has to end with the files of the run
that nobody disturbed, with nothing half-written beside them. SIGINT has to end a command with status 130 and one
sentence, a full disk with status 2 and one sentence. Processes are copies of one that has imported everything, so that
moments fall into the work; `--num_starts` presses Ctrl-C on processes of their own, while they import. The disks need
root, for a tmpfs of their own.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from faults import exit_on_sigterm, kill_tree, prepare
from harness import about

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("maskft.training.crossfit", "maskft.adapters.merge", "maskft.adapters.compress", "maskft.storage.lock"),
        *("maskft_lab.study.run", "maskft_lab.landscape.run", "maskft_lab.search", "transformers.models.llama"),
        *("maskft.evaluation.runner", "maskft.evaluation.language_model"),
    ]
)
TASK = """
{task: sums, dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}, test_split: test,
 output_type: generate_until, doc_to_text: "{{prompt}}", doc_to_target: "{{completion}}",
 generation_kwargs: {until: [], max_gen_toks: 4},
 metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]}
"""
RESUMED = ("sft", "train", "restore")
# What is compared of a result; other files hold seconds.
FILES = ("*.safetensors", "samples.jsonl", "results.json", "landscape.png", "config.yaml", "points/*.json")


def commands(folder: Path) -> dict[str, dict[str, Any]]:
    """The flags of each command, on files that are made in `folder`."""
    prepare(folder, 1)
    model, rows = folder / "model", folder / "sums.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:24]))
    (folder / "test.jsonl").write_text("".join(lines[150:]))
    (folder / "train.jsonl").write_text("".join(lines[:150]))
    draw = random.Random(1)
    texts = ["".join(draw.choices("0123456789+=", k=6)) for _ in range(24)]
    answered = [{"prompt": text[:3], "completion": text[3:]} for text in texts[:12]]
    (folder / "general.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*answered, *({"prompt": text} for text in texts[12:])])
    )
    (folder / "sums.yaml").write_text(TASK.replace("FILE", str(folder / "few.jsonl")))
    every = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    run = {"dataset_name": rows, "per_device_train_batch_size": 16, "learning_rate": "1e-2", "disable_tqdm": True}
    run |= {"num_train_epochs": 1, "validation_split_percentage": 20}
    study = {
        "name": "tiny",
        "seeds": [1],
        "models": {"tiny": str(model)},
        "domains": {
            "sums": {
                "dataset_name": str(folder / "train.jsonl"),
                "test_dataset_name": str(folder / "test.jsonl"),
                "validation_split_percentage": 20,
            }
        },
        "defaults": {"per_device_train_batch_size": 16, "num_train_epochs": 1, "eval_steps": 3, "learning_rate": 0.01},
        "methods": {"fft": None, "mft": None},
    }
    (folder / "study.json").write_text(json.dumps(study))  # which is YAML too
    tuned, adapter = folder / "tuned", folder / "adapter"
    return {
        "sft": {"model_name_or_path": model} | run | every,
        "train": {"model_name_or_path": tuned} | run | every,
        "crossfit": {"model_name_or_path": model, "num_folds": 2} | run,
        "restore": {
            "model_name_or_path": tuned,
            "reference_model_name_or_path": model,
            "dataset_name": rows,
            "retain_dataset_name": folder / "general.jsonl",
            "retain_max_new_tokens": 8,
            "max_task_loss": 5,
            "max_steps": 8,
            "eval_steps": 2,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
        },
        "eval": {"models": f"{model},{tuned}", "tasks": f"nll:{folder / 'test.jsonl'},{folder / 'sums.yaml'}"}
        | {"batch_size": 4},
        "merge": {"adapter_name_or_path": adapter, "model_name_or_path": tuned},
        "compress": {"adapter_name_or_path": adapter},
        "search": {"model_name_or_path": tuned, "dataset_name": rows, "layers_per_group": 2, "num_gradient_rows": 32},
        "landscape": {"model_name_or_path": tuned, "dataset_name": rows, "limit": 16, "num_points_1d": 5}
        | {"num_points_2d": 9, "num_iterations": 5},
        "study": {"config": folder / "study.json"},
    }


def arguments(name: str, flags: dict[str, Any], output: Path) -> list[str]:
    given = flags | {"output_dir": output} | ({"resume_from_checkpoint": "auto"} if name in RESUMED else {})
    return [name, *(str(part) for flag, value in given.items() for part in (f"--{flag}", value))]


def work(given: list[str], errors: Path) -> None:
    """Be the process of a command."""
    from maskft.__main__ import run

    os.setsid()
    sys.argv = ["maskft", *given]
    for number, path in ((1, Path(os.devnull)), (2, errors)):
        os.dup2(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    status = run()
    sys.stderr.flush()
    os._exit(status)  # what a child of a server runs at its end is not a command's


class Command:
    """A command at work, a copy of the server or, with `is_new`, a process of its own."""

    def __init__(self, given: list[str], errors: Path, *, is_new: bool = False) -> None:
        self.errors = errors
        errors.unlink(missing_ok=True)
        self.process: Any
        if is_new:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "maskft", *given],
                stdout=subprocess.DEVNULL,
                stderr=errors.open("w"),
                start_new_session=True,
            )
        else:
            self.process = SERVER.Process(target=work, args=(given, errors))
            self.process.start()
            while not errors.exists() and self.process.is_alive():  # it has not begun
                time.sleep(0.001)
        self.pid = self.process.pid

    def status(self, timeout: float | None = None) -> int | None:
        """The exit status, or None if it still runs after so many seconds."""
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
        self.process.join(timeout)
        return self.process.exitcode

    def words(self) -> list[str]:
        return [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]


def result(name: str, output: Path) -> dict[str, str]:
    """Hashes of what the result is, by the names of files."""
    found = {
        str(path.relative_to(output)): path.read_bytes().replace(str(output).encode(), b"OUTPUT")
        for pattern in FILES
        for path in output.rglob(pattern)
        if "checkpoint-" not in str(path)
    }
    for path in output.rglob("result.json"):  # of a study's runs
        found[str(path.relative_to(output))] = json.dumps(json.loads(path.read_text())["test"]).encode()
    return {key: hashlib.sha256(value).hexdigest() for key, value in sorted(found.items())}


def half_written(output: Path) -> list[str]:
    """What is left of writing that did not come to its end."""
    beside = [path for path in output.parent.glob(f".{output.name}.*")]
    return [path.name for path in (*beside, *output.rglob(".*.partial"))]


def again(name: str, given: list[str], output: Path, wanted: dict[str, str], errors: Path) -> dict[str, Any]:
    """Start the command again; whether it ends as the undisturbed run did."""
    if result(name, output) != wanted or name in (*RESUMED, "crossfit", "eval", "study"):
        command = Command(given, errors)
        status = command.status()
        if status:
            failed = [json.loads(path.read_text())["error"] for path in output.rglob("failed.json")]  # a study's runs
            return {"same": False, "status_again": status, "words_again": command.words()[-3:], "failed": failed}
    return {"same": result(name, output) == wanted, "left": half_written(output)}


def stopped(command: Command, output: Path, *, status: int = 130) -> dict[str, Any]:
    """What a command said that was told to stop; it may have been done already."""
    ended, words = command.status(), command.words()
    last = words[-1] if words else ""
    sentence = "stopped by Ctrl-C" if status == 130 else "error: "
    is_clean = ended == 0 or (ended == status and sentence in last and not any("Traceback" in word for word in words))
    told = {"status": ended, "clean": is_clean, "words": last[-200:].replace(str(output.parent), ".")}
    return told | ({} if is_clean else {"said": words[-12:]}) | {"left_at_stop": half_written(output)}


def small_disk(mount: Path, num_bytes: int) -> None:
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(mount)], check=True)


def disturb(name: str, flags: dict[str, Any], folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All faults of one command."""
    draw = random.Random(f"{given.seed} {name}")
    errors = folder / "errors.txt"
    straight = folder / f"straight-{name}"
    begun = time.perf_counter()
    command = Command(arguments(name, flags, straight), errors)
    assert command.status() == 0, command.words()[-12:]
    seconds = time.perf_counter() - begun
    used = sum(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    rows: dict[str, list[dict[str, Any]]] = {"kills": [], "stops": [], "starts": [], "disks": []}
    output = folder / f"run-{name}"
    words = arguments(name, flags, output)
    wanted = result(name, straight)
    for kind, count in (("kills", given.num_kills), ("stops", given.num_stops), ("starts", given.num_starts)):
        for _ in range(count):
            moment = draw.uniform(0.15, 8) if kind == "starts" else draw.uniform(0, seconds)
            command = Command(words, errors, is_new=kind == "starts")
            if command.status(moment) is None:
                kill_tree(command.pid) if kind == "kills" else os.kill(command.pid, signal.SIGINT)
            told = {} if kind == "kills" else stopped(command, output)
            command.status()
            row = {"moment_s": round(moment, 2)} | told | again(name, words, output, wanted, errors)
            rows[kind].append(row)
            print(name, kind, row, flush=True)
            shutil.rmtree(output, ignore_errors=True)
    mount = folder / "disk"
    for _ in range(given.num_disks if os.geteuid() == 0 else 0):
        size = int(draw.uniform(0, 1.5) * used) // 4096 * 4096 + 4096
        small_disk(mount, size)
        words = arguments(name, flags, mount / "run")
        command = Command(words, errors)
        told = stopped(command, mount / "run", status=2)
        subprocess.run(["mount", "-o", "remount,size=400m", str(mount)], check=True)
        row = {"size": size} | told | again(name, words, mount / "run", wanted, errors)
        rows["disks"].append(row)
        print(name, "disks", row, flush=True)
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
    counts = {
        kind: {"n": len(of), "same": sum(row["same"] and not row["left"] for row in of)}
        | ({"clean": sum(row["clean"] and not row["left_at_stop"] for row in of)} if kind != "kills" else {})
        for kind, of in rows.items()
    }
    return {"seconds_of_a_run": round(seconds, 1), "counts": counts} | rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", help="Default: all.")
    for kind, count in {"kills": 20, "stops": 20, "starts": 0, "disks": 10}.items():
        parser.add_argument(f"--num_{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", help="Written anew after each command; what it holds of others stays.")
    given = parser.parse_args()
    exit_on_sigterm()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = commands(folder)
        # What later commands start from.
        made = {"tuned": ("sft", {}), "adapter": ("train", {})}
        for output, (command, changes) in made.items():
            process = Command(arguments(command, flags[command] | changes, folder / output), folder / "errors.txt")
            assert process.status() == 0, process.words()[-12:]
        for command in given.commands or list(flags):
            found = disturb(command, flags[command], folder, given) | about(seed=given.seed)
            print(command, found["counts"], flush=True)
            if given.output_file:
                path = Path(given.output_file)
                held = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(held | {command: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
