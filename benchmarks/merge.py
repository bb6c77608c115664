"""Merging a mask into a checkpoint, against copying the checkpoint's files; rate and peak memory.

    python benchmarks/merge.py --num_layers 8 --folder /tmp

Makes a bf16 checkpoint of Llama 8B's layer shapes in shards, and an adapter over four of its layers, in a temporary
folder. Both sides read files that are in the page cache, and flush what they write to the disk.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import about, write_rows
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig

_MERGE = "import sys; from maskft.checkpoints.merge import merge_checkpoint; merge_checkpoint(*sys.argv[1:])"
_NOTHING = "import maskft.checkpoints.merge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--max_shard_size", default="1GB")
    parser.add_argument("--folder", help="Where the temporary folder is made.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        base, adapter = _make(Path(temporary), given.num_layers, given.max_shard_size)
        shards = [file.stat().st_size for file in base.glob("*.safetensors")]
        started, imports_mb = _run(_NOTHING)
        seconds: dict[str, list[float]] = {"copy": [], "merge": []}
        peak_mb = 0.0
        for _ in range(given.rounds):
            seconds["copy"].append(_copy(base, Path(temporary) / "copy"))
            taken, peak_mb = _run(_MERGE, str(adapter), str(Path(temporary) / "merged"))
            seconds["merge"].append(taken - started)
            shutil.rmtree(Path(temporary) / "merged")
    config = {"benchmark": "merge", "num_layers": given.num_layers, "max_shard_size": given.max_shard_size}
    rows = []
    for name, values in seconds.items():
        rates = [sum(shards) / value / 1e6 for value in values]
        rows.append(
            {
                "name": name,
                "checkpoint_gb": round(sum(shards) / 1e9, 2),
                "largest_shard_mb": round(max(shards) / 1e6),
                "median_mb_per_s": round(statistics.median(rates)),
                "range_mb_per_s": [round(min(rates)), round(max(rates))],
                "share_of_copy": round(statistics.median(seconds["copy"]) / statistics.median(values), 3),
                "peak_mb": round(peak_mb) if name == "merge" else "",
                "peak_mb_of_imports": round(imports_mb) if name == "merge" else "",
                "rounds": given.rounds,
            }
        )
    write_rows([row | about(**config) for row in rows], given.output_file)


def _make(folder: Path, num_layers: int, max_shard_size: str) -> tuple[Path, Path]:
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
    return folder / "base", folder / "adapter"


def _copy(base: Path, target: Path) -> float:
    started = time.perf_counter()
    shutil.copytree(base, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _run(code: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of a process of its own; mapped files count as far as they are resident."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the process ended with status {process.returncode}")
    assert isinstance(usage, resource.struct_rusage)
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
