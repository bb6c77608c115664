"""YAML files that a user wrote."""

from pathlib import Path
from typing import Any

import yaml

from maskft.errors import MaskftError


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file; `what` names the file in messages.

    Raises:
        MaskftError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise MaskftError(f"{what} cannot be read: {path} ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MaskftError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
