"""Values that a user wrote, in YAML or in Python, against the types of the settings they are for."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from maskft.errors import MaskftError, first_line, nearest, short_repr

_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
# What an error of pydantic says is allowed, by its type.
_ALLOWED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "dict_type": "a mapping",
    "json_invalid": "whole characters",
    "list_type": "a list",
    "tuple_type": "a list of {num_parts} values",
    "too_long": "a list of {num_parts} values",
    "missing": "a list of {num_parts} values",
    "greater_than": "above {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "below {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}


def check_values(settings: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings as the types of `hints` have them: a known key each, and a value that its type allows.

    A whole number may be written as 2.0, a number as 1e-4 (text in YAML 1.1); true is no number and 1 not true.

    Args:
        settings: values by key, such as a mapping of a YAML file.
        hints: types by key; pydantic's constraints, such as `Annotated[float, Field(ge=0)]`, are ranges.
        where: what holds the settings, for the message.

    Raises:
        MaskftError: the first key that is unknown, or value that its type does not allow.
    """
    for key in settings:
        if key not in hints:
            raise MaskftError(
                f"{where}: unknown key {short_repr(key)}{nearest(str(key), list(hints))}; correct or remove it."
            )
    return {key: check_value(key, value, hints[key], f"{where}: ") for key, value in settings.items()}


def check_value(name: str, value: Any, hint: Any, where: str = "") -> Any:
    """The value as the type `hint` has it; sets, ranges, paths and NumPy's numbers become what JSON can hold.

    Raises:
        MaskftError: the type does not allow the value; the message names the setting `name`.
    """
    try:
        try:
            return _validated(hint, value)
        except ValidationError:
            return _validated(hint, _numbers(value))
    except ValidationError as error:
        allowed = sorted({_allowed(each, hint) for each in error.errors()}, key=len)
        allowed += ["null"] if type(None) in get_args(hint) else []
        raise MaskftError(f"{where}`{name}` must be {' or '.join(allowed)}, got {short_repr(value)}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        told = f"{where}`{name}` holds what JSON cannot hold ({first_line(error)})"
        raise MaskftError(f"{told}: {short_repr(value)}; write plain values.") from error


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def _validated(hint: Any, value: Any) -> Any:
    # Strict JSON takes a list for a tuple, but neither true for 1 nor text for a number.
    return _adapter(hint).validate_json(json.dumps(value, default=_plain), strict=True)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) else str(value)


def _numbers(value: Any) -> Any:
    """Text such as 1e-4 as the number that YAML 1.2 reads, and whole numbers as integers."""
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _allowed(error: Any, hint: Any) -> str:
    words = _ALLOWED.get(error["type"], error["msg"].removeprefix("Input should be "))
    words = words.format(**error.get("ctx", {}), num_parts=len(get_args(hint)))
    # The location of an error within a list is an index; a branch of a union has a name there.
    is_within = error["type"] != "missing" and any(isinstance(part, int) for part in error["loc"])
    return f"a list of values, each {words}" if is_within else words
