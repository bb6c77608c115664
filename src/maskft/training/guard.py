"""`--require_gain`: whether a learned mask beats the model it was learned on, on rows that chose nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from scipy import stats

from maskft.errors import MaskftError
from maskft.evaluation.nll import NllResult, token_nll
from maskft.evaluation.statistics import Interval, by_problem, paired_ratio_difference, sign_flip_test
from maskft.training.data import group_key, split_validation

LEVEL = 0.025
"""Largest one-sided p-value of a gain: half of the 5 % of null masks that may pass, since under skew more pass."""
_MIN_PROBLEMS = 20


@dataclass(frozen=True)
class GainVerdict:
    """What the paired test says.

    Attributes:
        has_gain: the loss is lower with the mask, and the one-sided p-value is at most `LEVEL`.
        difference: NLL per token (nats) with the mask minus without it, with its 95 % interval over problems.
        p: one-sided, of :func:`gain_p_value` over problems.
        base_nll: NLL per token without the mask.
    """

    has_gain: bool
    difference: Interval
    p: float
    base_nll: float

    @property
    def sentence(self) -> str:
        """The verdict for a reader."""
        d = self.difference
        numbers = (
            f"{d.estimate:+.4f} [{d.low:+.4f}, {d.high:+.4f}] nats per token on {d.n} validation problems that chose "
            f"nothing, one-sided p = {self.p:.4f}"
        )
        return f"{'The mask lowers the loss' if self.has_gain else 'No gain is shown'}: {numbers}."

    def to_dict(self) -> dict[str, Any]:
        """As in `report.json`."""
        return asdict(self) | {"level": LEVEL, "sentence": self.sentence}


def split_guard_rows(rows: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Validation rows in two halves: the first chooses the checkpoint, the second is kept for the verdict.

    One set for both would favour the mask: the best of several checkpoints looks better where it was chosen.

    Raises:
        MaskftError: the second half has too few different problems for a verdict.
    """
    choosing, judging = split_validation(rows, validation_split_percentage=50, seed=seed)
    num_problems = len({group_key(prompt) for prompt in judging["prompt"]})
    if num_problems < _MIN_PROBLEMS:
        raise MaskftError(
            f"--require_gain judges on half of the validation rows, which holds {num_problems} different problems, and "
            f"needs {_MIN_PROBLEMS}; give more with --eval_dataset_name or --validation_split_percentage."
        )
    return choosing, judging


def judge_gain(model: PeftModel, tokenised: Dataset, prompts: Sequence[Any]) -> GainVerdict:
    """Score rows with and without the mask of `model`, and test the difference.

    Args:
        model: with the mask to judge; it is left as it was.
        tokenised: the rows as `input_ids` and `labels`.
        prompts: the prompt of each row; rows of one problem count as one.
    """
    masked = token_nll(model, tokenised)
    with model.disable_adapter():
        base = token_nll(model, tokenised)
    return verdict(base, masked, [group_key(prompt) for prompt in prompts])


def verdict(base: NllResult, masked: NllResult, problems: Sequence[str]) -> GainVerdict:
    """The test on scored rows, `problems` naming the problem of each."""
    sums = by_problem(np.stack([base.sums, masked.sums]), problems)
    counts = by_problem(masked.num_tokens, problems)
    difference = paired_ratio_difference(sums[0], sums[1], counts)
    p = gain_p_value(sums[1] - sums[0])
    return GainVerdict(p <= LEVEL, difference, p, base.mean)


def gain_p_value(changes: np.ndarray[Any, Any]) -> float:
    """One-sided p-value that the changes of the loss, one for each problem, are below zero in the mean.

    The larger of two: sign flips, which take the changes as symmetric and keep their level under heavy tails, and
    bootstrap-t, which allows for skew. Each alone lets too many null masks pass where the other does not.
    """
    return max(sign_flips(changes), bootstrap_t_test(changes))


def sign_flips(changes: np.ndarray[Any, Any]) -> float:
    """One-sided p-value of the sign-flip test that the changes are below zero."""
    two_sided = sign_flip_test(changes)
    return two_sided / 2 if changes.sum() < 0 else 1 - two_sided / 2


def bootstrap_t_test(changes: np.ndarray[Any, Any], *, num_resamples: int = 9999, seed: int = 0) -> float:
    """One-sided p-value of the bootstrap-t test that the mean of the changes is below zero.

    The t statistic is set against those of samples, drawn with replacement, of the changes less their mean (Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", sections 12.5 and 16.4).
    """
    if np.ptp(changes) == 0:
        return 0.0 if changes.sum() < 0 else 1.0
    drawn = stats.bootstrap(
        (changes - changes.mean(),),
        _t_statistic,
        vectorized=True,
        method="percentile",
        n_resamples=num_resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    return float((1 + (drawn <= _t_statistic(changes)).sum()) / (1 + num_resamples))


def _t_statistic(values: np.ndarray[Any, Any], axis: int = -1) -> Any:
    mean, error = values.mean(axis), values.std(axis, ddof=1) / np.sqrt(values.shape[axis])
    # A sample of one value drawn again has no spread; scipy takes the deviation of all t, so none may be infinite.
    return np.clip(mean / np.maximum(error, 1e-30), -1e6, 1e6)
