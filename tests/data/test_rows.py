import json
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from example_rows import ASSISTANT, CONVERSATION, MESSAGES, SYSTEM, TEXT, USER, write_lines
from hypothesis import given, settings

from maskft.data.forms import ROLES
from maskft.data.rows import data_hash, load_held_out, load_rows
from maskft.errors import MaskftError

# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT, TEXT),
        (CONVERSATION, CONVERSATION),
        (MESSAGES, {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}),
    ],
)
def test_each_form_is_read_from_each_kind_of_file(
    tmp_path: Path, suffix: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [row | {"id": 1}, row | {"id": 2}]
    if suffix == "jsonl":
        write_lines(path, *rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    loaded = load_rows(str(path))
    assert loaded.column_names == ["prompt", "completion"]
    assert loaded.to_list() == [expected, expected]


def test_every_assistant_turn_becomes_a_row(tmp_path: Path) -> None:
    later = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "two, still"}]
    path = write_lines(tmp_path / "rows.jsonl", {"messages": [SYSTEM, USER, ASSISTANT, *later]})
    assert load_rows(path).to_list() == [
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"prompt": [SYSTEM, USER, ASSISTANT, later[0]], "completion": [later[1]]},
    ]


def test_blank_lines_byte_order_mark_and_a_single_object_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n\n" + json.dumps(TEXT).encode())
    assert load_rows(str(path)).to_list() == [TEXT, TEXT]
    # A .json file with an object on each line is read as such.
    assert load_rows(write_lines(tmp_path / "rows.json", TEXT, TEXT)).num_rows == 2


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    row = TEXT | {"prompt": "a\u2028b\u0085c\x0bd"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_rows(str(tmp_path / "rows.jsonl")).to_list() == [row]


def test_null_columns_of_parquet_do_not_hide_the_form(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "completion": ["b"], "messages": pa.nulls(1)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet")).to_list() == [{"prompt": "a", "completion": "b"}]


def test_a_prompt_beside_messages_is_an_extra_column(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", MESSAGES | {"prompt": "one plus one"})
    assert load_rows(path).to_list() == [{"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}]


def test_many_rows_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskft.data.rows._ROWS_PER_BLOCK", 3)
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(10)]
    assert load_rows(write_lines(tmp_path / "rows.jsonl", *rows)).to_list() == rows


def test_folder_reads_the_files_of_the_split_or_all(tmp_path: Path) -> None:
    shards, splits = tmp_path / "shards", tmp_path / "splits"
    shards.mkdir()
    splits.mkdir()
    for name in ("a", "b"):
        write_lines(shards / f"{name}.jsonl", TEXT | {"prompt": name})
    (shards / "README.md").write_text("about")
    for name in ("train-0", "train-1", "test"):
        write_lines(splits / f"{name}.jsonl", TEXT | {"prompt": name})
    assert load_rows(str(shards))["prompt"][:] == ["a", "b"]
    assert load_rows(str(splits))["prompt"][:] == ["train-0", "train-1"]
    assert load_rows(str(splits), split="test")["prompt"][:] == ["test"]
    # To validate on, a file is that split, whatever its name.
    assert load_held_out(str(splits), "test")["prompt"][:] == ["test"]
    assert load_held_out(str(splits / "train-0.jsonl"), "validation")["prompt"][:] == ["train-0"]


def test_hub_data_sets_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(name: str, config: str | None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_list([MESSAGES | {"source": "x"}])

    monkeypatch.setattr("maskft.data.rows.load_dataset", fake)
    loaded = load_rows("someone/data", dataset_config="main", split="train[:1%]")
    assert asked == [("someone/data", "main", "train[:1%]")]
    assert loaded.to_list() == [{"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}]


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it"), ValueError("Unknown split"), RuntimeError("scripts")]
)
def test_hub_errors_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Dataset:
        raise error

    monkeypatch.setattr("maskft.data.rows.load_dataset", fail)
    with pytest.raises(MaskftError, match=rf"'someone/data' with config 'c', split 'train', .*\({error}\)"):
        load_rows("someone/data", dataset_config="c")


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2: a row must be an object .* is a list"),
        (3, "is a number"),
        ({}, "line 2: a row with the keys none has none of the allowed forms"),
        ({"prompt": "a"}, r"line 2: 'completion' is missing or null \(keys found: 'prompt'\)"),
        ({"prompt": None, "completion": "b"}, "'prompt' is missing or null"),
        ({"messages": None}, "'messages' is missing or null"),
        ({"prompt": "", "completion": "b"}, "line 2: 'prompt' is empty"),
        ({"prompt": "a", "completion": " \n"}, "line 2: 'completion' is empty"),
        ({"prompt": "a", "completion": 3}, "'prompt' is a string and 'completion' is a number, but both"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "'prompt' is a string and 'completion' is a list"),
        ({"prompt": "\ud800", "completion": "b"}, r"half of a surrogate pair \(\\ud800 at character 0\)"),
        ({"prompt": [], "completion": [ASSISTANT]}, "'prompt' is an empty list"),
        ({"prompt": [USER], "completion": []}, "'completion' is an empty list"),
        (
            {"prompt": [USER], "completion": [USER]},
            "exactly one message, of the assistant, .* roles are 'user'",
        ),
        ({"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "exactly one message"),
        ({"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]}, "begins with an assistant message"),
        ({"prompt": ["a"], "completion": [ASSISTANT]}, "'prompt', message 0 must be .* it is a string"),
        ({"messages": "a"}, "'messages' must be a list of messages, but it is a string"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ASSISTANT]}, "begins with an assistant message"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1: the role is 'bot', .* 'system'"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "the role is .* must be one of"),
        ({"messages": [USER, {"content": "x"}]}, "message 1: the role is None"),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            r"message 1 \(assistant\), the content is empty",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "the content must be a string, but it is null"),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "text"}]}]}, "a string, but it is a list"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [1]}]}, "the keys 'tool_calls' besides"),
        (CONVERSATION | MESSAGES, "both 'messages' and 'completion'"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "keys 'input', 'instruction', 'output' .* answer as",
        ),
        ({"question": "a", "answer": "b"}, "rename 'question' to 'prompt' and 'answer' to 'completion'"),
        ({"text": "a"}, "cut the text where the answer begins"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "rename 'conversations' to 'messages'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rename 'chosen' to 'completion'"),
        ({"x": 1}, "rename the column with the question to 'prompt'"),
        (CONVERSATION, "line 2: this row is of the form prompt-completion with messages but .*line 1 is of"),
        (
            MESSAGES,
            "line 2: this row is of the form messages but .*line 1 is of the form prompt-completion with",
        ),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", TEXT, row, TEXT)
    with pytest.raises(MaskftError, match=message) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


def test_other_message_keys_without_a_value_are_accepted(tmp_path: Path) -> None:
    row = {"messages": [USER, ASSISTANT | {"tool_calls": None, "name": ""}]}
    assert load_rows(write_lines(tmp_path / "rows.jsonl", row)).to_list() == [CONVERSATION]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_system_and_tool_messages_may_be_empty(tmp_path: Path, role: str) -> None:
    row = {"messages": [{"role": role, "content": ""}, USER, ASSISTANT]}
    assert load_rows(write_lines(tmp_path / "rows.jsonl", row))["prompt"][0][0]["content"] == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a", "completion": "b"', "line 2: not valid JSON .* at column 34"),
        (b'{"prompt": "\xff"}', r"line 2: the text is not UTF-8 \(byte 12 is 0xff\)"),
        (b"1" * 5000, "line 2: this JSON cannot be read"),
        (b"[" * 100_000, "line 2: this JSON cannot be read"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(TEXT).encode() + b"\n" + data + b"\n")
    with pytest.raises(MaskftError, match=message):
        load_rows(str(path))


def test_rows_of_arrays_and_parquet_are_named_by_index(tmp_path: Path) -> None:
    bad = TEXT | {"completion": ""}
    (tmp_path / "rows.json").write_text(json.dumps([TEXT, bad]))
    pq.write_table(pa.Table.from_pylist([TEXT, bad]), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        with pytest.raises(MaskftError, match=rf"{re.escape(name)}, row 1: 'completion' is empty"):
            load_rows(str(tmp_path / name))


def test_parquet_of_another_form_shows_all_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"question": "a", "answer": "b"}]), tmp_path / "rows.parquet")
    with pytest.raises(MaskftError, match="'answer', 'question' has none of the allowed forms"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_a_broken_array_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[\n{"prompt": "a",}\n]')
    with pytest.raises(MaskftError, match=r"not valid JSON .* at line 2, column"):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]")])
def test_files_without_rows_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MaskftError, match=rf"{re.escape(name)} holds no rows"):
        load_rows(str(tmp_path / name))


def test_an_unreadable_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(MaskftError, match=r"a\.parquet: not a readable Parquet file"):
        load_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", ["pkl", "pt", "bin"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(MaskftError, match=rf"reading a \.{suffix} file can run code"):
        load_rows(str(tmp_path / f"data.{suffix}"))


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    with pytest.raises(MaskftError, match=r"of the kind \.csv: give a \.jsonl"):
        load_rows(str(tmp_path / "a.csv"))
    with pytest.raises(MaskftError, match="no data file or folder"):
        load_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(MaskftError, match="holds no data"):
        load_rows(str(tmp_path))
    path = write_lines(tmp_path / "a.jsonl", TEXT)
    with pytest.raises(MaskftError, match="The split 'test' cannot be taken from the single file"):
        load_rows(path, split="test")
    with pytest.raises(MaskftError, match=r"config \('main'\) belongs to a hub data set"):
        load_rows(path, dataset_config="main")
    pq.write_table(pa.Table.from_pylist([TEXT]), tmp_path / "b.parquet")
    with pytest.raises(MaskftError, match=r"several kinds \('\.jsonl', '\.parquet'\)"):
        load_rows(str(tmp_path))


def test_a_folder_of_other_splits_is_not_trained_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", TEXT)
    with pytest.raises(MaskftError, match=r"no file of the split 'train' \(it holds 'test\.jsonl'\)"):
        load_rows(str(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(codec=None), min_size=1, max_size=4)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": ANY_TEXT})
FIELD = ANY_TEXT | st.lists(MESSAGE, max_size=3) | st.lists(MESSAGE | JSON, max_size=3) | JSON
ROW = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "text"]), FIELD, max_size=3),
    st.fixed_dictionaries({"prompt": ANY_TEXT, "completion": ANY_TEXT}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=2, max_size=4)}),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROW, max_size=3), as_array=st.booleans())
def test_any_json_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], as_array: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / ("any.json" if as_array else "any.jsonl")
    path.write_text(json.dumps(rows) if as_array else "\n".join(json.dumps(row) for row in rows))
    try:
        loaded = load_rows(str(path))
    except MaskftError:
        return
    assert loaded.column_names == ["prompt", "completion"]
    assert all(row["prompt"] and row["completion"] for row in loaded)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "parquet"]))
def test_any_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(data)
    with pytest.raises(MaskftError):  # no 60 bytes at random make a row
        load_rows(str(path))


# --- hashing ----------------------------------------------------------------------------------------------


def test_hash_depends_on_content_and_order_alone() -> None:
    rows = [TEXT, {"prompt": "ü", "completion": "x"}]
    expected = data_hash(rows)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert data_hash(Dataset.from_list(rows)) == expected
    assert data_hash([dict(reversed(row.items())) for row in rows]) == expected
    assert data_hash(rows[::-1]) != expected
    assert data_hash([TEXT, {"prompt": "u", "completion": "x"}]) != expected


def test_hash_keeps_its_value() -> None:
    # sha256 of one line of canonical JSON, as sha256sum gives it: reports of older runs must stay comparable.
    assert data_hash([TEXT]) == "f4698b32bc1e7962dab12f3d5a9905aa07d8b7139f0e362e7c30c597c24dfae9"
