"""Losses of logits divided by a temperature, by which a model that is merely less sure of itself can be told.

A model that was fine-tuned to its best loss is too sure of its answers; dividing its logits by one number mends that
and changes no likeliest answer (Guo et al., arXiv 1706.04599). A mask that does the same lowers the loss and answers no
better.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

INVERSE_TEMPERATURES = tuple(round(0.4 + 0.025 * i, 3) for i in range(33))
"""What logits are multiplied by where the best temperature is looked for; 1 is among them."""

_NUM_ROWS = 256  # so that the copies stay small beside the logits


def losses_at(logits: Tensor, targets: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    """NLL of tokens with their logits multiplied by each of some numbers.

    Args:
        logits: (tokens, vocabulary), float32.
        targets: (tokens,), int64.
        inverse_temperatures: evenly spaced.

    Returns:
        Nats, float64, (numbers, tokens).
    """
    parts = zip(logits.split(_NUM_ROWS), targets.split(_NUM_ROWS), strict=True)
    return torch.cat([_losses(*part, inverse_temperatures) for part in parts], dim=1)


def _losses(logits: Tensor, targets: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    below = logits - logits.amax(-1, keepdim=True)
    chosen = below.gather(-1, targets[:, None]).squeeze(-1).double()
    terms, factors = (below * inverse_temperatures[0]).exp(), None
    losses = [terms.sum(-1).log() - inverse_temperatures[0] * chosen]
    for before, number in pairwise(inverse_temperatures):
        if factors is None:  # e^(z (b + step)) = e^(z b) e^(z step), which is cheaper than another power
            factors = (below * (number - before)).exp_()
        terms *= factors
        losses.append(terms.sum(-1).log() - number * chosen)
    return torch.stack(losses)
