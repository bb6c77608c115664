"""Masks that leave out as many weights as a learned one, at other places."""

import torch
from torch import Tensor

from maskft.masks import shuffled_mask
from maskft.masks.selection import select_top


def control_masks(kind: str, masks: dict[str, Tensor], weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks to compare a learned one with (arXiv 2503.22764, section 4).

    Args:
        kind: "random" puts the same number of zeros anywhere in all tensors, "shuffled" the same number in each
            tensor, both at random; "magnitude" leaves out the smallest |W| of each tensor, as many as were learned.
        masks: learned masks by module, boolean, (out_features, in_features).
        weights: the masked weights by module, of the same shapes.
        seed: of the random places.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        flat = shuffled_mask(torch.cat([mask.reshape(-1) for mask in masks.values()]), generator)
        parts = flat.split([mask.numel() for mask in masks.values()])
        return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}
    if kind == "shuffled":
        return {name: shuffled_mask(mask, generator) for name, mask in masks.items()}
    return {name: select_top([weights[name]], int(mask.sum()), "abs")[0] for name, mask in masks.items()}
