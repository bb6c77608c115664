"""Checkpoints of FSDP2, of DeepSpeed and of neither, which Transformers writes in forms of their own.

Under FSDP2 the trained values lie in a file of their own, and the optimizer's state goes by names; without it the
adapter's file holds the values, and the state goes by numbers. Both are whole, whatever number of processes wrote them.
DeepSpeed writes each process's part. None reads the form of another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_available

from maskft.adapters.read import WEIGHTS_FILE
from maskft.errors import MaskftError
from maskft.storage.tensors import SCORES_KEY

_FSDP_VALUES = f"{FSDP_MODEL_NAME}.bin"
_ZERO_PARTS = "global_step*/*zero_pp_rank_*_optim_states.pt"


def require_deepspeed(settings: str | dict[str, Any] | None, *, has_gpu: bool) -> None:
    """Refuse DeepSpeed where it is not installed, or, set by Transformers, would let each process train alone."""
    if not is_deepspeed_available():
        raise MaskftError("DeepSpeed is set but not installed: pip install deepspeed (DS_BUILD_OPS=0 without a GPU).")
    if settings and not has_gpu:
        launch = "accelerate launch --config_file examples/accelerate/zero3.yaml"
        raise MaskftError(f"Transformers starts --deepspeed on GPUs alone; on CPUs use {launch}.")


def check_deepspeed(config: Mapping[str, Any], in_half: bool) -> None:
    """Refuse settings of DeepSpeed that round scores, as the trainer's own do `in_half`, or leave no mask to read."""
    zero = config.get("zero_optimization", {})
    if in_half or any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")):
        raise MaskftError('bf16 and fp16 of DeepSpeed round the scores; give --bf16 False, and "auto" in its file.')
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise MaskftError("DeepSpeed is set to keep parameters on a disk, where no mask is chosen; use cpu or none.")
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise MaskftError(
            "Under ZeRO-3 a checkpoint holds no adapter unless `stage3_gather_16bit_weights_on_model_save` "
            "(zero3_save_16bit_model in accelerate's configuration) is true; set it."
        )


def require_whole_checkpoints(trainer: Trainer) -> None:
    """Refuse FSDP settings under which a checkpoint holds no adapter and no model, but each process's part alone."""
    if trainer.is_fsdp_enabled:
        kind = StateDictType(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        if kind != StateDictType.FULL_STATE_DICT:
            wanted = "set `fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's configuration"
            raise MaskftError(f"FSDP is set to save {kind.name}, of which no adapter can be read; {wanted}.")


def require_same_engine(trainer: Trainer, checkpoint: Path) -> None:
    """Refuse a checkpoint of another engine than the trainer's, or of DeepSpeed with another number of processes."""
    num_parts, num_processes = len(list(checkpoint.glob(_ZERO_PARTS))), trainer.args.world_size
    written_by = _engine(num_parts > 0, (checkpoint / _FSDP_VALUES).exists())
    engine = _engine(trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled)
    if written_by != engine:
        raise MaskftError(
            f"{checkpoint} was written {written_by}, and training would go on {engine}, which reads another form; "
            f"start it {written_by}, or anew in another --output_dir."
        )
    if num_parts and num_parts != num_processes:
        raise MaskftError(
            f"{checkpoint} was written by {num_parts} processes under DeepSpeed, which reads it with as many only, and "
            f"there are {num_processes}."
        )


def _engine(has_deepspeed: bool, has_fsdp: bool) -> str:
    if has_deepspeed:
        return "under DeepSpeed"
    return "under FSDP" if has_fsdp else "without FSDP and DeepSpeed"


def check_values(checkpoint: Path) -> None:
    """Read back what FSDP2 goes on from, where a checkpoint has that, and refuse other scores than the adapter's."""
    path = checkpoint / _FSDP_VALUES
    if not path.exists():
        return
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    saved = {name.rpartition(".")[0]: value for name, value in values.items()}
    scores = {name: value for name, value in load_file(checkpoint / WEIGHTS_FILE).items() if name.endswith(SCORES_KEY)}
    if saved.keys() != scores.keys() or not all(torch.equal(saved[name], scores[name]) for name in scores):
        raise MaskftError(
            f"{path} was read back after it was saved, and does not hold the scores of {WEIGHTS_FILE}: the disk is "
            "faulty, or parts of split scores are missing; the checkpoints before it are as they were."
        )
