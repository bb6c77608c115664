"""Where rows are found, how files are read, and what is said of them."""

import csv
import gzip
import io
import json
import logging
from unittest.mock import Mock

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from example_rows import CHATML, CONVERSATION, EXPANDED, MESSAGES, TEXT, make_tokenizer, write_lines
from hypothesis import given, settings

from maskft.data.rows import Reader, data_hash, load_held_out, load_mixture, load_rows, token_hash, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError


def zst(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def table(*rows, kind: str = "parquet") -> bytes:
    sink, held = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(held, sink)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, held.schema) as writer:
            writer.write_table(held)
    return sink.getvalue().to_pybytes()


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(*rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


LINE = lines(TEXT)
SEPARATORS = TEXT | {"prompt": "a\u2028b\u0085c\x0bd"}
ANSWERS = [TEXT | {"completion": answer} for answer in ("NA", "3", 'one\ntwo, "three"', "x" * 200_000)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", lines(TEXT, CONVERSATION, MESSAGES), [TEXT, CONVERSATION, EXPANDED]),
        ("a.json", json.dumps([TEXT, CONVERSATION, MESSAGES], indent=2).encode(), [TEXT, CONVERSATION, EXPANDED]),
        ("a.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n\n") + LINE, [TEXT, TEXT]),
        ("an_object_a_line.json", LINE + LINE, [TEXT, TEXT]),
        ("array.json", b"\xef\xbb\xbf \n[" + LINE + b"]", [TEXT]),
        ("separators_inside_a_text.jsonl", json.dumps(SEPARATORS, ensure_ascii=False).encode(), [SEPARATORS]),
        ("a.csv", as_csv(*ANSWERS), ANSWERS),
        ("a.csv", as_csv({"instruction": "one plus one", "input": "", "output": "two"}), [CONVERSATION]),
        ("a.parquet", table(MESSAGES, MESSAGES), [EXPANDED, EXPANDED]),
        ("null_columns.parquet", table(TEXT | {"messages": None}), [TEXT]),
        ("a.arrow", table(TEXT, TEXT, kind="stream"), [TEXT, TEXT]),
        ("a.arrow", table(CONVERSATION, kind="file"), [CONVERSATION]),
        ("a.jsonl.gz", gzip.compress(LINE), [TEXT]),
        ("a.json.zst", zst(b"[" + LINE + b"]"), [TEXT]),
        ("a.csv.gz", gzip.compress(as_csv(*ANSWERS)), ANSWERS),
        ("a.parquet.zst", zst(table(TEXT)), [TEXT]),
    ],
)  # fmt: skip
def test_files_are_read(tmp_path, name, content, expected) -> None:
    (tmp_path / name).write_bytes(content)
    loaded = load_rows(str(tmp_path / name)).to_list()
    assert [{key: value for key, value in row.items() if value is not None} for row in loaded] == expected


def test_data_sets_that_were_saved_are_read(tmp_path) -> None:
    tools = [{"name": "add", "parameters": {"a": 1}}, {"name": "b"}]
    nested = Dataset.from_list([CONVERSATION | {"tools": tools}] * 2, on_mixed_types="use_json")
    nested.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train_sft=nested, test_sft=nested.select([0])).save_to_disk(str(tmp_path / "dict"))
    nested.to_parquet(str(tmp_path / "data.parquet"))
    whole = load_rows(str(tmp_path / "one"))
    assert whole[0]["prompt"] == CONVERSATION["prompt"]
    assert load_rows(str(tmp_path / "dict"), split="test_sft").to_list() == whole.to_list()[:1]
    assert load_rows(str(tmp_path / "data.parquet")).to_list() == whole.to_list()
    with pytest.raises(MaskftError, match="has no split 'train', but 'train_sft', 'test_sft'"):
        load_rows(str(tmp_path / "dict"))


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        ("a b", "train", "a b"),
        ("train-0 train-1 test", "train", "train-0 train-1"),
        ("train-0 train-1 test", "test", "test"),
        ("data/train-00-of-02 data/train-01-of-02 data/test-0", "train", "data/train-00-of-02 data/train-01-of-02"),
        ("train/a train/b test/a", "train", "train/a train/b"),
        ("train_sft-0 train_gen-0", "train_sft", "train_sft-0"),
        ("train_sft-0 train_gen-0", "train", "no data of the split 'train', but of 'train_gen', 'train_sft'; name one"),
        ("sums-train sums-test", "train", "but of 'sums-test', 'sums-train'; name one of them with --"),
        ("training latest", "train", "latest training"),
        ("test", "train", "but of 'test'"),
        ("a b", "test", "no data of the split 'test', but of ''"),
        ("", "train", "no data of the split 'train', but of none"),
        ("main/train socratic/train main/test", "train", "in several folders"),
    ],
)  # fmt: skip
def test_a_folder_s_splits_have_whole_names(tmp_path, files, split, expected) -> None:
    for name in ["README.md", ".hidden/x", "dataset_infos.json", *(f"{file}.jsonl" for file in files.split())]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write_lines(path, TEXT | {"prompt": name.removesuffix(".jsonl")})
    if "," in expected or "in several" in expected or "but of" in expected:
        with pytest.raises(MaskftError, match=expected):
            load_rows(str(tmp_path), split=split)
        return
    assert load_rows(str(tmp_path), split=split)["prompt"][:] == expected.split()
    # To validate on, a file is that split, whatever its name.
    assert len(load_held_out(str(tmp_path / f"{expected.split()[0]}.jsonl"), "validation")) == 1


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


BAD = TEXT | {"completion": ""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE + b'{"prompt": "a", "completion": "b"\n', "line 2: not valid JSON .* at column 34"),
        ("a.jsonl", LINE + b"[" * 100_000, "line 2: this JSON cannot be read"),
        ("a.json", json.dumps([TEXT, BAD]).encode(), r"a\.json, row 1: 'completion' is empty"),
        ("a.parquet", table(TEXT, BAD), r"a\.parquet, row 1: 'completion' is empty"),
        ("a.parquet", table({"question": "a", "answer": "b"}), "'answer', 'question' has none of the allowed forms"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet cannot be read"),
        ("a.arrow", b"nothing", r"a\.arrow cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINE * 50)[:40], r"a\.jsonl\.gz cannot be read"),
        ("a.json", b'[\n{"prompt": "a",}\n]', r"not valid JSON .* at line 2, column"),
        ("a.jsonl", b"", r"a\.jsonl holds no rows"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        ("a.csv", b"prompt,completion\n", r"a\.csv holds no rows"),
        ("a.csv", b"prompt,completion\na\xff,b\n", r"a\.csv cannot be read"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: the row has not as many values as the header"),
        ("a.txt", b"a", r"of the kind \.txt: give one of '\.jsonl', "),
        ("a.pkl", b"", r"reading a \.pkl file can run code"),
        ("a.bin.gz", b"", r"reading a \.bin file can run code"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MaskftError, match=message):
        load_rows(str(tmp_path / name))


def test_paths_that_cannot_be_used_are_refused(tmp_path) -> None:
    (tmp_path / "mixed").mkdir()
    for name in ("mixed/a.jsonl", "mixed/b.parquet", "test.jsonl"):
        (tmp_path / name).write_bytes(LINE)
    for name, options, message in (
        ("missing.jsonl", {}, "no data file or folder"),
        ("test.jsonl", {"split": "test"}, "The split 'test' cannot be taken from the single file"),
        ("test.jsonl", {"dataset_config": "main"}, r"config \('main'\) belongs to a hub data set"),
        ("mixed", {}, r"several kinds \('\.jsonl', '\.parquet'\)"),
    ):
        with pytest.raises(MaskftError, match=message):
            load_rows(str(tmp_path / name), **options)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"]))
def test_any_bytes_load_or_are_refused(tmp_path_factory, data, suffix) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(data)
    with pytest.raises(MaskftError):  # no 60 bytes at random make a row
        load_rows(str(path))


def test_what_is_skipped_dropped_and_cut_is_counted_and_told_of(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("maskft.data.rows._ROWS_PER_BLOCK", 2)
    long = TEXT | {"prompt": "one plus one plus one is so "}
    cut = TEXT | {"completion": "two is two plus one"}
    path = write_lines(tmp_path / "a.jsonl", TEXT | {"id": 1}, BAD, long, cut, {"text": "one is one"}, BAD, 3, BAD)
    reader = Reader(RowTokeniser(make_tokenizer(), 6), skips_bad_rows=True)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(path, reader=reader)
    assert rows["completion"][:] == ["two", cut["completion"], "one is one"]
    assert reader.found == {path: {"read": 8, "skipped": 4, "whole text": 1, "no answer": 1, "cut": 1, "kept": 3}}
    for told in (
        "columns that are not read: 'id'",
        f"4 rows of 8 are skipped, the first: {path}, line 2: 'completion' is empty",
        "1 rows of plain text, whose loss falls on all their tokens",
        "1 rows have no token to train on within max_length 6, and are left out",
        "1 rows lose a part of their answer",
    ):
        assert told in caplog.text
    assert caplog.text.count(": 'completion' is empty") == 2, "and the third is line 7"
    for kept, told in (
        (long, "None of the 1 rows of .* is left; raise"),
        (BAD, "line 1: 'completion' is empty"),
    ):
        with pytest.raises(MaskftError, match=told):
            load_rows(write_lines(tmp_path / "b.jsonl", kept), reader=Reader(RowTokeniser(make_tokenizer(), 6)))


def test_shares_of_several_data_sets_are_drawn_and_counted(tmp_path) -> None:
    texts = [TEXT | {"prompt": f"one plus {i}"} for i in range(10)]
    names = write_lines(tmp_path / "a.jsonl", *texts), write_lines(tmp_path / "b.jsonl", *[MESSAGES] * 4)
    reader = Reader(RowTokeniser(make_tokenizer()))
    rows = load_mixture({names[0]: 0.3, names[1]: 1.0}, seed=1, reader=reader)
    assert [reader.found[name]["drawn"] for name in names] == [3, 4]
    assert [isinstance(prompt, str) for prompt in rows["prompt"]] == [True] * 3 + [False] * 4
    other = load_mixture({names[0]: 0.3, names[1]: 1.0}, seed=2, reader=reader)
    assert rows["prompt"][:3] != other["prompt"][:3]
    assert {len(set(rows["prompt"][:3])), len(set(other["prompt"][:3]))} == {3}


def test_hash_depends_on_content_and_order_alone() -> None:
    rows = [TEXT, {"prompt": "ü", "completion": "x"}]
    expected = data_hash(rows)
    assert data_hash(Dataset.from_list(rows)) == expected
    assert data_hash([dict(reversed(row.items())) for row in rows]) == expected
    assert data_hash([row | {"tools": None} for row in rows]) == expected
    assert data_hash(rows[::-1]) != expected
    assert data_hash([TEXT, {"prompt": "u", "completion": "x"}]) != expected
    # sha256 of one line of canonical JSON, as sha256sum gives it: reports of older runs must stay comparable.
    assert data_hash([TEXT]) == "f4698b32bc1e7962dab12f3d5a9905aa07d8b7139f0e362e7c30c597c24dfae9"
    # What the template writes decides too, as the date of the day.
    dated = [RowTokeniser(make_tokenizer(template=f"again {day} {CHATML}")) for day in ("one", "two")]
    tokens = [tokenise_rows(Dataset.from_list([EXPANDED]), tokenise) for tokenise in dated]
    assert data_hash(tokens[0]) == data_hash(tokens[1]) == data_hash([EXPANDED])
    assert token_hash(tokens[0]) != token_hash(tokens[1])


def test_rows_keep_their_numbers_and_texts(tmp_path) -> None:
    held = {"a": 1 / 3, "b": [1e300, 0.1 + 0.2, -5], "c": "\x00\u2028ü", "d": {"e": None, "f": True}}
    (row,) = load_rows(write_lines(tmp_path / "a.jsonl", MESSAGES | {"chat_template_kwargs": held})).to_list()
    kept = row["chat_template_kwargs"]
    assert kept | {"a": 0, "b": 0} == held | {"a": 0, "b": 0}
    assert [kept["a"], *kept["b"]] == pytest.approx([held["a"], *held["b"]], rel=1e-14)
