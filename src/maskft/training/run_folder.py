"""Commands of several runs in one folder, which go on where they were killed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from maskft.data.inputs import check_inputs, note_inputs
from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_text, require_empty_output
from maskft.storage.json_text import plain
from maskft.training.arguments import TrainingSettings

SETTINGS = "settings.json"


def claim_folder(output_dir: Path, settings: dict[str, Any], inputs: dict[str, str], what: str) -> None:
    """Take a new folder, or go on in one that was begun with the same settings, rows and weights.

    Args:
        inputs: hashes of the rows and weights, as :func:`maskft.data.inputs.hash_inputs` gives them.

    Raises:
        MaskftError: the folder holds something else, or `what` with others of them.
    """
    check_inputs(output_dir, inputs)
    text = json.dumps(settings, indent=1, default=str) + "\n"
    path = output_dir / SETTINGS
    if not path.exists():
        require_empty_output(output_dir, what=f"the {what}")
        output_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    elif path.read_text() != text:
        raise MaskftError(f"{output_dir} holds a {what} with other settings ({path.name}); give another --output_dir.")
    note_inputs(output_dir, inputs)


def training_flags(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that differ from their defaults, by their flags: those that make them again.

    Where to go on from is not among them: each stage goes on where it was.
    """
    defaults = TrainingSettings(output_dir=str(settings.output_dir)).to_dict()
    if settings.metric_for_best_model != defaults["metric_for_best_model"]:
        del defaults["greater_is_better"]  # its default follows from the metric
    found = {
        key: value
        for key, value in settings.to_dict().items()
        if key in TrainingSettings.__dataclass_fields__
        and TrainingSettings.__dataclass_fields__[key].init
        and key != "resume_from_checkpoint"
        and (key not in defaults or value != defaults[key])
    }
    return plain(found)


def other_flags(*arguments: Any) -> dict[str, Any]:
    """The fields of dataclasses that differ from their defaults; whether to write over a folder is not among them."""
    return plain(
        {
            f.name: getattr(given, f.name)
            for given in arguments
            for f in dataclasses.fields(given)
            if getattr(given, f.name) != f.default and f.name != "overwrite_output_dir"
        }
    )
