import hypothesis.strategies as st
import pytest
from datasets import Dataset
from example_rows import ASSISTANT, SYSTEM, TEXT, USER, make_tokenizer, write_lines
from hypothesis import given, settings

from maskft.data.rows import Reader, load_rows
from maskft.data.splits import split_validation
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1),
    percentage=st.integers(1, 99),
    seed=st.integers(0, 2**32),
)
def test_split_laws(prompts: list[int], percentage: int, seed: int) -> None:
    rows = Dataset.from_dict({"prompt": [str(p) for p in prompts], "completion": [str(i) for i in range(len(prompts))]})
    train, validation = split_validation(rows, validation_split_percentage=percentage, seed=seed)
    again = split_validation(rows, validation_split_percentage=percentage, seed=seed)
    assert (train.to_list(), validation.to_list()) == (again[0].to_list(), again[1].to_list())
    assert len(train) >= 1
    assert len(validation) >= 1
    assert not set(train["prompt"]) & set(validation["prompt"])
    ids = [int(i) for i in train["completion"]], [int(i) for i in validation["completion"]]
    assert sorted(ids[0] + ids[1]) == list(range(len(prompts)))
    assert ids[0] == sorted(ids[0])


def test_split_is_exact_for_unique_prompts_and_depends_on_the_seed() -> None:
    rows = Dataset.from_list([{"prompt": str(i), "completion": "x"} for i in range(200)])
    cuts = [split_validation(rows, validation_split_percentage=5, seed=seed)[1]["prompt"][:] for seed in (0, 1)]
    assert [len(cut) for cut in cuts] == [10, 10]
    assert cuts[0] != cuts[1]


@pytest.mark.parametrize("opening", [[], [SYSTEM]])
def test_turns_of_one_conversation_stay_together(tmp_path, opening) -> None:
    rows = []
    for i in range(20):
        first = {"role": "user", "content": f"question {i}"}
        rows.append({"messages": [*opening, first, ASSISTANT, USER, ASSISTANT]})
    reader = Reader(RowTokeniser(make_tokenizer()))  # whose template has no marks, so that each turn becomes a row
    loaded = load_rows(write_lines(tmp_path / "rows.jsonl", *rows), reader=reader)
    parts = split_validation(loaded, validation_split_percentage=20, seed=0)
    opened = [{prompt[len(opening)]["content"] for prompt in part["prompt"]} for part in parts]
    assert [len(part) for part in parts] == [32, 8]
    assert [len(part) for part in opened] == [16, 4]


def test_splits_that_cannot_be_made_are_refused() -> None:
    rows = Dataset.from_list([TEXT, TEXT, TEXT])
    with pytest.raises(MaskftError, match="need two prompts, and 3 here have one in all"):
        split_validation(rows, validation_split_percentage=10, seed=0)
