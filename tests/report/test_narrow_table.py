"""Tables for the terminal: whatever the names, every number and interval is whole and inside the width."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from maskft.evaluation.table import render_results
from maskft.report import PageTable, narrow_table, without_empty_columns
from maskft.terminal import PlainConsole

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="=+/"), min_size=1, max_size=120)
NUMBERS = st.floats(-1, 1, allow_nan=False)


def lines(*tables: PageTable, num_keys: int = 1, width: int = 80) -> list[str]:
    console = PlainConsole(width=width)
    with console.capture() as shown:
        for table in tables:
            console.print(narrow_table(table, width, num_keys=num_keys))
    return shown.get().splitlines()


@settings(deadline=None)
@given(
    models=st.lists(NAMES, min_size=2, max_size=3, unique=True),
    task=NAMES,
    metrics=st.lists(NAMES, min_size=1, max_size=2, unique=True),
    estimate=NUMBERS,
    low=NUMBERS,
    high=NUMBERS,
    is_share=st.booleans(),
)
def test_eval_s_tables_fit_80_columns(models, task, metrics, estimate, low, high, is_share) -> None:
    of = {"task": task, "is_share": is_share, "low": low, "high": high, "n": 10**6, "detectable_difference": 0.4}
    protocol = {"task": "nll:f", "dtype": "float32", "n": 3, "data": {"sha256": "0" * 64}}
    rows = [of | {"metric": metric, "model": model} for metric in metrics for model in models]
    pairs = {"from": models[0], "to": models[1], "p": 1e-5, "p_holm": 0.0123, "difference": estimate}
    results = {
        "scores": [row | {"score": estimate, "protocol": protocol} for row in rows],
        "comparisons": [of | pairs | {"metric": metric} for metric in metrics],
    }
    tables = render_results(results)
    shown = lines(*tables, num_keys=2)
    assert all(cell_len(line) <= 80 for line in shown)
    cells = [cell for table in tables for row in table.rows for cell in row[2:]]
    for cell in cells:
        for part in cell.replace(" [", "\n[").split("\n"):
            assert any(part in line for line in shown)
    text = "\n".join(shown)
    assert text.count(cells[0][cells[0].index("[") :]) >= len(rows)
    for name in [*models, *metrics]:
        assert name in text.replace("\n", "")


@settings(deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=9, max_size=9), min_size=1, max_size=3))
def test_columns_without_room_stand_below_and_none_is_lost(values) -> None:
    names = [f"a{i}" for i in range(9)]
    rows = [[f"row{n}", *(f"{v:.3f} [{v - 1:.3f}, {v + 1:.3f}]" for v in row)] for n, row in enumerate(values)]
    shown = lines(PageTable(("layer", *names), rows))
    assert max(map(len, shown)) <= 80
    headers = [line.split() for line in shown if line.startswith("layer")]
    assert [name for line in headers for name in line[1:]] == names
    assert [re.sub(r" \[.*", "", cell) for cell in rows[0][1:]] == [
        number for line in shown if line.startswith("row0") for number in line.split()[1:]
    ]


def test_long_names_that_begin_and_end_alike_stay_apart() -> None:
    names = ["a" * 20 + middle + "z" * 60 for middle in "bcd"]
    shown = lines(PageTable(("model", "x"), [(name, "1") for name in names]))
    short = [line.split()[0] for line in shown[1:4]]
    assert len(set(short)) == 3
    joined = "".join(shown)
    assert all(f"{name} = {whole}" in joined for name, whole in zip(short, names, strict=True))


@pytest.mark.parametrize("width", [80, 200])
def test_an_interval_stands_in_one_line_with_its_number_where_there_is_room(width: int) -> None:
    assert "m      1.0 [0.5, 1.5]" in lines(PageTable(("model", "score"), [("m", "1.0 [0.5, 1.5]")]), width=width)


def test_a_table_without_rows_keeps_its_columns() -> None:
    table = PageTable(["method", "n", "p"], [])
    assert without_empty_columns(table) == table
    assert without_empty_columns(PageTable(["method", "n", "p"], [["a", "", "1"]])).header == ["method", "p"]
