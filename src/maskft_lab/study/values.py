"""Values of a study's file against the types and the ranges of what they set."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from maskft.errors import MaskftError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
_AT_LEAST = {
    "learning_rate": 0,
    "num_train_epochs": 0,
    "weight_decay": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_steps": 0,
    "logging_steps": 0,
    "max_length": 2,
    "r": 1,
    "max_new_tokens": 1,
    "num_train": 1,
    "num_validation": 1,
    "num_test": 1,
    "seed": 0,
}
_AT_MOST = {"lora_dropout": 1}


def check_values(settings: Mapping[str, Any], hints: Mapping[str, Any], place: str) -> None:
    """Refuse a value of a type, or out of a range, that its setting cannot have.

    Args:
        settings: values by their keys.
        hints: the types of the keys; what has another type than a plain one is let through.
        place: where the settings stand, for the message.

    Raises:
        MaskftError: the first such value.
    """
    for key, value in settings.items():
        if key in hints and not _fits(value, hints[key]):
            raise MaskftError(f"{place}: `{key}` must be {_describe(hints[key])}, got {value!r}.")
        if isinstance(value, int | float):
            if value < _AT_LEAST.get(key, value) or value != value:
                raise MaskftError(f"{place}: `{key}` must be at least {_AT_LEAST[key]}, got {value!r}.")
            if value > _AT_MOST.get(key, value):
                raise MaskftError(f"{place}: `{key}` must be at most {_AT_MOST[key]}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if kind is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is type(None):
        return value is None
    if isinstance(value, bool):
        return hint is not int and hint is not float and hint is not str
    if hint is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if hint is float:
        return isinstance(value, int | float)
    kind = kind or hint
    return kind not in _WORDS or isinstance(value, kind)


def _describe(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in parts if part is not type(None)))
    if get_origin(hint) is tuple:
        return f"a list of {len(parts)} values, each {_describe(parts[0])}"
    if get_origin(hint) is list:
        return f"a list of values, each {_describe(parts[0])}"
    return _WORDS.get(get_origin(hint) or hint, "another value")
