import pytest
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.errors import MaskftError
from maskft_lab.reasoning.sums import build_task, score_answer


def questions(task: DatasetDict) -> list[str]:
    return [row["entry"]["question"] for split in task.values() for row in split]


@settings(max_examples=15, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 1000))
def test_splits_have_their_sizes_and_share_no_question(sizes: tuple[int, int, int], seed: int) -> None:
    task = build_task(*sizes, seed)
    assert tuple(len(task[name]) for name in ("train", "validation", "test")) == sizes
    assert len(set(questions(task))) == sum(sizes)


def test_the_seed_decides_the_questions_and_a_larger_training_split_leaves_the_rest_alone() -> None:
    first, again, larger, other = (build_task(n, 10, 10, seed) for n, seed in ((20, 3), (20, 3), (50, 3), (20, 4)))
    assert first["train"].to_list() == again["train"].to_list() == larger["train"].to_list()[:20]
    assert first["test"].to_list() == again["test"].to_list() == larger["test"].to_list()
    assert first["validation"].to_list() == larger["validation"].to_list()
    assert len(set(questions(first)) & set(questions(other))) < 5


def test_rows_are_conversational_and_their_answers_score() -> None:
    for row in build_task(30, 1, 1, 0, num_terms=(2, 3), num_digits=(1, 3))["train"]:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["prompt"][1]["content"] == row["entry"]["question"]
        (answer,) = row["completion"]
        assert answer["role"] == "assistant"
        terms = row["entry"]["metadata"]["expression"].split()
        value = int(terms[0])
        for sign, term in zip(terms[1::2], terms[2::2], strict=True):
            value += int(term) if sign == "+" else -int(term)
        assert int(answer["content"]) == value
        assert score_answer(row["entry"], answer["content"])


@pytest.mark.parametrize("wrong", ["", "17 ", "The answer is {}", "{}0", "-{}1", "{} = {}"])
def test_only_the_exact_value_scores(wrong: str) -> None:
    entry = build_task(1, 1, 1, 0)["train"][0]["entry"]
    right = entry["answer"]
    assert int(right) != 17
    assert not score_answer(entry, wrong.replace("{}", right))
    assert score_answer(entry, f" {right}.0\n")


def test_too_few_questions_are_told() -> None:
    with pytest.raises(MaskftError, match="needs 302 different questions but only 200 were found"):
        build_task(300, 1, 1, 0, num_digits=(1, 1))
