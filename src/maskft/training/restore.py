"""`maskft restore`: a mask of the change that gives back what fine-tuning took, and keeps the task.

Each weight is either the fine-tuned one or the one before it. The scores learn from the task's rows by cross-entropy,
and from general rows by the divergence from the model before fine-tuning (:mod:`maskft.training.retain`). Validation
rows of both kinds choose the step; beside it stands what scaling all changes alike gives
(:mod:`maskft.training.wise_ft`).
"""

import logging
from dataclasses import dataclass, replace
from typing import Annotated, Any

from datasets import Dataset
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskft.errors import MaskftError, require_flags
from maskft.scoring.nll import token_nll
from maskft.training.arguments import RESTORED, MaskArguments, TrainingSettings, flag
from maskft.training.retain import RetainArguments, Retaining, RetainTrainer, computing
from maskft.training.wise_ft import NUM_POINTS, scaled_changes
from maskft.tuner import MaskConfig
from maskft.values import check_value

logger = logging.getLogger(__name__)


@dataclass
class RestoreArguments(RetainArguments):
    """What is to be given back, and what the task may pay for it."""

    _argument_group_name = "Restoring"

    retain_target: float = flag(1.0, "Share of what was lost on the general rows at which the run ends.")

    def __post_init__(self) -> None:
        require_flags(self, "retain_dataset_name")
        super().__post_init__()
        hint = Annotated[float, Field(gt=0, le=1)]
        self.retain_target = check_value("retain_target", self.retain_target, hint)


@dataclass
class RestoreSettings(TrainingSettings):
    """The training flags, with the defaults of a restoring run: some tens of steps."""

    learning_rate: float = flag(1e-3, "Learning rate of the scores.")
    lr_scheduler_type: str = flag("constant", "Schedule of the learning rate, by Transformers' names.")
    warmup_steps: float = flag(0.0, "Steps of the warm-up from 0; a value below 1 is a share of all steps.")
    max_steps: int = flag(32, "Steps at most; the run ends before them where validation says so.")
    eval_steps: float | None = flag(4, "Steps between two scorings of the validation rows, and between checkpoints.")
    logging_steps: float = flag(1, "Steps between two entries of the log.")

    def __post_init__(self) -> None:
        self.eval_strategy = self.save_strategy = "steps"
        self.save_steps = self.eval_steps or 4
        self.metric_for_best_model, self.greater_is_better, self.load_best_model_at_end = RESTORED, True, True
        super().__post_init__()
        if self.max_steps > 0 and self.num_train_epochs != TrainingSettings.num_train_epochs:
            told = f"`num_train_epochs` has no effect beside `max_steps`, which is {self.max_steps}"
            raise MaskftError(f"{told}; leave it out, or set --max_steps -1.")


def restoring_mask(mask: MaskArguments, before: str | None = None) -> MaskConfig:
    """The configuration of a mask of the change: the preset `recommended`, and what is given beside it.

    Args:
        before: name of the model before fine-tuning. Default: that in `mask`.
    """
    if before is None:
        require_flags(mask, "reference_model_name_or_path")
    of_change: dict[str, Any] = {"preset": "recommended"}
    of_change |= {"reference_model_name_or_path": before or mask.reference_model_name_or_path}
    return replace(mask, **of_change).config()


@dataclass(frozen=True)
class Point:
    """What a model is worth on validation rows of both kinds: NLL per token, in nats."""

    task: float
    retained: float


class Restoring(Retaining):
    """What a run that restores has beside one that learns a mask of the task alone.

    Attributes:
        curve: by the share of the change that is kept, 0 to 1, what the models between the two are worth.
    """

    given: RestoreArguments

    def __init__(self, given: RestoreArguments, reference: str) -> None:
        super().__init__(given, reference)
        self.trainer = RestoreTrainer
        self.curve: list[tuple[float, Point]] = []

    def prepare(
        self, tuned: PreTrainedModel, task_rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Any
    ) -> None:
        """Ask the model before fine-tuning, and measure those between it and `tuned`, which stays as it is.

        Raises:
            MaskftError: nothing was lost on the general rows.
        """
        if self.curve:
            return
        self.task_rows = task_rows
        before = self.ask(str(tuned.dtype).removeprefix("torch."), tokenizer, settings)
        tuned.to(settings.device)
        with computing(settings):
            shares = [i / (NUM_POINTS - 1) for i in range(NUM_POINTS)]
            self.curve = [(share, self.measure(tuned)) for share in scaled_changes(tuned, before, shares)]
        first, last = self.curve[0][1], self.curve[-1][1]
        logger.info("Before fine-tuning: %s. After it: %s.", _text(first), _text(last))
        if last.retained <= first.retained:
            raise MaskftError(
                f"The fine-tuned model has lost nothing on the general rows ({_text(last)}; before: {_text(first)}), "
                "so nothing is to be given back; give rows of what it has forgotten as --retain_dataset_name."
            )

    def measure(self, model: nn.Module) -> Point:
        """What a model is worth on the validation rows."""
        rows = (self.task_rows, self.splits["retained validation"])
        return Point(*(token_nll(model, each, batch_size=self.batch_size).mean for each in rows))

    def score(self, point: Point) -> dict[str, float]:
        """What validation says of a point: `eval_restored` is the share given back, up to the target.

        Where the task pays too much it is what the task pays, below 0.
        """
        share, paid = self._worth(point)
        restored = min(share, self.given.retain_target) if paid <= self.given.max_task_loss else -paid
        return {
            "eval_loss": point.task,
            "eval_retained_loss": point.retained,
            "eval_share_restored": share,
            RESTORED: restored,
        }

    def _worth(self, point: Point) -> tuple[float, float]:
        """The share of what was lost on the general rows that is back, and what the task pays, nats per token."""
        before, tuned = self.curve[0][1], self.curve[-1][1]
        return (tuned.retained - point.retained) / (tuned.retained - before.retained), point.task - tuned.task

    def told(self, report: dict[str, Any]) -> dict[str, Any]:
        """What a report says beside its log: the curve of scaled changes, and the points that the mask went through."""
        path = [{"step": 0} | vars(self.curve[-1][1])]
        path += [
            {"step": entry["step"], "task": entry["eval_loss"], "retained": entry["eval_retained_loss"]}
            for entry in report["log_history"]
            if "eval_retained_loss" in entry
        ]
        told = {"wise_ft": [{"share": share} | vars(point) for share, point in self.curve], "mask": path}
        # Under --eval_delay no step may have been scored; the fine-tuned model, which gives nothing back, comes first.
        chosen = next((point for point in path if point["step"] == report["best"]["step"]), path[0])
        share, paid = self._worth(Point(chosen["task"], chosen["retained"]))
        if share <= 0 or paid > self.given.max_task_loss:
            sentence = (
                f"No step gives anything back and keeps the task within {self.given.max_task_loss:g} nats per token; "
                "lower --learning_rate, or raise --max_task_loss or --retain_weight."
            )
            return told | {"chosen": None, "sentence": sentence + self._scaling_beyond(0.0)}
        sentence = (
            f"On validation, {100 * share:.0f} % of what the general rows lost is given back "
            f"at step {chosen['step']}, for {paid:+.4f} nats per token of the task."
        )
        return told | {"chosen": chosen, "sentence": sentence + self._scaling_beyond(share)}

    def _scaling_beyond(self, share: float) -> str:
        """What all changes scaled alike give back, where the task can afford it and it is more than `share`."""
        kept, best = max(self.curve, key=lambda at: self.score(at[1])[RESTORED])
        worth, paid = self._worth(best)
        if worth <= share or paid > self.given.max_task_loss:
            return ""
        # On GSM8K's problems it was so (studies/restore): little was forgotten, and scaling cost little.
        told = f"All changes scaled to {100 * kept:.0f} % give back more without training"
        return f" {told}: {100 * worth:.0f} %, for {paid:+.4f} nats per token."


class RestoreTrainer(RetainTrainer):
    """A trainer whose validation is of both kinds, and which ends where that says so."""

    restoring: Restoring

    def has_ended(self) -> bool:
        target = self.restoring.given.retain_target
        return super().has_ended() or any(entry.get(RESTORED, 0) >= target for entry in self.state.log_history)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.compute_loss_context_manager():
            point = self.restoring.measure(self.model)
        self.require_finite(point.task + point.retained, f"validation loss is {{}} after step {self.state.global_step}")
        metrics = self.restoring.score(point)
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # A run whose task pays too much goes on, for it may come back: on sums, at a rate of 5e-3, the task paid 0.068
        # nats at step 8 and 0.054 at step 12.
        self.control.should_training_stop |= self.has_ended()
        return metrics


def _text(point: Point) -> str:
    return f"task {point.task:.4f}, general rows {point.retained:.4f} nats per token"
