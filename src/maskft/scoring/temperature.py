"""Losses of logits divided by a temperature, by which a model that is merely less sure of itself can be told.

A fine-tuned model is too sure of its answers; dividing its logits by one number mends that and changes no likeliest
answer (Guo et al., arXiv 1706.04599). A mask that does the same lowers the loss and answers no better.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INVERSE_TEMPERATURES = (0.2, *(round(0.4 + 0.025 * i, 3) for i in range(33)), 1.4, 1.6, 1.8, 2.0)
"""What logits are multiplied by where the best temperature is looked for, ascending; 1 is among them.

They are dense from 0.4 to 1.2, where fine-tuned models lie; the ends stand for all beyond them. All are tried in the
pass that scores the rows, for the logits cannot be kept.
"""


def temperature_text(temperature: float, digits: int = 2) -> str:
    """A temperature found among `INVERSE_TEMPERATURES` as text, which says "at most" or "at least" at their ends."""
    ends = {"at least ": INVERSE_TEMPERATURES[0], "at most ": INVERSE_TEMPERATURES[-1]}
    bound = next((text for text, end in ends.items() if math.isclose(end * temperature, 1, rel_tol=1e-6)), "")
    return f"{bound}{temperature:.{digits}f}"


def losses_at(logits: Tensor, targets: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
    """NLL of tokens with their logits multiplied by each of some numbers, in nats, float64, (numbers, tokens).

    Args:
        logits: (tokens, vocabulary), float32.
        targets: (tokens,), int64.
    """
    losses = []
    # Few rows stay in a CPU's cache over all numbers, which is four times as fast.
    for part, chosen in zip(
        *(tensor.split(1024 if logits.is_cuda else 16) for tensor in (logits, targets)), strict=True
    ):
        below = part - part.amax(-1, keepdim=True)
        at = below.gather(-1, chosen[:, None]).squeeze(-1).double()
        losses.append(torch.stack([(below * b).exp_().sum(-1).log() - b * at for b in inverse_temperatures]))
    return torch.cat(losses, dim=1)
