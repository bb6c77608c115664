"""Merging a mask into a checkpoint, against copying the checkpoint's files; rate and peak memory.

    python benchmarks/merge.py --num_layers 8 --folder /tmp

Makes a bf16 checkpoint of Llama 8B's layer shapes in shards, and an adapter over four of its layers, in a temporary
folder. Both sides read files that are in the page cache, and flush what they write to the disk. "copy + hash" copies,
then hashes as many bytes as are masked, as the check of the base model has to, in one thread. Every merge is a process
of its own, whose imports are not timed; its peak is that of its resident memory.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import xxhash
from harness import about, turns, write_rows

_MERGE = """
import json, sys, time
from pathlib import Path
from maskft.adapters.merge import merge_checkpoint

def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))

before, started = peak_mb(), time.perf_counter()
merge_checkpoint(*sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak_mb(), "imports_mb": before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--max_shard_size", default="1GB")
    parser.add_argument("--folder", help="Where the temporary folder is made.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        maker = multiprocessing.get_context("spawn").Process(
            target=_make, args=(folder, given.num_layers, given.max_shard_size)
        )
        maker.start()
        maker.join()
        shards = [file.stat().st_size for file in (folder / "base").glob("*.safetensors")]
        measured: dict[str, float] = {}
        runs = {
            "copy": partial(_copy, folder),
            "copy + hash": partial(_copy_and_hash, folder),
            "merge": partial(_merge, folder, measured),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _, name in turns(list(runs), given.rounds):
            seconds[name].append(runs[name]())
    config = {"benchmark": "merge", "num_layers": given.num_layers, "max_shard_size": given.max_shard_size}
    rows = []
    for name, values in seconds.items():
        rates = [sum(shards) / value / 1e6 for value in values]
        shares = [copy / value for copy, value in zip(seconds["copy"], values, strict=True)]
        rows.append(
            {
                "name": name,
                "checkpoint_gb": round(sum(shards) / 1e9, 2),
                "largest_shard_mb": round(max(shards) / 1e6),
                "median_mb_per_s": round(statistics.median(rates)),
                "range_mb_per_s": [round(min(rates)), round(max(rates))],
                "share_of_copy": round(statistics.median(shares), 3),
                "share_range": [round(min(shares), 3), round(max(shares), 3)],
                "peak_mb": round(measured["peak_mb"]) if name == "merge" else "",
                "peak_mb_of_imports": round(measured["imports_mb"]) if name == "merge" else "",
                "rounds": given.rounds,
            }
        )
    write_rows([row | about(**config) for row in rows], given.output_file)


def _make(folder: Path, num_layers: int, max_shard_size: str) -> None:
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from maskft import MaskConfig

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size)
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    settings = MaskConfig(layers_to_transform=[0, 1, 2, 3], base_model_name_or_path=str(folder / "base"))
    masked = get_peft_model(model, settings)
    masked.save_pretrained(folder / "adapter")


def _copy(folder: Path) -> float:
    started = time.perf_counter()
    shutil.copytree(folder / "base", folder / "copy")
    for file in (folder / "copy").iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "copy")
    return seconds


def _copy_and_hash(folder: Path) -> float:
    seconds = _copy(folder)
    masked = 8 * (folder / "adapter" / "adapter_model.safetensors").stat().st_size * 2
    block = bytes(1 << 20)
    started = time.perf_counter()
    digest = xxhash.xxh3_128()
    for _ in range(masked >> 20):
        digest.update(block)
    return seconds + time.perf_counter() - started


def _merge(folder: Path, measured: dict[str, float]) -> float:
    command = [sys.executable, "-c", _MERGE, str(folder / "adapter"), str(folder / "merged")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(folder / "merged")
    measured |= {key: max(found[key], measured.get(key, 0)) for key in ("peak_mb", "imports_mb")}
    return float(found["seconds"])


if __name__ == "__main__":
    main()
