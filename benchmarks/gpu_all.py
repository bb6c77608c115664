"""Every row of studies/performance/README.md that needs a GPU: some three minutes on an H100.

    python benchmarks/gpu_all.py --output_file gpu.jsonl
    python benchmarks/gpu_all.py --smoke --output_file smoke.jsonl

Each benchmark is a process of its own; one that fails or takes too long is named at the end, and the others go on.
--smoke runs the same commands with tiny shapes, on whatever device there is.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

_SMALL = "--batch_size 1 --seq_len 512 --accumulation 16"
_LARGE = "--batch_size 8 --seq_len 2048 --accumulation 1"
RUNS = [
    "selection.py --sizes 1e5 1e6 1e7 1e8 --rounds 15",
    f"step_time.py --model 8b-shaped {_SMALL} --rivals partial maskft lora --rounds 15",
    f"step_time.py --model 8b-shaped {_LARGE} --rivals partial maskft lora --rounds 9",
    f"step_time.py --model 8b {_SMALL} --rivals partial maskft --rounds 7",
    f"step_time.py --model 8b-shaped {_SMALL} --rivals maskft published --rounds 2",
    "inference.py --model 8b --seq_len 512 --rounds 100",
    "inference.py --model 8b-shaped --seq_len 512 --rounds 100",
    "memory.py --model 8b-shaped --seq_len 2048 --optimizers adamw_torch_fused adafactor",
    "memory.py --model 8b --seq_len 2048 --activation_checkpointing --optimizers adafactor --modes low_memory",
    "memory.py --model 8b-shaped --seq_len 2048 --optimizers adamw_torch_8bit",
]
_SECONDS_EACH = 110
_TINY = [
    (r"8b(-shaped)?\b", "tiny-shaped"),
    (r"--seq_len \d+", "--seq_len 16"),
    (r"--accumulation \d+", "--accumulation 2"),
    (r"--batch_size \d+", "--batch_size 2"),
    (r"--rounds \d+", "--rounds 2"),
    (r"--sizes [\de ]+", "--sizes 1e3 1e4 "),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_file", required=True, help="JSON lines to append to.")
    parser.add_argument("--smoke", action="store_true", help="Tiny shapes, to see that everything runs.")
    given = parser.parse_args()
    seconds = None if given.smoke else _SECONDS_EACH
    failed = []
    for run in RUNS:
        for pattern, tiny in _TINY if given.smoke else []:
            run = re.sub(pattern, tiny, run)
        script, *arguments = run.split()
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        print(run, flush=True)
        try:
            subprocess.run([*command, "--output_file", given.output_file], check=True, timeout=seconds)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{run}: {error}")
    print("\n".join(failed) or "all ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
