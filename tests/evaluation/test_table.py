import pytest

from maskft.evaluation.table import render_results, short_names


def test_models_go_by_their_last_parts_where_these_differ() -> None:
    assert short_names(["/a/fft", "/a/fft+/b/mask", "org/base"]) == {
        "/a/fft": "fft",
        "/a/fft+/b/mask": "fft+mask",
        "org/base": "base",
    }
    assert short_names(["a/fft", "b/fft"]) == {"a/fft": "a/fft", "b/fft": "b/fft"}


@pytest.mark.parametrize(("high", "is_told"), [(0.0, True), (0.1, False)])
def test_an_interval_without_width_is_explained(high: float, is_told: bool) -> None:
    protocol = {"task": "nll:f", "matching": "NLL", "dtype": "float32", "n": 3, "data": {"sha256": "0" * 64}}
    of = {"task": "nll:f", "metric": "accuracy", "low": 0.0, "high": high, "detectable_difference": 0.4, "n": 3}
    scores = [of | {"model": model, "score": 0.0, "protocol": protocol} for model in ("a", "b")]
    comparison = of | {"from": "a", "to": "b", "difference": 0.0, "p": 1.0, "p_holm": 1.0}
    tables = render_results({"scores": scores, "comparisons": [comparison]}).renderables
    assert ("an interval without width: all items differ alike" in tables[-1].caption) == is_told
