import gzip
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from maskft.errors import MaskftError
from maskft.storage import environment, memory
from maskft.storage.json_text import json_hash, json_lines, json_objects, parse_json, plain, read_json, read_object


def test_lines_are_read_with_their_location(tmp_path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n[2]\n'
    for path, opened in ((tmp_path / "a.jsonl", open), (tmp_path / "a.jsonl.gz", gzip.open)):
        with opened(path, "wb") as file:
            file.write(content)
        assert list(json_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", [2])]
        with pytest.raises(MaskftError, match="line 3, must hold a JSON object"):
            json_objects(path)
    (tmp_path / "cut.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:12])
    for name in ("cut.gz", "absent.jsonl"):
        with pytest.raises(MaskftError, match=rf"{name} cannot be read"):
            json_objects(tmp_path / name)


def test_values_become_plain() -> None:
    value = {"a": np.float32(0.5), "b": [np.bool_(True), np.int64(3)], "c": Path("d"), "e": None}
    result = plain(value)
    assert result == {"a": 0.5, "b": [True, 3], "c": "d", "e": None}
    assert [type(part) for part in result["b"]] == [bool, int]


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert json_hash({"a": 1, "b": "ü\ud800"}) == json_hash({"b": "ü\ud800", "a": 1}) != json_hash({"a": 1, "b": "ü"})


def test_versions_of_what_is_not_installed_are_left_out(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "trl":
            raise PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(environment, "version", version)
    versions = environment.versions("nltk")
    assert versions["torch"] == "torch 1"
    assert versions["nltk"] == "nltk 1"
    assert "python" in versions
    assert "trl" not in versions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "cannot be read .*recursion"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 times"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 times"),
        ("7" * 5000, "cannot be read .*digits"),
        ("{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        ("[1]", "must hold a JSON object, but it holds a list"),
        (None, "is no file"),
    ],
)
def test_a_file_that_holds_no_object_is_refused_with_what_to_do(tmp_path, text, message) -> None:
    path = tmp_path / "a.json"
    path.mkdir() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MaskftError, match=message):
        read_object(path, "mend it")


def test_as_deep_as_is_allowed_and_many_brackets_in_texts_are_read(tmp_path, monkeypatch) -> None:
    deep = b"[" * 64 + b"]" * 64
    assert str(parse_json(deep, "a")).encode() == deep
    assert parse_json(b'["' + b"{" * 1000 + b'"]', "a") == ["{" * 1000]
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", "mend it") == [1]
    monkeypatch.setattr(memory, "free_memory", lambda: 10**7)
    (tmp_path / "a.json").write_text(" " * 2**21)
    with pytest.raises(MaskftError, match="memory"):
        read_json(tmp_path / "a.json", "mend it")
