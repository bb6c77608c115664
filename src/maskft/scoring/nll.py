"""Held-out negative log-likelihood, item by item, so that two models can be compared on the same items."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from maskft.scoring.temperature import INVERSE_TEMPERATURES, losses_at


@dataclass(frozen=True)
class NllResult:
    """What each item was scored, in the order of the data.

    Attributes:
        sums: sum of NLL in nats, float64, (items,).
        num_tokens: number of scored tokens, int64, (items,).
        right: whether each scored token is the likeliest one, so that greedy decoding writes just this, and there is
            one; bool, (items,).
        sums_at: `sums` with the logits multiplied by each of `INVERSE_TEMPERATURES`, (numbers, items), where asked for.
    """

    sums: np.ndarray[Any, Any]
    num_tokens: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    sums_at: np.ndarray[Any, Any] | None = None

    @property
    def mean(self) -> float:
        """NLL per token over all items, in nats."""
        return float(self.sums.sum() / self.num_tokens.sum())

    def at_best_temperature(self, chosen_by: "NllResult | None" = None) -> tuple[float, np.ndarray[Any, Any]]:
        """The temperature that suits all items of `chosen_by` (default: these) best, and `sums` at it.

        Raises:
            ValueError: items were not scored at other temperatures.
        """
        choosing = (chosen_by or self).sums_at
        if choosing is None or self.sums_at is None:
            raise ValueError("These items were scored at temperature 1 alone; pass at_temperatures=True to token_nll.")
        best = int(choosing.sum(1).argmin())
        return 1 / INVERSE_TEMPERATURES[best], self.sums_at[best]


@torch.no_grad()
def token_nll(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    at_temperatures: bool = False,
) -> NllResult:
    """NLL of the trained tokens of each row.

    Args:
        model: a causal language model; it is scored in evaluation mode and left in the mode it had.
        dataset: tokenised rows with `input_ids` and `labels` (-100 is not scored), as TRL's trainer prepares them.
        batch_size: rows scored at once; rows of like length share a batch.
        at_temperatures: whether rows are scored at `INVERSE_TEMPERATURES` too.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = np.zeros(len(dataset))
    num_tokens = np.zeros(len(dataset), dtype=np.int64)
    right = np.zeros(len(dataset), dtype=np.bool_)
    sums_at = np.zeros((len(INVERSE_TEMPERATURES), len(dataset))) if at_temperatures else None
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = [dataset[i] for i in places]
        longest = max(len(row["input_ids"]) for row in rows)
        ids = _padded([row["input_ids"] for row in rows], longest, 0).to(device)
        labels = _padded([row["labels"] for row in rows], longest, -100).to(device)
        attention = _padded([[1] * len(row["input_ids"]) for row in rows], longest, 0).to(device)
        targets = labels[:, 1:]
        scored = (targets != -100).any(0).nonzero().squeeze(1)
        if len(scored):
            targets = targets[:, scored]
            at = targets != -100
            # Only what is scored goes through the vocabulary, which is most of the work of a small model.
            logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=scored).logits[at].float()
            targets = targets[at]
            losses = F.cross_entropy(logits, targets, reduction="none").double()
            sums[places] = _by_row(losses, at)
            is_wrong = _by_row((logits.argmax(-1) != targets).double(), at) > 0
            right[places] = at.any(1).cpu().numpy() & ~is_wrong
            if sums_at is not None:
                sums_at[:, places] = _by_row(losses_at(logits, targets, INVERSE_TEMPERATURES), at)
        num_tokens[places] = (labels[:, 1:] != -100).sum(1).cpu().numpy()
    model.train(was_training)
    return NllResult(sums, num_tokens, right, sums_at)


def _by_row(values: Tensor, at: Tensor) -> np.ndarray[Any, Any]:
    """Sums by row of values of the places `at`, (rows, length): (..., places) to (..., rows)."""
    spread = torch.zeros((*values.shape[:-1], *at.shape), dtype=torch.float64, device=values.device)
    spread[..., at] = values
    sums: np.ndarray[Any, Any] = spread.sum(-1).cpu().numpy()
    return sums


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
