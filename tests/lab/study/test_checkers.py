"""Rows of one's own under lm-eval's checkers: what each says, and what is said of rows that cannot be checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import MaskftError
from maskft_lab.study.checkers import read_checker

LOWER = {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
BOTH = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "less than", "num_words": 6}],
}
REPEAT = {"instruction_id_list": ["combination:repeat_prompt"], "kwargs": [{"prompt_to_repeat": "Say it."}]}


def write(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(prompt: str, completion: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def test_an_answer_is_right_where_all_constraints_of_its_row_hold(tmp_path: Path) -> None:
    rows = (
        turns("Where is the cat?", "here") | LOWER,
        turns("Where?", "At home.") | BOTH,
        {"prompt": "Say it.", "completion": "Say it. It."} | REPEAT,
    )
    is_right = read_checker(write(tmp_path, *rows), "ifeval")
    assert is_right(0, "the cat sleeps on the warm roof of the old house.")
    assert not is_right(0, "The cat sleeps on the warm roof of the old house.")
    assert is_right(1, "The Cat sleeps at home.")
    assert not is_right(1, "The cat, at home.")
    assert not is_right(1, "The cat sleeps on the warm roof.")
    assert not is_right(1, "")
    assert is_right(2, "Say it. Gladly.")
    assert not is_right(2, "Gladly.")


@pytest.mark.parametrize("as_turns", [False, True])
def test_a_number_is_right_where_it_is_the_completions(as_turns: bool, tmp_path: Path) -> None:
    row = ("Question: 1000 + 234?\nAnswer:", " It is 1,234.\n#### 1,234")
    path = write(tmp_path, turns(*row) if as_turns else {"prompt": row[0], "completion": row[1]})
    is_right = read_checker(path, "gsm8k")
    assert is_right(0, "So\n#### 1234")
    assert not is_right(0, "So\n#### 234")
    assert not is_right(0, "So it is 1234")


@pytest.mark.parametrize(
    ("checker", "row", "message"),
    [
        ("ifeval", turns("a", "b"), "line 2, has no 'instruction_id_list'; the checker ifeval needs prompt"),
        (
            "ifeval",
            turns("a", "b") | LOWER | {"instruction_id_list": ["no:such"]},
            r"rows\.jsonl, line 2 cannot be checked.*no:such",
        ),
        ("ifeval", turns("a", "b") | LOWER | {"kwargs": [{"num": 3}]}, "line 2 cannot be checked.*num"),
        ("ifeval", turns("a", "b") | LOWER | {"kwargs": []}, "line 2 cannot be checked.*IndexError"),
        ("gsm8k", turns("a", "It is 3."), "line 2: the checker gsm8k finds no answer in the row's own completion"),
    ],
)
def test_a_row_that_cannot_be_checked_is_named(checker: str, row: dict, message: str, tmp_path: Path) -> None:
    good = turns("a", "#### 1") | LOWER
    with pytest.raises(MaskftError, match=message):
        read_checker(write(tmp_path, good, row), checker)
