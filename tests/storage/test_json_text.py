import gzip
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from maskft.errors import MaskftError
from maskft.storage import environment
from maskft.storage.json_text import json_hash, json_lines, json_objects, plain


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
