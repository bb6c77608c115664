"""TRL's trainer with the few things that mask learning adds: stops that can be resumed, and the mask in the log."""

import copy
import logging
import math
import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from trl import SFTTrainer

from maskft.data.rows import answered, tokenise_rows
from maskft.data.tokens import RowTokeniser, end_token_ids
from maskft.errors import MaskftError, PreemptedError, TrainingDivergedError, damaged_weight, first_line
from maskft.scoring.temperature import temperature_text
from maskft.storage.interrupts import uninterrupted
from maskft.training.arguments import TrainingSettings
from maskft.training.calibration import best_temperature, divide_logits
from maskft.training.callback import MaskCallback, StepCallback
from maskft.training.preemption import PreemptionCallback
from maskft.training.ranks import on_first_rank
from maskft.training.resume import RunNotes, is_complete
from maskft.tuner import AdapterMasks, find_group, step_in_backward

logger = logging.getLogger(__name__)


class MaskTrainer(SFTTrainer):
    """An `SFTTrainer` that stops on a loss that is no number, and saves and stops on SIGTERM.

    Where a mask is learned, it logs flips and kept share, and notes the first validation loss without the mask.
    """

    mask_callback: MaskCallback | None = None
    notes: RunNotes | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.preemption)
        for theirs in (ProgressCallback, PrinterCallback):  # which print each log as a dictionary
            self.remove_callback(theirs)
        self.add_callback(StepCallback())

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Transformers takes a step from a checkpoint whose last step lies within an epoch, or that was stopped early.
        if not self.has_ended():
            super()._run_epoch(*args, **kwargs)

    def has_ended(self) -> bool:
        """Whether a run took its last step, or was stopped early, in the state that it goes on from."""
        stopping = self.state.stateful_callbacks.get("EarlyStoppingCallback", {})
        counter = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        patience = stopping.get("args", {}).get("early_stopping_patience", counter + 1)
        step = self.state.global_step
        return bool(step >= self.state.max_steps or (step and counter >= patience))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with logging_redirect_tqdm([logging.root, logging.getLogger("transformers")]):
            result = super().train(*args, **kwargs)
        if self.preemption.caught:
            at = f"step {self.state.global_step} of {self.state.max_steps}"
            raise PreemptedError(f"SIGTERM ended the run after {at}; go on with --resume_from_checkpoint auto.")
        # The last step's own loss is that of the weights before it.
        if not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad):
            raise TrainingDivergedError("A trained value became no finite number. Lower the learning rate and resume.")
        return result

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # Under `--save_strategy best` this alone decides what is saved.
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        return is_best or self.preemption.caught

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            with uninterrupted():
                if self.args.should_save and not is_complete(checkpoint):  # it is, while older ones are removed
                    shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied weight stands in no file; any other that is missing would stay as it was.
        if missing := sorted(set(load_result.missing_keys).difference(self.model.all_tied_weights_keys)):
            raise MaskftError(f"The checkpoint lacks {missing[0]}; remove it, and go on from the one before.")
        self.model.tie_weights()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.require_finite(
            metrics.get("eval_loss", 0.0), f"validation loss became {{}} after step {self.state.global_step}"
        )
        # After one with the mask: where the first forward of all is without, DeepSpeed's stage 3 lacks weights later.
        if self.mask_callback is not None and self.notes is not None and not self.notes.without_mask:
            self.notes.without_mask = {"eval_loss": self.loss_without_mask()}
        return metrics

    def loss_without_mask(self) -> float:
        """The validation loss with the mask switched off, neither logged nor shown to callbacks as an evaluation."""
        with torch.random.fork_rng(devices=[]), self.model.disable_adapter():  # for a data loader draws a seed
            loader = self.get_eval_dataloader()
            metrics = self.evaluation_loop(loader, "Without the mask", prediction_loss_only=True).metrics
        self._metrics["eval"].clear()  # which TRL would count among those of the next evaluation
        self.callback_handler.on_predict(self.args, self.state, self.control, metrics)  # ends the progress bar
        return float(metrics["eval_loss"])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.require_finite(loss.item(), f"loss became {{}} in step {self.state.global_step + 1}")
        return loss

    def require_finite(self, loss: float, what: str) -> None:
        """TrainingDivergedError where a loss is no finite number; `what` says where, with {} for it."""
        if not math.isfinite(loss):
            hint = self._damaged_base() or "Lower the learning rate and resume."
            raise TrainingDivergedError(f"The {what.format(loss)}. {hint}")

    def _damaged_base(self) -> str:
        """What there is to say of a weight that no step has changed and that is no number; empty where all are."""
        for name, weight in self.model.named_parameters():
            is_given = not weight.requires_grad or self.state.global_step == 0
            if is_given and type(weight) is torch.nn.Parameter and not weight.isfinite().all():
                return damaged_weight(name)
        return ""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.low_memory:
            logs.pop("grad_norm", None)  # of gradients that are gone by then
        if self.mask_callback is not None and "loss" in logs:
            logs["flips"] = self.mask_callback.group.take_flips()
            logs["kept_share"] = self.mask_callback.group.kept_share()
        super().log(logs, start_time)


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    validation_rows: Dataset,
    settings: TrainingSettings,
    kind: Callable[..., MaskTrainer] = MaskTrainer,
) -> MaskTrainer:
    """A trainer of `model` on rows with or without their tokens; the mask of a masked model is watched.

    MaskftError for settings that TRL or Transformers refuse, and where no row trains the end token: the model would
    never learn to stop.
    """
    ends = end_token_ids(tokenizer, model.generation_config)
    tokenise = RowTokeniser.of(tokenizer, settings)
    train_rows, validation_rows = (
        answered(tokenise_rows(rows, tokenise)).select_columns(["input_ids", "labels"])
        for rows in (train_rows, validation_rows)
    )
    check_end_token_trained(train_rows, ends, max_length=settings.max_length)
    settings = _for_trl(settings, tokenizer)
    try:
        trainer = kind(
            model=model,
            args=settings,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
        )
    except MaskftError:
        raise
    except (ImportError, ValueError, RuntimeError) as error:
        raise MaskftError(f"The trainer cannot be set up with these settings and rows: {first_line(error)}") from error
    group = mask_group(model)
    if group is not None:
        if settings.low_memory:
            group.keeps_masked_weights = False
            step_in_backward(trainer.create_optimizer())
        trainer.mask_callback = callback = MaskCallback(group)
        trainer.add_callback(callback)
        callback.on_init_end(settings, trainer.state, trainer.control)
        if settings.temperature_scaling:
            callback.temperature = on_first_rank(lambda: best_temperature(trainer, trainer.train_dataset))
            divide_logits(trainer.model, callback.temperature)
            logger.info("The mask learns at a temperature of %s.", temperature_text(callback.temperature))
    return trainer


def _for_trl(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase) -> TrainingSettings:
    """The settings without those that have been used on model, tokenizer and rows by now."""
    settings = copy.copy(settings)
    if settings.chat_template_path is not None:
        settings.eos_token = tokenizer.eos_token  # which the model's configuration takes too
    settings.model_init_kwargs = settings.chat_template_path = None
    settings.assistant_only_loss = settings.push_to_hub = False  # the result is pushed when it is written
    if not settings.packing:
        settings.max_length = None
    return settings


def mask_group(model: PreTrainedModel) -> AdapterMasks | None:
    """The masks that a model learns, if any."""
    try:
        return find_group(model, "default")
    except MaskftError:
        return None


def check_end_token_trained(token_rows: Dataset, end_ids: Set[int], *, max_length: int | None) -> None:
    """Make sure that the model is trained to stop, before training begins; a warning tells of rows that do not do so.

    Args:
        token_rows: with `labels`, each row cut at `max_length`.

    Raises:
        MaskftError: no row trains an end token.
    """
    ends, num_rows = np.fromiter(end_ids, dtype=np.int64), len(token_rows)
    lacking = [
        row
        for row in token_rows.select_columns("labels").with_format("numpy")["labels"]
        if not np.isin(row, ends).any()
    ]
    num_cut = sum(max_length is not None and len(labels) >= max_length for labels in lacking)
    if len(lacking) < num_rows:
        if lacking:
            told = "%d of %d training rows (%.1f %%) do not train the end token, %d since max_length=%s cuts them."
            logger.warning(told, len(lacking), num_rows, 100 * len(lacking) / num_rows, num_cut, max_length)
        return
    problem = f"None of the {num_rows} rows trains an end token (ids {sorted(end_ids)})"
    if num_cut == num_rows:
        raise MaskftError(f"{problem}: all of them are cut at max_length={max_length}; raise max_length.")
    cut = f" ({num_cut} rows are also cut at max_length={max_length})" if num_cut else ""
    raise MaskftError(
        f"{problem}, so the model would not learn to stop{cut}: use a chat template that closes the assistant's turn "
        "with an end-of-turn token, and name that token with --eos_token."
    )
