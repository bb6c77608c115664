import pytest
from rich.console import Console

from maskft.evaluation.table import render_results, short_names


def test_models_go_by_their_last_parts_where_these_differ() -> None:
    assert short_names(["/a/fft", "/a/fft+/b/mask", "org/base"]) == {
        "/a/fft": "fft",
        "/a/fft+/b/mask": "fft+mask",
        "org/base": "base",
    }
    assert short_names(["a/fft", "b/fft"]) == {"a/fft": "a/fft", "b/fft": "b/fft"}


PROTOCOL = {"task": "nll:f", "dtype": "float32", "n": 3, "data": {"sha256": "0" * 64}}


@pytest.mark.parametrize(("high", "is_told"), [(0.0, True), (0.1, False)])
def test_an_interval_without_width_is_explained(high: float, is_told: bool) -> None:
    of = {"task": "nll:f", "metric": "accuracy", "low": 0.0, "high": high, "detectable_difference": 0.4, "n": 3}
    scores = [of | {"model": model, "score": 0.0, "protocol": PROTOCOL} for model in ("a", "b")]
    comparison = of | {"from": "a", "to": "b", "difference": 0.0, "p": 1.0, "p_holm": 1.0}
    tables = render_results({"scores": scores, "comparisons": [comparison]}).renderables
    assert ("an interval without width: all items differ alike" in tables[-1].caption) == is_told
    assert "detectable: for one test, before Holm" in tables[-1].caption


@pytest.mark.parametrize(
    ("metric", "detectable", "shown"),
    [("nll", 1.033, "1.0330"), ("accuracy", 0.5, "50.0"), ("accuracy", 1.033, "-"), ("accuracy", None, "-")],
)
def test_units_and_differences_that_cannot_be_are_told(metric: str, detectable: float | None, shown: str) -> None:
    of = {"task": "nll:f", "metric": metric, "low": 0.1, "high": 0.9, "detectable_difference": detectable, "n": 3}
    scores = [of | {"model": model, "score": 0.5, "protocol": PROTOCOL} for model in ("a", "b")]
    comparison = of | {"from": "a", "to": "b", "difference": 0.2, "p": 1.0, "p_holm": 1.0}
    console = Console(width=80)
    with console.capture() as captured:
        console.print(render_results({"scores": scores, "comparisons": [comparison]}))
    cells = [[cell.strip() for cell in line.split("│")] for line in captured.get().splitlines()]
    assert sum(shown in line for line in cells) == 3
    assert ("accuracy, %" in captured.get()) == (metric == "accuracy")
    assert " ".join(captured.get().split()).count("-: none, with so few items") == (2 if shown == "-" else 0)


@pytest.mark.parametrize(
    ("test", "p", "shown"),
    [
        ("sign flips by problem", 0.0002, ["<= 0.0002", "<= 0.0006"]),
        ("sign flips by problem", 0.0004, ["0.0004", "0.0012"]),
        ("McNemar, exact", 0.0002, ["0.0002", "0.0006"]),
    ],
)
def test_a_p_value_that_more_draws_could_lower_is_a_bound(test: str, p: float, shown: list[str]) -> None:
    of = {"task": "t", "metric": "nll", "low": 0.1, "high": 0.9, "detectable_difference": 0.1, "n": 30, "test": test}
    comparison = of | {"from": "a", "to": "b", "difference": 0.5, "p": p, "p_holm": 3 * p}
    scores = [of | {"model": model, "score": 0.5, "protocol": PROTOCOL} for model in ("a", "b")]
    table = render_results({"scores": scores, "comparisons": [comparison]}).renderables[-1]
    assert [cell for column in table.columns[3:5] for cell in column.cells] == shown
