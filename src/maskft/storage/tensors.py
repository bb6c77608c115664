"""What an adapter's file holds, by the modules it is for."""

import torch
from torch import Tensor

from maskft.errors import MaskftError
from maskft.masks import check_packed
from maskft.storage.coding import decode_masks

MASK_KEY = "maskft_mask"
SCORES_KEY = "maskft_scores"
CODED_KEY = "maskft_coded"
PEFT_PREFIX = "base_model.model."


def masks_and_scores(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Packed masks and scores (empty where the file has none) by module, checked against the modules they are for.

    Args:
        tensors: as in the file: `<module>.maskft_mask`, or `<module>.maskft_coded` where it is compressed, and perhaps
            `<module>.maskft_scores`.
        shapes: (out_features, in_features) of each masked module.

    Raises:
        MaskftError: missing or unexpected tensors, or one of the wrong shape or dtype.
    """
    masks: dict[str, Tensor] = {}
    coded: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    of = {MASK_KEY: masks, CODED_KEY: coded, SCORES_KEY: scores}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if kind in of:
            of[kind][name] = value
    masks |= decode_masks({name: each for name, each in coded.items() if name in shapes}, shapes)
    if missing := sorted(shapes.keys() - masks.keys()):
        raise MaskftError(
            f"The adapter's file has no mask for {len(missing)} of {len(shapes)} modules, the first is `{missing[0]}`; "
            "it is damaged or was made for other `target_modules` or layers."
        )
    if unexpected := sorted((masks.keys() | coded.keys()) - shapes.keys()):
        raise MaskftError(
            f"The adapter's file has masks for {len(unexpected)} modules that are not to be masked here, the first is "
            f"`{unexpected[0]}`; it was made for another model, other `target_modules` or other layers."
        )
    for name, mask in masks.items():
        check_packed(mask, shapes[name], name)
    for name, value in scores.items():
        if value.dtype != torch.float32 or tuple(value.shape) != shapes.get(name):
            raise MaskftError(f"The scores of `{name}` do not fit its weight; the checkpoint is damaged.")
    if scores and len(scores) != len(masks):
        raise MaskftError(f"The checkpoint has scores for {len(scores)} of {len(masks)} modules; it is damaged.")
    return masks, scores
