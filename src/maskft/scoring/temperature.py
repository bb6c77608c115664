"""Losses of logits divided by a temperature, by which a model that is merely less sure of itself can be told.

A model that was fine-tuned to its best loss is too sure of its answers; dividing its logits by one number mends that
and changes no likeliest answer (Guo et al., arXiv 1706.04599). A mask that does the same lowers the loss and answers no
better.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

INVERSE_TEMPERATURES = (
    0.2,
    *(round(0.4 + 0.025 * i, 3) for i in range(33)),
    *(1.4, 1.6, 1.8, 2.0),
)
"""What logits are multiplied by where the best temperature is looked for, ascending; 1 is among them.

They are dense from 0.4 to 1.2, where fine-tuned models lie. The ends stand for all beyond them, so temperatures are to
be shown with :func:`temperature_text`.
"""

_NUM_ROWS = 256  # so that the copies stay small beside the logits


def temperature_text(temperature: float, digits: int = 2) -> str:
    """A temperature found among `INVERSE_TEMPERATURES` as text, which says "at most" or "at least" at their ends."""
    ends = {"at least ": INVERSE_TEMPERATURES[0], "at most ": INVERSE_TEMPERATURES[-1]}
    bound = next((text for text, end in ends.items() if math.isclose(end * temperature, 1, rel_tol=1e-6)), "")
    return f"{bound}{temperature:.{digits}f}"


def losses_at(logits: Tensor, targets: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    """NLL of tokens with their logits multiplied by each of some numbers.

    Args:
        logits: (tokens, vocabulary), float32.
        targets: (tokens,), int64.
        inverse_temperatures: those evenly spaced cost less.

    Returns:
        Nats, float64, (numbers, tokens).
    """
    parts = zip(logits.split(_NUM_ROWS), targets.split(_NUM_ROWS), strict=True)
    return torch.cat([_losses(*part, inverse_temperatures) for part in parts], dim=1)


def _losses(logits: Tensor, targets: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    below = logits - logits.amax(-1, keepdim=True)
    chosen = below.gather(-1, targets[:, None]).squeeze(-1).double()
    terms, step = (below * inverse_temperatures[0]).exp(), math.nan
    losses = [terms.sum(-1).log() - inverse_temperatures[0] * chosen]
    for before, number in pairwise(inverse_temperatures):
        if not math.isclose(number - before, step, rel_tol=1e-6):
            # e^(z (b + step)) = e^(z b) e^(z step), which is cheaper than another power
            step = number - before
            factors = (below * step).exp_()
        terms *= factors
        losses.append(terms.sum(-1).log() - number * chosen)
    return torch.stack(losses)
