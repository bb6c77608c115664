"""What several runs in one folder read: rows and weights, which must be the same when it is started again."""

import json
from pathlib import Path

from datasets import Dataset

from maskft.adapters.model_files import weights_hash
from maskft.data.rows import data_hash, token_hash
from maskft.errors import MaskftError
from maskft.storage.files import atomic_write_text
from maskft.storage.json_text import read_object

INPUTS = "inputs.json"


def hash_inputs(rows: dict[str, Dataset], *models: str) -> dict[str, str]:
    """A hash of the rows of each split and of the weights of each model, by what they are called in messages."""
    hashes = {f"{split} rows": data_hash(of) for split, of in rows.items()}
    hashes |= {
        f"tokens of the {split} rows": token_hash(of) for split, of in rows.items() if "labels" in of.column_names
    }
    return hashes | {f"weights of {model}": weights_hash(model) for model in models}


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Refuse to go on in a folder that was begun with other rows or weights; only what both name is compared.

    Raises:
        MaskftError: the folder notes other hashes than `inputs`; the message names what has changed.
    """
    path = folder / INPUTS
    held = read_object(path, "delete the folder it lies in") if path.exists() else {}
    changed = [name for name, value in inputs.items() if held.get(name, value) != value]
    # Tokens of other rows are others; of the same rows they are those of another chat template, or of another day.
    changed = [name for name in changed if not ("tokens" in name and name.removeprefix("tokens of the ") in changed)]
    if changed:
        raise MaskftError(
            f"{folder} was begun with other {' and '.join(changed)} than there are now; restore them, give another "
            "--output_dir, or delete that folder."
        )


def note_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Write the hashes that the next start compares, where the folder has none yet."""
    if not (folder / INPUTS).exists():
        atomic_write_text(folder / INPUTS, json.dumps(inputs, indent=1) + "\n")
