"""Masks that learn nothing: what a learned one has to be compared with (arXiv 2503.22764, section 4)."""

import torch
from torch import Tensor

from maskft.masks.selection import num_kept, select


def random_mask(shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """A boolean mask of `shape` that keeps exactly `num_kept` weights, drawn uniformly without replacement."""
    num_weights = shape[0] * shape[1]
    mask = torch.zeros(num_weights, dtype=torch.bool)
    mask[torch.randperm(num_weights, generator=generator)[: num_kept(num_weights, density)]] = True
    return mask.view(shape)


def magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """A boolean mask of the shape of `weight` that keeps its largest absolute values, element by element."""
    return select([weight], selection="topk", density=density, score_transform="abs")[0]


def shuffled_mask(mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of the places of `mask` (boolean, any shape): the same count kept, elsewhere."""
    flat = mask.reshape(-1)
    return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)].view(mask.shape)
