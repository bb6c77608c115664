import pytest

from maskft.evaluation.table import render_results, short_names


def test_models_go_by_their_last_parts_where_these_differ() -> None:
    short = {"/a/fft": "fft", "/a/fft+/b/mask": "fft+mask", "org/base": "base"}
    assert short_names(list(short)) == short
    assert short_names(["a/fft", "b/fft"]) == {"a/fft": "a/fft", "b/fft": "b/fft"}


PROTOCOL = {"task": "nll:f", "dtype": "float32", "n": 3, "data": {"sha256": "0" * 64}}


def results(**given) -> dict:
    """Two models and their difference."""
    of = {"task": "nll:f", "metric": "acc,none", "is_share": True, "low": 0.1, "high": 0.9, "n": 30}
    of |= {"detectable_difference": 0.4} | given
    scores = [of | {"model": model, "score": 0.5, "protocol": PROTOCOL} for model in ("a", "b")]
    comparison = {"from": "a", "to": "b", "difference": 0.5, "p": 1.0, "p_holm": 1.0} | of
    return {"scores": scores, "comparisons": [comparison]}


def cells(table) -> list[list[str]]:
    return [list(column) for column in zip(*table.rows, strict=True)]


@pytest.mark.parametrize(("high", "is_told"), [(0.1, True), (0.2, False)])
def test_an_interval_without_width_is_explained(high: float, is_told: bool) -> None:
    tables = render_results(results(high=high))
    assert ("an interval without width: all items differ alike" in tables[-1].caption) == is_told
    assert "detectable: for one test, before Holm" in tables[-1].caption


@pytest.mark.parametrize(
    ("is_share", "detectable", "shown"),
    [(False, 1.033, "1.0330"), (True, 0.5, "50.0"), (True, 1.033, "-"), (True, None, "-")],
)
def test_units_and_differences_that_cannot_be_are_told(is_share: bool, detectable: float | None, shown: str) -> None:
    group = render_results(results(is_share=is_share, detectable_difference=detectable))
    assert [cells(table)[-2] for table in group] == [[shown] * 2, [shown]]
    assert (cells(group[0])[1][0] == "acc, %") == is_share
    assert (
        cells(render_results(results(metric="word_perplexity,none", is_share=False))[0])[1][0]
        == "word_perplexity, nats"
    )
    assert cells(group[-1])[2] == ["+50.0 [+10.0, +90.0]" if is_share else "+0.5000 [+0.1000, +0.9000]"]
    assert sum(table.caption.count("-: none, with so few items") for table in group) == (2 if shown == "-" else 0)


def test_parts_of_a_group_and_what_cannot_be_compared() -> None:
    whole = results()
    part = [row | {"is_part": True, "task": "t"} for row in whole["scores"]]
    tables = render_results({"scores": whole["scores"] + part, "comparisons": []})
    assert [table.title for table in tables] == ["nll:f"]
    refused = {key: whole["comparisons"][0][key] for key in ("task", "metric", "is_share", "from", "to", "n")}
    group = render_results(whole | {"comparisons": [refused | {"not_compared": "another tokenizer"}]})
    assert cells(group[-1])[2] == ["another tokenizer"]


@pytest.mark.parametrize(
    ("test", "p", "bound"),
    [("sign flips by problem", 0.0002, "<= "), ("sign flips by problem", 0.0004, ""), ("McNemar, exact", 0.0002, "")],
)
def test_a_p_value_that_more_draws_could_lower_is_a_bound(test: str, p: float, bound: str) -> None:
    table = render_results(results(test=test, p=p, p_holm=3 * p))[-1]
    assert cells(table)[3:5] == [[f"{bound}{p:.4f}"], [f"{bound}{3 * p:.4f}"]]
