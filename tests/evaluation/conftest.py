import gzip
import json
from pathlib import Path

import pytest

PAIRS = [(1, 2), (3, 4), (10, 20), (7, 1), (5, 5), (1000, 234), (2, 9), (8, 8)]
GSM8K = [
    {"question": f"A farmer has {a} cows and buys {b} more. How many cows?", "answer": f"{a} + {b}\n#### {a + b}"}
    for a, b in PAIRS
]
TWO = {"relation": "at least", "num_sentences": 2}
COMMAS = ["punctuation:no_comma", "length_constraints:number_sentences"]
IFEVAL = [
    {"key": 1, "prompt": "Two sentences.", "instruction_id_list": COMMAS, "kwargs": [{}, TWO]},
    {"key": 2, "prompt": "Shout.", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
]
LABELS = ["A", "B", "C", "D"]
SUBJECTS = "algebra,counting_and_probability,geometry,intermediate_algebra,number_theory,prealgebra,precalculus"
SUMS_TASK = """
{task: sums, dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}, test_split: test,
 output_type: generate_until, doc_to_text: "{{prompt}}", doc_to_target: "{{completion}}",
 generation_kwargs: {until: []}, metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]}
"""


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="session")
def sums_task(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of one's own, whose answers are generated."""
    path = tmp_path_factory.mktemp("task") / "sums.yaml"
    path.write_text(SUMS_TASK.replace("FILE", str(sums)))
    return str(path)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Local task data as `--data_dir` reads them."""
    folder = tmp_path / "data"
    write(folder / "gsm8k" / "test.jsonl", GSM8K)
    write(folder / "gsm8k" / "train.jsonl", GSM8K[::-1])
    write(folder / "ifeval" / "input_data.jsonl", IFEVAL)
    for split in ("train", "validation", "test", "dev"):
        asked = [(f"What is {a} and {b}?", [str(a + b + i) for i in range(4)]) for a, b in PAIRS]
        arc = [{"question": q, "choices": {"text": c, "label": LABELS}, "answerKey": "A", "id": q} for q, c in asked]
        write(folder / "ai2_arc" / "ARC-Easy" / f"{split}.jsonl", arc)
        mmlu = [{"question": q, "subject": "astronomy", "choices": c, "answer": 0} for q, c in asked]
        write(folder / "mmlu" / "astronomy" / f"{split}.jsonl", mmlu)
    math = [{"problem": "What is 1+1?", "solution": "It is $\\boxed{2}$.", "level": "1", "type": "Algebra"}]
    for number, subject in enumerate(SUBJECTS.split(",")):
        write(folder / "math" / subject / "test.jsonl", math * (1 if number else 2))
    mbpp = {"text": "Add.", "code": "def f(a, b):\n    return a + b", "test_list": ["assert f(1, 2) == 3"] * 3}
    write(folder / "mbpp" / "mbpp.jsonl.gz", [mbpp | {"task_id": i} for i in (2, 11, 510, 511)])
    return folder
