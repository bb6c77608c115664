"""Models between one before fine-tuning and the one after it: every change scaled by one number (WiSE-FT).

Wortsman et al., arXiv 2109.01903. It costs no training, so it is the curve that a learned mask has to beat.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

NUM_POINTS = 11


@torch.no_grad()
def scaled_changes(tuned: nn.Module, before: nn.Module, shares: Sequence[float]) -> Iterator[float]:
    """Put the weights `before + share * (tuned - before)` into `tuned`, for one share after another.

    Both models have the same parameters. Those of `tuned` are put back at the end, to the bit, also where the caller
    stops earlier.
    """
    kept = {name: weight.clone() for name, weight in tuned.named_parameters()}
    start = dict(before.named_parameters())
    try:
        for share in shares:
            for name, weight in tuned.named_parameters():
                weight.copy_(torch.lerp(start[name].to(weight), kept[name], share))
            yield share
    finally:
        for name, weight in tuned.named_parameters():
            weight.copy_(kept[name])
