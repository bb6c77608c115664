"""Every row of docs/performance.md that needs a GPU, in one call of under ten minutes.

    python benchmarks/gpu_all.py --output_file gpu.jsonl

Each benchmark is a process of its own; one that fails or takes too long is named at the end, and the others go on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

_STEP = "step_time.py --model 8b-shaped --batch_size 1"
RUNS = [
    "selection.py --sizes 1e5 1e6 1e7 1e8 --rounds 5",
    f"{_STEP} --seq_len 512 --accumulation 16 --rivals partial maskft --rounds 5",
    f"{_STEP} --seq_len 512 --accumulation 16 --rivals maskft published --rounds 2",
    "step_time.py --model 8b-shaped --batch_size 8 --seq_len 2048 --accumulation 1 --rivals partial maskft --rounds 5",
    f"{_STEP} --seq_len 512 --accumulation 4 --rivals maskft lora --rounds 5",
    "memory.py --model 8b-shaped --seq_len 2048",
    "inference.py --model 8b-shaped --seq_len 512",
]
_SECONDS_EACH = 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_file", required=True, help="JSON lines to append to.")
    given = parser.parse_args()
    failed = []
    for run in RUNS:
        script, *arguments = run.split()
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        print(run, flush=True)
        try:
            subprocess.run([*command, "--output_file", given.output_file], check=True, timeout=_SECONDS_EACH)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{run}: {error}")
    print("\n".join(failed) or "all ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
