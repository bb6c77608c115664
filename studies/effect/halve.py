"""The first rows of each split of a domain, for the larger model: 150 to train, 80 to validate, 150 to test.

    python studies/effect/halve.py data/constraints --output_dir data/constraints-half

Conversations become plain prompts in the form of the code rows, since the pretrained Gemma has no chat template.
"""

import argparse
import json
from pathlib import Path
from typing import Any

SIZES = {"train": 150, "validation": 80, "test": 150}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        lines = (given.folder / f"{split}.jsonl").read_text().splitlines()[:size]
        rows = [plain(json.loads(line)) for line in lines]
        (given.output_dir / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain(row: dict[str, Any]) -> dict[str, str]:
    """Prompt and completion as text."""
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": row["completion"]}
    (question,), (answer,) = row["prompt"], row["completion"]
    return {"prompt": f"Instruction: {question['content']}\nOutput:", "completion": f" {answer['content']}"}


if __name__ == "__main__":
    main()
