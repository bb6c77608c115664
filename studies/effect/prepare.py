"""Rows of the effect study: short problems of GSM8K and of CodeAlpaca, as JSON lines of prompt and completion.

    python studies/effect/prepare.py --gsm8k_dir GSM8K --codealpaca_dir CODEALPACA --output_dir data

GSM8K (openai/grade-school-math): `train.jsonl` and `test.jsonl`; the calculator's marks are taken out, training and
validation rows come out of `train.jsonl`, and test rows out of `test.jsonl`, and where these are too few, out of what
is left of `train.jsonl`. CodeAlpaca (sahil280114/codealpaca): training and validation rows out of
`new_codealpaca.json`, test rows out of `code_alpaca_2k.json`, which is cleared of every instruction of the first. Only
rows of at most `--max_chars` characters are taken, so that a study on a CPU ends.
"""

import argparse
import json
import random
import re
from pathlib import Path

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k_dir", type=Path, required=True)
    parser.add_argument("--codealpaca_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_chars", type=int, default=340)
    parser.add_argument("--num_train", type=int, default=300)
    parser.add_argument("--num_validation", type=int, default=150)
    parser.add_argument("--num_test", type=int, default=300)
    given = parser.parse_args()
    sizes = (given.num_train, given.num_validation, given.num_test)
    maths = [[_problem(line) for line in _lines(given.gsm8k_dir / f"{name}.jsonl")] for name in ("train", "test")]
    code = [
        [_task(entry) for entry in json.loads((given.codealpaca_dir / name).read_text())]
        for name in ("new_codealpaca.json", "code_alpaca_2k.json")
    ]
    for name, (train, test) in {"maths": maths, "code": code}.items():
        _write(given.output_dir / name, train, test, given.max_chars, sizes)


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _problem(entry: dict[str, str]) -> Row:
    answer = re.sub(r"<<.*?>>", "", entry["answer"])
    return {"prompt": f"Question: {entry['question']}\nAnswer:", "completion": f" {answer}"}


def _task(entry: dict[str, str]) -> Row:
    given = f"\nInput: {entry['input']}" if entry["input"] else ""
    return {"prompt": f"Instruction: {entry['instruction']}{given}\nOutput:", "completion": f" {entry['output']}"}


def _write(folder: Path, train: list[Row], test: list[Row], max_chars: int, sizes: tuple[int, int, int]) -> None:
    draw = random.Random(0)
    seen = {row["prompt"] for row in train}
    train, test = (_short(rows, max_chars) for rows in (train, [row for row in test if row["prompt"] not in seen]))
    draw.shuffle(train)
    draw.shuffle(test)
    num_train, num_validation, num_test = sizes
    splits = {
        "train": train[:num_train],
        "validation": train[num_train : num_train + num_validation],
        "test": [*test, *train[num_train + num_validation :]][:num_test],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def _short(rows: list[Row], max_chars: int) -> list[Row]:
    """Rows short enough, each prompt once."""
    kept = {row["prompt"]: row for row in rows if len(row["prompt"]) + len(row["completion"]) <= max_chars}
    return list(kept.values())


if __name__ == "__main__":
    main()
