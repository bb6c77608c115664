"""YAML files that a user wrote."""

from pathlib import Path
from typing import Any

import yaml

from maskft.errors import MaskftError


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


def read_yaml(path: Path, what: str, loader: type[yaml.BaseLoader | yaml.SafeLoader] = _Loader) -> Any:
    """The content of a YAML file; `what` names the file in messages, and yaml.BaseLoader reads all values as texts.

    Raises:
        MaskftError: it cannot be read, or is no YAML; a key that stands twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader)
    except OSError as error:
        raise MaskftError(f"{what} cannot be read: {path} ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError) as error:
        raise MaskftError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
