"""Going on with FSDP2 where a run had none, and the reverse: Transformers' checkpoints of the two differ.

Under FSDP2 the trained values lie in a file of their own, and the optimizer's state goes by names; without it the
adapter's file holds the values, and the state goes by numbers. Both are whole, whatever number of processes wrote them.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType
from transformers import Trainer

from maskft.checkpoints.adapter import WEIGHTS_FILE
from maskft.checkpoints.files import atomic_file, disk_errors
from maskft.errors import MaskftError
from maskft.training.resume import complete_checkpoints
from maskft.tuner.model import SCORES_KEY

logger = logging.getLogger(__name__)

_PLAIN_OPTIMIZER, _FSDP_OPTIMIZER = "optimizer.pt", "optimizer.bin"
_FSDP_VALUES = f"{FSDP_MODEL_NAME}.bin"


def require_whole_checkpoints(trainer: Trainer) -> None:
    """Refuse FSDP settings under which a checkpoint holds no adapter and no model, but each process's part alone.

    Raises:
        MaskftError: the state dict's type is not FULL_STATE_DICT.
    """
    if not trainer.is_fsdp_enabled:
        return
    kind = StateDictType(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if kind != StateDictType.FULL_STATE_DICT:
        raise MaskftError(
            f"FSDP is set to save {kind.name}, of which no adapter and no model can be read; set "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's configuration."
        )


def fit_checkpoints(trainer: Trainer, checkpoint: Path) -> None:
    """Rewrite the complete checkpoints beside `checkpoint`, and itself, for the engine that `trainer` goes on with.

    Every process calls it; the first one writes. Nothing happens to checkpoints that fit.

    Raises:
        MaskftError: they do not fit and are those of a whole model, or the disk refuses.
    """
    to_fsdp = bool(trainer.is_fsdp_enabled)
    others = [p for p in complete_checkpoints(checkpoint.parent) if (p / _FSDP_VALUES).exists() != to_fsdp]
    if checkpoint in others and not (checkpoint / WEIGHTS_FILE).exists():
        raise MaskftError(
            f"{checkpoint} was written {'without' if to_fsdp else 'under'} FSDP, and a whole model's training goes on "
            f"only in the same way; start it {'without FSDP' if to_fsdp else 'with accelerate and its FSDP settings'}."
        )
    if trainer.is_world_process_zero():
        names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        for other in others:
            logger.warning("Rewriting %s, which was written %s FSDP.", other, "without" if to_fsdp else "under")
            with disk_errors(f"rewrite {other}"):
                (_to_fsdp if to_fsdp else _from_fsdp)(other, names)
    trainer.accelerator.wait_for_everyone()


def check_values(checkpoint: Path) -> None:
    """Read back what FSDP2 goes on from, where a checkpoint has that: it has to be the scores of the adapter's file.

    Raises:
        MaskftError: it is not.
    """
    if not (checkpoint / _FSDP_VALUES).exists():
        return
    values = torch.load(checkpoint / _FSDP_VALUES, map_location="cpu", weights_only=True, mmap=True)
    found = {name.rpartition(".")[0]: value for name, value in values.items()}
    scores = {name: score for name, score in load_file(checkpoint / WEIGHTS_FILE).items() if name.endswith(SCORES_KEY)}
    if found.keys() != scores.keys() or not all(torch.equal(found[name], scores[name]) for name in scores):
        raise MaskftError(
            f"{checkpoint / _FSDP_VALUES} was read back after it was saved, and does not hold the scores that are in "
            f"{WEIGHTS_FILE}: the disk is faulty, or parts of split scores are missing; the checkpoints before it are "
            "as they were."
        )


def _to_fsdp(checkpoint: Path, names: Sequence[str]) -> None:
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    _save({name: tensors[name.rpartition(".")[0]] for name in names}, checkpoint / _FSDP_VALUES)
    state = _load(checkpoint / _PLAIN_OPTIMIZER)
    _save(_renamed(state, dict(enumerate(names))), checkpoint / _FSDP_OPTIMIZER)
    (checkpoint / _PLAIN_OPTIMIZER).unlink()


def _from_fsdp(checkpoint: Path, names: Sequence[str]) -> None:
    state = _load(checkpoint / _FSDP_OPTIMIZER)
    _save(_renamed(state, {name: i for i, name in enumerate(names)}), checkpoint / _PLAIN_OPTIMIZER)
    # The values last: without that file it is a checkpoint of this kind.
    (checkpoint / _FSDP_OPTIMIZER).unlink()
    (checkpoint / _FSDP_VALUES).unlink()


def _renamed(optimizer: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer whose parameters are known by other names or numbers."""
    # Numbers count the parameters in their order in the groups.
    groups = [g | {"params": sorted(names[name] for name in g["params"])} for g in optimizer["param_groups"]]
    return {"state": {names[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _save(content: Mapping[Any, Any], path: Path) -> None:
    with atomic_file(path) as file:
        torch.save(content, file)
