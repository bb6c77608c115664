import gzip
import json
from pathlib import Path

import pytest

GSM8K = [
    {"question": f"A farmer has {a} cows and buys {b} more. How many cows?", "answer": f"{a} + {b}\n#### {a + b}"}
    for a, b in [(1, 2), (3, 4), (10, 20), (7, 1), (5, 5), (1000, 234), (2, 9), (8, 8)]
]
IFEVAL = [
    {
        "key": 1,
        "prompt": "Write two sentences without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
        "kwargs": [{}, {"relation": "at least", "num_sentences": 2}],
    },
    {
        "key": 2,
        "prompt": "Shout.",
        "instruction_id_list": ["change_case:english_capital"],
        "kwargs": [{}],
    },
]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Local task data as `--data_dir` reads them."""
    folder = tmp_path / "data"
    write(folder / "gsm8k" / "test.jsonl", GSM8K)
    write(folder / "gsm8k" / "train.jsonl", GSM8K[::-1])
    write(folder / "ifeval" / "input_data.jsonl", IFEVAL)
    math = [{"problem": "What is 1+1?", "solution": "It is $\\boxed{2}$.", "level": "1", "type": "Algebra"}]
    for number, subject in enumerate(
        [
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ]
    ):
        write(folder / "math" / subject / "test.jsonl", math * (1 if number else 2))
    mbpp = {"text": "Add.", "code": "def f(a, b):\n    return a + b", "test_list": ["assert f(1, 2) == 3"] * 3}
    write(folder / "mbpp" / "mbpp.jsonl.gz", [mbpp | {"task_id": i} for i in (2, 11, 510, 511)])
    return folder
