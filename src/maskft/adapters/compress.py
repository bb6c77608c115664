"""An adapter written once more, its masks coded to about their entropy."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from maskft.adapters.read import WEIGHTS_FILE, read_adapter
from maskft.errors import MaskftError
from maskft.storage.coding import encode_mask
from maskft.storage.files import PICKLE_SUFFIXES, atomic_folder, disk_errors, require_empty_output, require_own
from maskft.storage.tensors import CODED_KEY, PEFT_PREFIX

_LEFT_OUT = (*PICKLE_SUFFIXES, ".safetensors")


def compress_adapter(adapter_path: str | Path, output_dir: str | Path) -> float:
    """Write an adapter with its masks coded to about their entropy; PEFT and maskft load it like any other.

    Returns:
        Bits of the new file for each bit of the packed masks.

    Raises:
        MaskftError: see :func:`read_adapter`; a training checkpoint, whose scores are not coded; an output folder that
            holds something; a link to a file elsewhere; or constriction is not installed.
    """
    adapter = read_adapter(adapter_path)
    if adapter.score_shapes:
        raise MaskftError(
            f"{adapter_path} is a training checkpoint with scores, which are not compressed; give the finished adapter."
        )
    require_empty_output(output_dir, what="the compressed adapter")
    small = [file for file in sorted(adapter.path.iterdir()) if file.is_file() and file.suffix not in _LEFT_OUT]
    require_own(small, adapter.path)
    coded = {f"{PEFT_PREFIX}{name}.{CODED_KEY}": encode_mask(mask) for name, mask in adapter.masks.items()}
    with disk_errors(f"write {output_dir}"), atomic_folder(output_dir) as folder:
        for file in small:
            shutil.copyfile(file, folder / file.name)
        save_file(coded, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        num_bytes = (folder / WEIGHTS_FILE).stat().st_size
    return num_bytes / sum(mask.numel() for mask in adapter.masks.values())
