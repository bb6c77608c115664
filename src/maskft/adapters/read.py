"""Reading a saved adapter: everything is checked before anything is loaded, and no pickle is ever opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from maskft.adapters.model_layout import layer_shapes
from maskft.errors import MaskftError, first_line, short_repr
from maskft.masks import pack_mask, select
from maskft.storage.coding import decode_masks
from maskft.storage.files import PICKLE_SUFFIXES
from maskft.storage.fingerprint import fingerprint
from maskft.storage.json_text import read_object
from maskft.storage.tensors import CODED_KEY, MASK_KEY, PEFT_PREFIX, SCORES_KEY
from maskft.tuner import MaskConfig
from maskft.tuner.registration import MASKFT

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_AGAIN = "save or download the adapter again"


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, by the names of modules.

    Masks are packed: uint8, (out_features, ceil(in_features / 8)). Scores have (out_features, in_features), and only a
    training checkpoint has them.
    """

    path: Path
    config: MaskConfig
    masks: dict[str, Tensor]
    score_shapes: dict[str, tuple[int, int]]


def read_adapter(path: str | Path, base: str | Path | None = None) -> Adapter:
    """Read an adapter's folder: its settings and its masks, not its scores.

    Args:
        path: the folder.
        base: the base model; where its folder is here, compressed masks have to have its layers' shapes. Default: the
            one that the adapter names.

    Raises:
        MaskftError: the folder or a file is missing, is not one of an adapter of ours, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise MaskftError(f"The adapter {path} is not a folder here; give the folder that holds {CONFIG_FILE}.")
    config = _read_config(path)
    masks, score_shapes = _read_tensors(path, base or config.base_model_name_or_path)
    if config.mask_digest != fingerprint(masks):
        raise MaskftError(
            f"The adapter {path} is damaged: its masks have the digest {fingerprint(masks)}, its {CONFIG_FILE} says "
            f"{config.mask_digest}; save or download it again."
        )
    return Adapter(path, config, masks, score_shapes)


def check_saved(path: str | Path, masks: dict[str, Tensor]) -> None:
    """Read an adapter back that was just saved: it has to hold these packed masks, and scores that choose them.

    Raises:
        MaskftError: it holds something else, or see :func:`read_adapter`.
    """
    adapter = read_adapter(path)
    wrong = _differing(masks, adapter.masks)
    if not wrong and adapter.score_shapes:
        # Training goes on from the scores: those of all processes have to be there.
        with safe_open(Path(path) / WEIGHTS_FILE, framework="pt") as file:
            scores = [file.get_tensor(f"{PEFT_PREFIX}{name}.{SCORES_KEY}") for name in masks]
        chosen = select(scores, **adapter.config.selection_settings())
        wrong = _differing(masks, {name: pack_mask(mask) for name, mask in zip(masks, chosen, strict=True)})
    if wrong:
        raise MaskftError(
            f"{path} was read back after it was saved, and does not hold what is in memory ({len(wrong)} of "
            f"{len(masks)} masks, the first is `{wrong[0]}`): the disk is faulty, or parts of split scores are "
            "missing; the checkpoints before it are as they were."
        )


def load_scores(model: PeftModel, checkpoint: str | Path) -> None:
    """Put the scores of a training checkpoint into the adapter "default" of `model`, which may mask other weights.

    Raises:
        MaskftError: the checkpoint has no scores, or those of other modules or shapes.
    """
    set_peft_model_state_dict(model, load_file(Path(checkpoint) / WEIGHTS_FILE))


def _differing(masks: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    names = sorted(masks.keys() | found.keys())
    return [n for n in names if n not in masks or n not in found or not torch.equal(masks[n].cpu(), found[n].cpu())]


def _read_config(path: Path) -> MaskConfig:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise MaskftError(f"The folder {path} has no {CONFIG_FILE}, so it is not an adapter; give another one.")
    settings = read_object(file, _AGAIN)
    peft_type = settings.get("peft_type")
    if peft_type != MASKFT.value:
        raise MaskftError(
            f"The adapter {path} has peft_type {short_repr(peft_type)}, not {MASKFT.value!r}: it is not a mask; "
            "load it with PEFT."
        )
    try:
        return MaskConfig.from_peft_type(**settings)  # warns of keys that it leaves out, which a newer version wrote
    except MaskftError as error:
        raise MaskftError(f"{file}: {error}") from error
    except Exception as error:  # PEFT's own checks raise several kinds
        raise MaskftError(f"{file} cannot be used ({first_line(error)}); {_AGAIN}.") from error


def _read_tensors(path: Path, base: str | Path | None) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLE_SUFFIXES)
        held = f" but {pickles[0]}, a pickle, which can run code when it is read and is refused" if pickles else ""
        raise MaskftError(f"The adapter {path} has no {WEIGHTS_FILE}{held}; save or download it again, as safetensors.")
    by_kind: dict[str, dict[str, Any]] = {MASK_KEY: {}, CODED_KEY: {}, SCORES_KEY: {}}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 -- not a mapping
                module, _, kind = key.removeprefix(PEFT_PREFIX).rpartition(".")
                if kind not in by_kind:
                    raise MaskftError(
                        f"{file} holds {key!r}, which is neither a mask nor the scores of one; it is not an adapter "
                        "of maskft."
                    )
                by_kind[kind][module] = (
                    tuple(tensors.get_slice(key).get_shape()) if kind == SCORES_KEY else tensors.get_tensor(key)
                )
    except SafetensorError as error:
        raise MaskftError(f"{file} is damaged or cut short ({error}); save or download the adapter again.") from error
    masks, coded, score_shapes = by_kind.values()
    if not masks and not coded:
        raise MaskftError(f"{file} holds no masks; {_AGAIN}.")
    for name, mask in masks.items():
        if mask.dtype != torch.uint8 or mask.dim() != 2 or not mask.numel():
            raise MaskftError(
                f"The mask of `{name}` in {file} must be uint8 with 2 dimensions of at least 1, but is {mask.dtype} of "
                f"the shape {tuple(mask.shape)}; the file is damaged."
            )
    for name, shape in score_shapes.items():
        if len(shape) != 2 or not all(shape):
            raise MaskftError(f"The scores of `{name}` in {file} have the shape {shape}; the file is damaged.")
    if coded:
        masks |= decode_masks(coded, layer_shapes(base, coded))
    return masks, score_shapes
