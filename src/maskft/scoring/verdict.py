"""`--require_gain`: whether a learned mask beats the model it was learned on, on rows that chose nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel

from maskft.data.splits import problems_of, split_validation
from maskft.errors import MaskftError
from maskft.report import interval_text
from maskft.scoring.nll import NllResult, token_nll
from maskft.scoring.statistics import Interval, bootstrap, by_problem, paired_ratio_difference, sign_flip_test
from maskft.scoring.temperature import temperature_text

LEVEL = 0.025
"""Largest one-sided p-value of a gain: half of the 5 % of null masks that may pass, since under skew more pass."""
_MIN_PROBLEMS = 20  # with so few, 86 to 93 of 100 intervals hold the truth (studies/statistics); with fewer, less


def level_for(num_problems: int) -> float:
    """`LEVEL`, and half of it on fewer than 100 problems, where a long tail lets 7 % of null masks pass at `LEVEL`."""
    return LEVEL if num_problems >= 100 else LEVEL / 2


@dataclass(frozen=True)
class GainVerdict:
    """What the paired tests over problems say of a model with its mask minus without it.

    A gain is a `p` (:func:`gain_p_value`) of at most `level`, with a `p_fewer_right` (sign flips) above `LEVEL`.
    """

    has_gain: bool
    difference: Interval  # NLL per token, nats
    p: float
    level: float
    base_nll: float  # without the mask
    # With the logits of each model divided by the temperature that suits it best on these rows: what is gone there was
    # gained by being less sure alone (maskft.scoring.temperature).
    tempered: Interval
    temperatures: tuple[float, float]  # without the mask and with it
    right: Interval  # percentage points of rows that greedy decoding writes to the letter
    base_right: float  # percent
    p_fewer_right: float

    @property
    def sentence(self) -> str:
        """The verdict for a reader."""
        difference, tempered, right = map(asdict, (self.difference, self.tempered, self.right))
        lost = "" if self.has_gain else " and gets fewer rows right, which is no gain"
        head = f"The mask lowers the loss{lost}" if self.p <= self.level else "No gain is shown"
        without, with_it = map(temperature_text, self.temperatures)
        text = (
            f"{head}: {interval_text(difference)} nats per token on {self.difference.n} validation problems that "
            f"chose none of its scores, one-sided p = {self.p:.4f} (a gain needs {self.level:g} or less). With logits "
            f"divided by the temperatures that suit them, {without} without the mask and {with_it} with it: "
            f"{interval_text(tempered)}."
        )
        if self.base_right or self.right.estimate:
            text += f" Rows written right to the letter: {self.base_right:.1f} % without the mask, and "
            text += f"{interval_text(right, digits=1)} points with it."
        return text

    def to_dict(self) -> dict[str, Any]:
        """As in `report.json`."""
        return asdict(self) | {"sentence": self.sentence}


_MORE = "--eval_dataset_name or --validation_split_percentage"


def split_guard_rows(
    rows: Dataset, seed: int, *, kind: str = "validation", more: str = _MORE
) -> tuple[Dataset, Dataset]:
    """Validation rows in halves: one to choose the checkpoint, which looks better there; one kept for the verdict.

    Of that `kind` of rows the flags `more` would give more.
    """
    choosing, judging = split_validation(rows, validation_split_percentage=50, seed=seed)
    require_problems(judging, f"half of the {kind} rows", is_required=True, more=more)
    return choosing, judging


def require_problems(rows: Dataset, what: str, *, is_required: bool, more: str = _MORE) -> None:
    """Refuse rows, called `what`, of too few problems for a verdict; to show a gain where it `is_required`."""
    num_problems = len(set(problems_of(rows)))
    needed = _MIN_PROBLEMS if is_required else 2
    if num_problems < needed:
        of = " of --require_gain" if is_required else ""
        told = f"The verdict{of} needs {needed} different problems, and {what} hold {num_problems}"
        raise MaskftError(f"{told}; give more with {more}.")


def judge_gain(model: PeftModel, rows: Dataset, *, batch_size: int) -> GainVerdict:
    """Score rows with their `input_ids` and `labels` with and without the mask of `model`, and test the difference.

    Rows of one problem count as one; the model is left as it was.
    """
    return verdict(*without_and_with(model, rows, batch_size=batch_size, at_temperatures=True), problems_of(rows))


def without_and_with(
    model: PeftModel, rows: Dataset, *, batch_size: int, at_temperatures: bool = False
) -> tuple[NllResult, NllResult]:
    """What :func:`token_nll` gives on token rows without the mask of `model`, and with it."""
    masked = token_nll(model, rows, batch_size=batch_size, at_temperatures=at_temperatures)
    with model.disable_adapter():
        return token_nll(model, rows, batch_size=batch_size, at_temperatures=at_temperatures), masked


def verdict(base: NllResult, masked: NllResult, problems: Sequence[str]) -> GainVerdict:
    """The tests on rows that were scored at all temperatures; `problems` names the problem of each."""
    scored = (base, masked)
    temperatures, at_best = zip(*(result.at_best_temperature() for result in scored), strict=True)
    sums, tempered, right = (
        by_problem(np.stack(pair), problems)
        for pair in ([result.sums for result in scored], at_best, [100 * result.right for result in scored])
    )
    num_tokens, num_rows = by_problem(np.stack([masked.num_tokens, np.ones(len(problems))]), problems)
    level = level_for(len(sums[0]))
    p, p_fewer_right = gain_p_value(sums[1] - sums[0]), sign_flips(right[1] - right[0])
    return GainVerdict(
        has_gain=p <= level and p_fewer_right > LEVEL,
        difference=paired_ratio_difference(sums[0], sums[1], num_tokens),
        p=p,
        level=level,
        base_nll=base.mean,
        tempered=paired_ratio_difference(tempered[0], tempered[1], num_tokens),
        temperatures=temperatures,
        right=paired_ratio_difference(right[0], right[1], num_rows),
        base_right=float(100 * base.right.mean()),
        p_fewer_right=p_fewer_right,
    )


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


def bootstrap_t_test(changes: np.ndarray[Any, Any]) -> float:
    """One-sided p-value of the bootstrap-t test that the mean of the changes is below zero.

    Their t is set against those of draws from the changes less their mean (Efron and Tibshirani 1993, "An Introduction
    to the Bootstrap", sections 12.5 and 16.4).
    """
    if np.ptp(changes) == 0:
        return 0.0 if changes.sum() < 0 else 1.0
    drawn = bootstrap((changes - changes.mean(),), _t_statistic).bootstrap_distribution
    return float((1 + (drawn <= _t_statistic(changes)).sum()) / (1 + len(drawn)))


def _t_statistic(values: np.ndarray[Any, Any], axis: int = -1) -> Any:
    mean, error = values.mean(axis), values.std(axis, ddof=1) / np.sqrt(values.shape[axis])
    # A sample of one value drawn again has no spread; scipy takes the deviation of all t, so none may be infinite.
    return np.clip(mean / np.maximum(error, 1e-30), -1e6, 1e6)


@dataclass(frozen=True)
class RestoreVerdict:
    """Whether a mask gives back what fine-tuning took, and keeps the task; paired tests on rows that chose nothing.

    Attributes:
        has_gain: the retained loss is lower with the mask (`p_retained` is at most its level), and the task's loss is
            shown to be worse by less than `margin` (`p_task` is at most its own): a test of non-inferiority.
        retained: NLL per token (nats) of the general rows with the mask minus without it, 95 % over problems.
        task: the same of the task's rows.
        margin: nats per token.
        p_retained, p_task: one-sided, of :func:`gain_p_value` over problems.
    """

    has_gain: bool
    retained: Interval
    task: Interval
    margin: float
    p_retained: float
    p_task: float

    @property
    def sentence(self) -> str:
        """The verdict for a reader."""
        retained, task = map(asdict, (self.retained, self.task))
        gives = self.p_retained <= level_for(self.retained.n)
        keeps = self.p_task <= level_for(self.task.n)
        heads = {
            (True, True): "The mask gives back what fine-tuning took, and keeps the task",
            (True, False): "The mask gives back what fine-tuning took, and is not shown to keep the task",
            (False, True): "The mask keeps the task, and is not shown to give anything back",
            (False, False): "The mask is shown neither to give anything back nor to keep the task",
        }
        return (
            f"{heads[gives, keeps]}. General rows: {interval_text(retained)} nats per token on {self.retained.n} "
            f"problems, one-sided p = {self.p_retained:.4f}. Task: {interval_text(task)} nats per token on "
            f"{self.task.n} problems; p = {self.p_task:.4f} that it is worse by {self.margin:g} or more."
        )

    def to_dict(self) -> dict[str, Any]:
        """As in `report.json`."""
        return asdict(self) | {"sentence": self.sentence}


def restore_verdict(
    task: tuple[NllResult, NllResult],
    retained: tuple[NllResult, NllResult],
    problems: tuple[Sequence[str], Sequence[str]],
    margin: float,
) -> RestoreVerdict:
    """The tests on rows of both kinds, each scored without the mask and with it.

    Args:
        problems: the problem of each of the task's rows, and of each general row.
        margin: nats per token that the task may lose, above 0.
    """
    found = []
    for (without, masked), names, allowed in zip((task, retained), problems, (margin, 0.0), strict=True):
        sums = by_problem(np.stack([without.sums, masked.sums, without.num_tokens]), names)
        p = gain_p_value(sums[1] - sums[0] - allowed * sums[2])
        found.append((paired_ratio_difference(*sums), p))
    (task_difference, p_task), (difference, p_retained) = found
    has_gain = p_retained <= level_for(difference.n) and p_task <= level_for(task_difference.n)
    return RestoreVerdict(has_gain, difference, task_difference, margin, p_retained, p_task)
