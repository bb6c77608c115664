"""YAML files that a user wrote."""

from pathlib import Path
from typing import Any

import yaml

from maskft.errors import MaskftError, first_line

_MAX_BYTES = 1_000_000
# Values of a file, each alias counted as what it stands for: a few lines of them can stand for billions.
_MAX_VALUES = 100_000
_MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML's own loader would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                first = lines.setdefault((key.tag, key.value), line)
                if first != line:
                    raise yaml.YAMLError(f"the key {key.value!r} stands in line {first} and in line {line}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file; `what` names the file in messages.

    Raises:
        MaskftError: it cannot be read, or is no YAML; a key that stands twice; more than 1 MB, 100,000 values or 64
            levels, with what aliases stand for.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise MaskftError(f"{path} is larger than 1 MB, which no settings are; give another file.")
        _measure(yaml.compose(text, yaml.SafeLoader), {})
        return yaml.load(text, _Loader)
    except MaskftError:
        raise
    except OSError as error:
        raise MaskftError(f"{what} cannot be read: {path} ({error.strerror}).") from error
    except Exception as error:  # the loader raises any kind on the texts of YAML's own types
        raise MaskftError(f"{path} is no YAML: {first_line(error)}.") from error


def _measure(node: yaml.Node | None, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are; ValueError for more than are read."""
    if not isinstance(node, yaml.CollectionNode):
        return 1, 1
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES, _MAX_DEPTH  # what a value that holds itself comes to
        parts = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
        sizes, depths = zip((0, 0), *(_measure(part, known) for part in parts), strict=True)
        size, depth = known[id(node)] = 1 + sum(sizes), 1 + max(depths)
        if size > _MAX_VALUES or depth > _MAX_DEPTH:
            raise ValueError(f"it holds more than {_MAX_VALUES} values or {_MAX_DEPTH} levels")
    return known[id(node)]
