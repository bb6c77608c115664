"""Held-out negative log-likelihood, item by item, so that two models can be compared on the same items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from maskft.scoring.temperature import INVERSE_TEMPERATURES, losses_at


@dataclass(frozen=True)
class NllResult:
    """What each item was scored, (items,) in the order of the data."""

    sums: np.ndarray[Any, Any]  # of NLL in nats, float64
    num_tokens: np.ndarray[Any, Any]  # that were scored, int64
    right: np.ndarray[Any, Any]  # bool: there are some, and each is the likeliest, so that greedy decoding writes them
    # `sums` with the logits multiplied by each of `INVERSE_TEMPERATURES`, (numbers, items), where asked for.
    sums_at: np.ndarray[Any, Any] | None = None

    @property
    def mean(self) -> float:
        """NLL per token over all items, in nats."""
        return float(self.sums.sum() / self.num_tokens.sum())

    def at_best_temperature(self, chosen_by: "NllResult | None" = None) -> tuple[float, np.ndarray[Any, Any]]:
        """The temperature that suits all items of `chosen_by` (default: these) best, and `sums` at it."""
        choosing = (chosen_by or self).sums_at
        if choosing is None or self.sums_at is None:
            raise ValueError("These items were scored at temperature 1 alone; pass at_temperatures=True to token_nll.")
        best = int(choosing.sum(1).argmin())
        return 1 / INVERSE_TEMPERATURES[best], self.sums_at[best]


@torch.no_grad()
def token_nll(model: nn.Module, dataset: Dataset, *, batch_size: int = 32, at_temperatures: bool = False) -> NllResult:
    """NLL of the trained tokens of each row of `input_ids` and `labels` (-100 is not scored), as TRL prepares them.

    The model is scored in evaluation mode and left in the mode it had; rows of like length share a batch;
    `at_temperatures` has them scored at `INVERSE_TEMPERATURES` too.
    """
    was_training = model.training
    model.eval()
    n = len(dataset)
    sums, num_tokens, right = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    sums_at = np.zeros((len(INVERSE_TEMPERATURES), n)) if at_temperatures else None
    order = sorted(range(n), key=lambda i: len(dataset[i]["input_ids"]))
    for start in range(0, n, batch_size):
        places = order[start : start + batch_size]
        logits, targets, at = scored_logits(model, [dataset[i] for i in places])
        num_tokens[places] = at.sum(1).cpu().numpy()
        if not len(targets):
            continue
        sums[places] = _by_row(F.cross_entropy(logits, targets, reduction="none").double(), at)
        num_wrong = _by_row((logits.argmax(-1) != targets).double(), at)
        right[places] = (num_tokens[places] > 0) & (num_wrong == 0)
        if sums_at is not None:
            sums_at[:, places] = _by_row(losses_at(logits, targets, INVERSE_TEMPERATURES), at)
    model.train(was_training)
    return NllResult(sums, num_tokens, right, sums_at)


def scored_logits(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the trained tokens of some rows, in one forward.

    Args:
        rows: `input_ids` and `labels` (-100 is not scored).

    Returns:
        logits, float32, (tokens, vocabulary); the tokens, int64, (tokens,); and where they stand among the labels that
        any row has, bool, (rows, columns), row by row.
    """
    device = next(model.parameters()).device
    ids = _padded([row["input_ids"] for row in rows], 0).to(device)
    targets = _padded([row["labels"] for row in rows], -100).to(device)[:, 1:]
    attention = _padded([[1] * len(row["input_ids"]) for row in rows], 0).to(device)
    scored = (targets != -100).any(0).nonzero().squeeze(1)
    targets = targets[:, scored]
    at = targets != -100
    if not len(scored):
        return torch.empty(0, 0, device=device), targets[at], at
    # Only what is scored goes through the vocabulary, which is most of the work of a small model.
    logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=scored).logits[at].float()
    return logits, targets[at], at


def _by_row(values: Tensor, at: Tensor) -> np.ndarray[Any, Any]:
    """Sums by row of values of the places `at`, (rows, length): (..., places) to (..., rows)."""
    spread = torch.zeros((*values.shape[:-1], *at.shape), dtype=torch.float64, device=values.device)
    spread[..., at] = values
    sums: np.ndarray[Any, Any] = spread.sum(-1).cpu().numpy()
    return sums


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
