from pathlib import Path

import pytest

from maskft.evaluation.local_data import ensure_punkt

nltk = pytest.importorskip("nltk")
english = pytest.importorskip("punkt.data.english")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])


def test_the_sentence_model_is_written_in_nltks_format(tmp_path: Path, nothing_installed) -> None:
    ensure_punkt(tmp_path)
    tokenizer = nltk.data.load("nltk:tokenizers/punkt/english.pickle")
    assert tokenizer._params.abbrev_types == set(english.ABBREV_TYPES)
    assert tokenizer._params.collocations == {tuple(pair) for pair in english.COLLOCATIONS}
    assert tokenizer._params.sent_starters == set(english.SENT_STARTERS)
    assert dict(tokenizer._params.ortho_context) == dict(english.ORTHO_CONTEXT)
    text = "Dr. Smith went to Washington, D.C. on Jan. 5. He was tired! Was he?"
    assert len(tokenizer.tokenize(text)) == 3
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*")}
    ensure_punkt(tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*")}
