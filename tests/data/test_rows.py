import json
from unittest.mock import Mock

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from example_rows import ASSISTANT, CONVERSATION, EXPANDED, MESSAGES, SYSTEM, TEXT, USER, write_lines
from hypothesis import given, settings

from maskft.data.forms import ROLES
from maskft.data.rows import data_hash, load_held_out, load_rows
from maskft.errors import MaskftError


@pytest.fixture
def read(tmp_path):
    """Rows as they are read from a file of lines."""
    return lambda *rows: load_rows(write_lines(tmp_path / "rows.jsonl", *rows)).to_list()


def parquet(*rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("row", "expected"), [(TEXT, TEXT), (CONVERSATION, CONVERSATION), (MESSAGES, EXPANDED)])
def test_each_form_is_read_from_each_kind_of_file(tmp_path, suffix, row, expected) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [row | {"id": 1}, row | {"id": 2}]
    if suffix == "jsonl":
        write_lines(path, *rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_bytes(parquet(*rows))
    loaded = load_rows(str(path))
    assert loaded.column_names == ["prompt", "completion"]
    assert loaded.to_list() == [expected, expected]


AGAIN, EMPTY, TOOL = USER | {"content": "again"}, SYSTEM | {"content": " "}, {"role": "tool", "content": ""}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Every assistant turn becomes a row.
        (
            {"messages": [SYSTEM, USER, ASSISTANT, AGAIN, ASSISTANT]},
            [EXPANDED, {"prompt": [SYSTEM, USER, ASSISTANT, AGAIN], "completion": [ASSISTANT]}],
        ),
        # A prompt beside messages is an extra column, and so are keys of a message that hold nothing.
        (MESSAGES | {"prompt": "one plus one"}, [EXPANDED]),
        ({"messages": [USER, ASSISTANT | {"tool_calls": None, "name": ""}]}, [CONVERSATION]),
        ({"messages": [EMPTY, USER, ASSISTANT]}, [{"prompt": [EMPTY, USER], "completion": [ASSISTANT]}]),
        ({"messages": [TOOL, USER, ASSISTANT]}, [{"prompt": [TOOL, USER], "completion": [ASSISTANT]}]),
    ],
)
def test_conversations_become_rows(read, row, expected) -> None:
    assert read(row) == expected


LINE = json.dumps(TEXT).encode() + b"\n"
SEPARATORS = TEXT | {"prompt": "a\u2028b\u0085c\x0bd"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n\n") + LINE, [TEXT, TEXT]),
        ("an_object_a_line.json", LINE + LINE, [TEXT, TEXT]),
        ("array.json", b"\xef\xbb\xbf \n[" + LINE + b"]", [TEXT]),
        ("separators_inside_a_text.jsonl", json.dumps(SEPARATORS, ensure_ascii=False).encode(), [SEPARATORS]),
        ("null_columns.parquet", parquet(TEXT | {"messages": None}), [TEXT]),
    ],
)
def test_unusual_files_are_read(tmp_path, name, content, expected) -> None:
    (tmp_path / name).write_bytes(content)
    assert load_rows(str(tmp_path / name)).to_list() == expected


def test_many_rows_keep_their_order(read, monkeypatch) -> None:
    monkeypatch.setattr("maskft.data.rows._ROWS_PER_BLOCK", 3)
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(10)]
    assert read(*rows) == rows


def test_folder_reads_the_files_of_the_split_or_all(tmp_path) -> None:
    shards, splits = tmp_path / "shards", tmp_path / "splits"
    for folder, names in ((shards, ("a", "b")), (splits, ("train-0", "train-1", "test"))):
        folder.mkdir()
        for name in names:
            write_lines(folder / f"{name}.jsonl", TEXT | {"prompt": name})
    (shards / "README.md").write_text("about")
    assert load_rows(str(shards))["prompt"][:] == ["a", "b"]
    assert load_rows(str(splits))["prompt"][:] == ["train-0", "train-1"]
    assert load_rows(str(splits), split="test")["prompt"][:] == ["test"]
    # To validate on, a file is that split, whatever its name.
    assert load_held_out(str(splits), "test")["prompt"][:] == ["test"]
    assert load_held_out(str(splits / "train-0.jsonl"), "validation")["prompt"][:] == ["train-0"]


def test_hub_data_sets_go_through_datasets(monkeypatch) -> None:
    load = Mock(return_value=Dataset.from_list([MESSAGES | {"source": "x"}]))
    monkeypatch.setattr("maskft.data.rows.load_dataset", load)
    assert load_rows("someone/data", dataset_config="main", split="train[:1%]").to_list() == [EXPANDED]
    load.assert_called_once_with("someone/data", "main", split="train[:1%]")


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it"), ValueError("Unknown split"), RuntimeError("scripts")]
)
def test_hub_errors_are_one_sentence(monkeypatch, error) -> None:
    monkeypatch.setattr("maskft.data.rows.load_dataset", Mock(side_effect=error))
    with pytest.raises(MaskftError, match=rf"'someone/data' with config 'c', split 'train', .*\({error}\)"):
        load_rows("someone/data", dataset_config="c")


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
        ({"prompt": [USER], "completion": [USER]}, "exactly one message, of the assistant, .* roles are 'user'"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "exactly one message"),
        ({"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]}, "begins with an assistant message"),
        ({"prompt": ["a"], "completion": [ASSISTANT]}, "'prompt', message 0 must be .* it is a string"),
        ({"messages": "a"}, "'messages' must be a list of messages, but it is a string"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ASSISTANT]}, "begins with an assistant message"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1: the role is 'bot', .* 'system'"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "the role is .* must be one of"),
        ({"messages": [USER, {"content": "x"}]}, "message 1: the role is None"),
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, r"message 1 \(assistant\), the content is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "the content must be a string, but it is null"),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "text"}]}]}, "a string, but it is a list"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [1]}]}, "the keys 'tool_calls' besides"),
        (CONVERSATION | MESSAGES, "both 'messages' and 'completion'"),
        ({"instruction": "a", "input": "", "output": "b"}, "keys 'input', 'instruction', 'output' .* answer as"),
        ({"question": "a", "answer": "b"}, "rename 'question' to 'prompt' and 'answer' to 'completion'"),
        ({"text": "a"}, "cut the text where the answer begins"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "rename 'conversations' to 'messages'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rename 'chosen' to 'completion'"),
        ({"x": 1}, "rename the column with the question to 'prompt'"),
        (CONVERSATION, "line 2: this row is of the form prompt-completion with messages but .*line 1 is of"),
        (MESSAGES, "line 2: this row is of the form messages but .*line 1 is of the form prompt-completion with"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path, row, message) -> None:
    path = write_lines(tmp_path / "rows.jsonl", TEXT, row, TEXT)
    with pytest.raises(MaskftError, match=message) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


BAD = TEXT | {"completion": ""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE + b'{"prompt": "a", "completion": "b"\n', "line 2: not valid JSON .* at column 34"),
        ("a.jsonl", LINE + b'{"prompt": "\xff"}\n', r"line 2: the text is not UTF-8 \(byte 12 is 0xff\)"),
        ("a.jsonl", LINE + b"1" * 5000, "line 2: this JSON cannot be read"),
        ("a.jsonl", LINE + b"[" * 100_000, "line 2: this JSON cannot be read"),
        ("a.json", json.dumps([TEXT, BAD]).encode(), r"a\.json, row 1: 'completion' is empty"),
        ("a.parquet", parquet(TEXT, BAD), r"a\.parquet, row 1: 'completion' is empty"),
        ("a.parquet", parquet({"question": "a", "answer": "b"}), "'answer', 'question' has none of the allowed forms"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet: not a readable Parquet file"),
        ("a.json", b'[\n{"prompt": "a",}\n]', r"not valid JSON .* at line 2, column"),
        ("a.jsonl", b"", r"a\.jsonl holds no rows"),
        ("a.jsonl", b"\n \n", r"a\.jsonl holds no rows"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        ("a.csv", b"prompt,completion\n", r"of the kind \.csv: give a \.jsonl"),
        ("a.pkl", b"", r"reading a \.pkl file can run code"),
        ("a.pt", b"", r"reading a \.pt file can run code"),
        ("a.bin", b"", r"reading a \.bin file can run code"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MaskftError, match=message):
        load_rows(str(tmp_path / name))


def test_paths_that_cannot_be_used_are_refused(tmp_path) -> None:
    for folder, names in (("empty", ()), ("mixed", ("a.jsonl", "b.parquet")), ("other", ("test.jsonl",))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(LINE)
    for name, options, message in (
        ("missing.jsonl", {}, "no data file or folder"),
        ("empty", {}, "holds no data"),
        ("other/test.jsonl", {"split": "test"}, "The split 'test' cannot be taken from the single file"),
        ("other/test.jsonl", {"dataset_config": "main"}, r"config \('main'\) belongs to a hub data set"),
        ("mixed", {}, r"several kinds \('\.jsonl', '\.parquet'\)"),
        ("other", {}, r"no file of the split 'train' \(it holds 'test\.jsonl'\)"),
    ):
        with pytest.raises(MaskftError, match=message):
            load_rows(str(tmp_path / name), **options)


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
def test_any_json_loads_or_is_refused(tmp_path_factory, rows, as_array) -> None:
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
def test_any_bytes_load_or_are_refused(tmp_path_factory, data, suffix) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(data)
    with pytest.raises(MaskftError):  # no 60 bytes at random make a row
        load_rows(str(path))


def test_hash_depends_on_content_and_order_alone() -> None:
    rows = [TEXT, {"prompt": "ü", "completion": "x"}]
    expected = data_hash(rows)
    assert data_hash(Dataset.from_list(rows)) == expected
    assert data_hash([dict(reversed(row.items())) for row in rows]) == expected
    assert data_hash(rows[::-1]) != expected
    assert data_hash([TEXT, {"prompt": "u", "completion": "x"}]) != expected
    # sha256 of one line of canonical JSON, as sha256sum gives it: reports of older runs must stay comparable.
    assert data_hash([TEXT]) == "f4698b32bc1e7962dab12f3d5a9905aa07d8b7139f0e362e7c30c597c24dfae9"
