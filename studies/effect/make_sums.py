"""The rows of `sums.yaml` to learn on and to choose on, with test problems that no run of it has scored.

    python studies/effect/make_sums.py --output_dir data/sums

Questions come from one stream, of which `sums.yaml` takes its test, validation and training rows in turn; the test rows
here are those that follow. Writes `train.jsonl`, `validation.jsonl` and `test.jsonl`.
"""

import argparse
from pathlib import Path

from maskft_lab.reasoning.sums import build_task

NUM_TRAIN, NUM_VALIDATION, NUM_SCORED, SEED = 600, 300, 1000, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_test", type=int, default=4000)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    task = build_task(NUM_TRAIN + given.num_test, NUM_VALIDATION, NUM_SCORED, SEED)
    splits = {
        "train": task["train"].select(range(NUM_TRAIN)),
        "validation": task["validation"],
        "test": task["train"].select(range(NUM_TRAIN, NUM_TRAIN + given.num_test)),
    }
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        rows.select_columns(["prompt", "completion"]).to_json(given.output_dir / f"{name}.jsonl")


if __name__ == "__main__":
    main()
