import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from maskft.errors import MaskftError, nearest
from maskft.values import check_value, check_values

INDICES = list[int] | int | None


@pytest.mark.parametrize(
    ("hint", "given", "expected"),
    [
        (int, 2.0, 2),
        (int, np.int64(4), 4),
        (float, 3, 3.0),
        (float, "1e-4", 1e-4),
        (float, math.inf, math.inf),
        (float, np.float32(0.5), 0.5),
        (str, "1e4", "1e4"),
        (str, Path("a"), "a"),
        (str | float, "1e-4", "1e-4"),
        (bool, True, True),
        (tuple[int, int], [2, 3], (2, 3)),
        (list[int], [1.0, 2], [1, 2]),
        (INDICES, {3, 1}, [1, 3]),
        (INDICES, range(3), [0, 1, 2]),
        (INDICES, None, None),
        (dict[str, Any], {"a": [1]}, {"a": [1]}),
    ],
)
def test_a_value_becomes_what_its_type_says(hint: Any, given: Any, expected: Any) -> None:
    result = check_value("k", given, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("hint", "given", "allowed"),
    [
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (int, "5", "a whole number"),
        (float, True, "a number"),
        (float, "fast", "a number"),
        (str, 3, "text"),
        (bool, 1, "true or false"),
        (bool, "no", "true or false"),
        (int | None, [64], "a whole number or null"),
        (list[str] | None, "q", "a list or null"),
        (INDICES, ["a"], "a whole number or a list of values, each a whole number or null"),
        (dict[str, Any], 3, "a mapping"),
        *((tuple[int, int], value, "a list of 2 values") for value in (2, [1], [1, 2, 3])),
        (tuple[int, int], ["a", 1], "a list of values, each a whole number"),
        (Literal["a", "b"], "c", "'a' or 'b'"),
        *((Annotated[float, Field(ge=0)], value, "at least 0") for value in (-1, math.nan)),
        (Annotated[float, Field(gt=0, lt=1)], 0, "above 0"),
        (Annotated[float, Field(gt=0, lt=1)], 1.0, "below 1"),
        (Annotated[int, Field(le=3)], 4, "at most 3"),
    ],
)
def test_a_refusal_says_what_is_allowed_and_what_was_given(hint: Any, given: Any, allowed: str) -> None:
    with pytest.raises(MaskftError) as refused:
        check_value("k", given, hint, "f.yaml: ")
    assert str(refused.value) == f"f.yaml: `k` must be {allowed}, got {given!r}."


def test_settings_are_checked_by_key() -> None:
    hints = {"seed": int, "rate": float}
    assert check_values({"seed": 1.0, "rate": "1e-3"}, hints, "f") == {"seed": 1, "rate": 1e-3}
    with pytest.raises(MaskftError, match=r"^f: unknown key 'sed' \(nearest: seed"):
        check_values({"sed": 1}, hints, "f")
    with pytest.raises(MaskftError, match=r"^f: `rate` must be a number, got \[\]\.$"):
        check_values({"rate": []}, hints, "f")


@pytest.mark.parametrize(
    ("name", "first"), [("tt", "two_tailed"), ("sel", "selection"), ("tw", "two_tailed"), ("selektion", "selection")]
)
def test_what_a_word_is_short_for_is_named_first(name: str, first: str) -> None:
    assert nearest(name, ["ttx", "two_tailed", "selection", "sl"]).startswith(f" (nearest: {first}")


def test_no_word_is_short_for_nothing() -> None:
    assert nearest("", ["a", "b"]) == " (known: a, b)"
