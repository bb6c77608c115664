"""Masks that learn nothing: what a learned one has to be compared with (arXiv 2503.22764, section 4)."""

import torch
from torch import Tensor


def shuffled_mask(mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation of `mask` (boolean, any shape): the same count kept, elsewhere."""
    flat = mask.reshape(-1)
    return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)].view(mask.shape)
