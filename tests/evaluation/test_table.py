from maskft.evaluation.table import short_names


def test_models_go_by_their_last_parts_where_these_differ() -> None:
    assert short_names(["/a/fft", "/a/fft+/b/mask", "org/base"]) == {
        "/a/fft": "fft",
        "/a/fft+/b/mask": "fft+mask",
        "org/base": "base",
    }
    assert short_names(["a/fft", "b/fft"]) == {"a/fft": "a/fft", "b/fft": "b/fft"}
