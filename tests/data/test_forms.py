"""What each form becomes, and what is said of a row that has none."""

import json

import hypothesis.strategies as st
import pytest
from example_rows import (
    AGAIN,
    ASSISTANT,
    CALL,
    CONVERSATION,
    EXPANDED,
    IS_TWO,
    MESSAGES,
    SYSTEM,
    TEXT,
    TOOL,
    TOOLS,
    USER,
    pair,
    write_lines,
)
from hypothesis import given, settings

from maskft.data.forms import ROLES, problem_of, read_row
from maskft.data.rows import load_rows
from maskft.errors import MaskftError

EMPTY, EMPTY_TOOL = SYSTEM | {"content": " "}, {"role": "tool", "content": ""}
FLAG = {"assistant_only_loss": True}
PARTS = [{"type": "text", "text": "one plus "}, {"type": "text", "text": "one"}]
GPT = [{"from": "system", "value": "add"}, {"from": "human", "value": "one plus one"}, {"from": "gpt", "value": "two"}]
CALLED = [
    GPT[1],
    {"from": "function_call", "value": '{"name": "add", "arguments": {"one": 1}}'},
    {"from": "observation", "value": "two"},
    GPT[2],
]
ALPACA = {"instruction": "add", "input": "one", "output": "two"}
REASONING = ASSISTANT | {"reasoning_content": "so"}
TURNS, CALLS = [USER, ASSISTANT, AGAIN, IS_TWO], [CALL, TOOL, ASSISTANT]
NAMELESS = [CALL, {"role": "tool", "content": "two"}, ASSISTANT]
LOUD = {"chat_template_kwargs": {"loud": True}}
ASKED = {"prompt": "question", "completion": "answer"}
CHOSEN = {"prompt": "prompt", "completion": "chosen"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT, TEXT),
        (CONVERSATION, CONVERSATION),
        (MESSAGES, EXPANDED),
        ({"text": "one plus one"}, {"prompt": "", "completion": "one plus one"}),
        # A conversation is one row; what follows its last answer is nothing to learn.
        ({"messages": [SYSTEM, *TURNS, USER]}, pair(SYSTEM, *TURNS, **FLAG)),
        (pair(*TURNS), pair(*TURNS, **FLAG)),
        ({"messages": [USER, ASSISTANT | {"tool_calls": None, "name": ""}]}, CONVERSATION | FLAG),
        ({"messages": [EMPTY, USER, ASSISTANT]}, pair(EMPTY, USER, ASSISTANT, **FLAG)),
        ({"messages": [EMPTY_TOOL, USER, ASSISTANT]}, pair(EMPTY_TOOL, USER, ASSISTANT, **FLAG)),
        ({"messages": [USER | {"content": PARTS}, ASSISTANT]}, CONVERSATION | FLAG),
        ({"messages": [USER, *CALLS], "tools": TOOLS}, pair(USER, *CALLS, tools=TOOLS, **FLAG)),
        ({"messages": [USER, CALL | {"content": ""}]}, pair(USER, CALL | {"content": ""}, **FLAG)),
        ({"messages": [USER, REASONING]}, pair(USER, REASONING, **FLAG)),
        ({"conversations": GPT}, EXPANDED),
        ({"conversations": CALLED, "tools": json.dumps(TOOLS)}, pair(USER, *NAMELESS, tools=TOOLS, **FLAG)),
        (ALPACA, pair(USER | {"content": "add\none"}, ASSISTANT)),
        (ALPACA | {"input": "", "system": "add"}, pair(SYSTEM, USER | {"content": "add"}, ASSISTANT)),
        ({"messages": [USER, ASSISTANT], "system": "add"}, EXPANDED),
        (CONVERSATION | {"system": "add", "tools": []} | LOUD, pair(SYSTEM, USER, ASSISTANT, **LOUD)),
    ],
)  # fmt: skip
def test_each_form_becomes_prompt_and_completion(row, expected) -> None:
    assert read_row(row, {}) == (expected, set())


@pytest.mark.parametrize(
    ("row", "columns", "expected", "not_read"),
    [
        (MESSAGES | {"prompt": "one", "id": 3, "none": None}, {}, EXPANDED, {"prompt", "id"}),
        ({"question": "one plus one", "answer": "two", "n": 1}, ASKED, TEXT, {"n"}),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, CHOSEN, CONVERSATION, {"rejected"}),
        ({"body": "one", "text": "two"}, {"text": "body"}, {"prompt": "", "completion": "one"}, {"text"}),
    ],
)  # fmt: skip
def test_columns_are_named_and_others_are_told_of(row, columns, expected, not_read) -> None:
    assert read_row(row, columns) == (expected, not_read)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2: a row must be an object .* is a list"),
        (3, "is a number"),
        ({}, "line 2: a row with the keys none has none of the allowed forms"),
        ({"prompt": "a"}, r"the keys 'prompt' has none of the allowed forms .* --dataset_prompt_field and"),
        ({"prompt": None, "completion": "b"}, "the keys 'completion' has none"),
        ({"messages": None}, "the keys none has none"),
        ({"prompt": "", "completion": "b"}, "line 2: 'prompt' is empty"),
        ({"prompt": "a", "completion": " \n"}, "line 2: 'completion' is empty"),
        ({"text": " "}, "'text' is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, but it is a number"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "'prompt' is a string and 'completion' is a list"),
        ({"prompt": "\ud800", "completion": "b"}, r"half of a surrogate pair \(\\ud800\)"),
        ({"prompt": [], "completion": [ASSISTANT]}, "'prompt' must be .* an empty list"),
        ({"prompt": [USER], "completion": []}, "'completion' must be .* an empty list"),
        ({"prompt": [USER], "completion": [USER]}, "no assistant turn"),
        ({"prompt": [USER], "completion": [USER, ASSISTANT]}, "must begin with the assistant, not with user"),
        ({"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]}, "begins with an assistant message"),
        ({"prompt": ["a"], "completion": [ASSISTANT]}, "'prompt', message 0 must be .* it is a string"),
        ({"messages": "a"}, "'messages' must be a list of messages, at least one, but it is a string"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ASSISTANT]}, "begins with an assistant message"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1: the role is 'bot', .* 'system'"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "the role is .* must be one of"),
        ({"messages": [USER, {"content": "x"}]}, "message 1: the role is None"),
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, r"message 1 \(assistant\), the content .* null|is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "the content must be a string, but it is null"),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "image"}]}]}, "a string, but it is a list"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "the keys 'weight' besides 'role', 'content'"),
        ({"conversations": [GPT[1], CALLED[1] | {"value": "add(1)"}]}, "message 1, the function call: not valid JSON"),
        (MESSAGES | {"tools": "add"}, "'tools': not valid JSON"),
        (MESSAGES | {"tools": {"a": 1}}, "'tools' must be a list, but it is an object"),
        (MESSAGES | {"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object, but it is a list"),
        (MESSAGES | {"chat_template_kwargs": {"a": 2**70}}, "a number that JSON has not"),
        (MESSAGES | {"system": "add"}, "a 'system' column and a system message too"),
        (TEXT | {"system": "add"}, "'system' beside plain text is not shown to the model"),
        ({"text": "a", "tools": TOOLS}, "'tools' beside plain text"),
        (CONVERSATION | MESSAGES, "both 'messages' and 'completion'"),
        ({"question": "a", "answer": "b"}, "'answer', 'question' has none .* --dataset_completion_field"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "two answers; .* --dataset_completion_field chosen"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_with_their_line(tmp_path, row, message) -> None:
    path = write_lines(tmp_path / "rows.jsonl", TEXT, row, TEXT)
    with pytest.raises(MaskftError, match=message) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


def test_a_problem_is_what_is_asked_first() -> None:
    turns = [SYSTEM, USER, ASSISTANT, AGAIN]
    assert problem_of({"prompt": turns, "completion": [ASSISTANT]}) == problem_of(EXPANDED) != problem_of(CONVERSATION)
    assert problem_of(TEXT) == "one plus one"
    assert problem_of({"prompt": "", "completion": "whole"}) == "whole"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(codec=None), min_size=1, max_size=4)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": ANY_TEXT})
FIELD = ANY_TEXT | st.lists(MESSAGE, max_size=3) | st.lists(MESSAGE | JSON, max_size=3) | JSON
COLUMNS = ["prompt", "completion", "messages", "conversations", "instruction", "output", "text", "system", "tools"]
ROW = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from(COLUMNS), FIELD, max_size=3),
    st.fixed_dictionaries({"prompt": ANY_TEXT, "completion": ANY_TEXT}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=2, max_size=4)}, optional={"tools": st.lists(JSON)}),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROW, max_size=3), as_array=st.booleans())
def test_any_json_loads_or_is_refused(tmp_path_factory, rows, as_array) -> None:
    path = tmp_path_factory.getbasetemp() / ("any.json" if as_array else "any.jsonl")
    path.write_text(json.dumps(rows) if as_array else "\n".join(json.dumps(row) for row in rows))
    try:
        loaded = load_rows(str(path))
    except MaskftError:
        return
    assert {"prompt", "completion"} <= set(loaded.column_names)
    assert all(row["completion"] and isinstance(row["prompt"], type(row["completion"])) for row in loaded)
