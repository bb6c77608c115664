"""Rows of one of reasoning-gym's tasks, with the settings that it has by default, for the effect study.

    python studies/effect/make_reasoning.py family_relationships --output_dir data/family_relationships

The test rows are the problems of `maskft eval --tasks reasoning_gym:TASK --limit NUM_TEST --apply_chat_template`, so
that losses and right answers are of the same problems; no question stands in two splits.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym

# Item i is drawn from the seed `SEED * 10**6 + i`; 0 is what `maskft eval` takes.
SEEDS = {"test": 0, "validation": 1, "train": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="Name of a task of reasoning-gym whose answers are texts.")
    parser.add_argument("--num_train", type=int, default=800)
    parser.add_argument("--num_validation", type=int, default=300)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    asked: set[str] = set()
    for split, seed in SEEDS.items():
        size = getattr(given, f"num_{split}")
        rows = []
        for entry in reasoning_gym.create_dataset(given.task, seed=seed * 10**6, size=20 * size):
            if entry["question"] not in asked:
                asked.add(entry["question"])
                question = {"role": "user", "content": entry["question"]}
                answer = {"role": "assistant", "content": entry["answer"]}
                rows.append({"prompt": [question], "completion": [answer]})
            if len(rows) == size:
                break
        else:
            raise SystemExit(f"{given.task} makes only {len(rows)} different problems for {split}, of {size}.")
        (given.output_dir / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
