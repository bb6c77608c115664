"""TRL's trainer with the few things that mask learning adds: stops that can be resumed, and the mask in the log."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from maskft.errors import MaskftError, PreemptedError, TrainingDivergedError
from maskft.training.callback import MaskCallback
from maskft.training.preemption import PreemptionCallback
from maskft.training.resume import Kept, has_ended
from maskft.tuner import step_in_backward


class MaskTrainer(SFTTrainer):
    """An `SFTTrainer` that stops on a loss that is no number, and saves and stops on SIGTERM.

    Where a mask is learned, it logs flips and kept share.
    """

    mask_callback: MaskCallback | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_pad_token(kwargs["args"].pad_token, kwargs["processing_class"])
        super().__init__(*args, **kwargs)
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.preemption)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.low_memory:
            step_in_backward(optimizer)
        return optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Transformers takes a step from a checkpoint whose last step lies within an epoch, or that was stopped early.
        if not has_ended(self.state):
            super()._run_epoch(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if self.preemption.caught:
            raise PreemptedError(
                f"SIGTERM ended the run after step {self.state.global_step} of {self.state.max_steps}, which is saved "
                f"in {self.args.output_dir}; go on with --resume_from_checkpoint auto."
            )
        return result

    def loss_without_mask(self) -> float:
        """The validation loss with the mask switched off, neither logged nor shown to callbacks as an evaluation."""
        with torch.random.fork_rng(devices=[]), self.model.disable_adapter():  # for a data loader draws a seed
            metrics = self.evaluation_loop(
                self.get_eval_dataloader(), "Without the mask", prediction_loss_only=True
            ).metrics
        self._metrics["eval"].clear()  # which TRL would count among those of the next evaluation
        self.callback_handler.on_predict(self.args, self.state, self.control, metrics)  # ends the progress bar
        return float(metrics["eval_loss"])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"The training loss became {loss.item()} in step {self.state.global_step + 1}, so training stopped "
                "before that step; the last checkpoint is as it was. Lower the learning rate and resume from it."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.low_memory:
            logs.pop("grad_norm", None)  # of gradients that are gone by then
        if self.mask_callback is not None and "loss" in logs:
            logs["flips"] = self.mask_callback.group.take_flips()
            logs["kept_share"] = self.mask_callback.group.kept_share()
        super().log(logs, start_time)


class WithoutMask(Kept):
    """Scores the validation rows without the mask, once in a run: where they are first scored with it.

    Not before the first step: where the first forward of all is without masks, DeepSpeed's stage 3 lacks weights later.

    Attributes:
        metrics: `eval_loss`; empty until then.
    """

    def __init__(self, trainer: MaskTrainer, checkpoint: Path | None) -> None:
        self.trainer = trainer
        self.metrics: dict[str, float] = self.attributes_in(checkpoint).get("metrics", {})

    def attributes(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.metrics:
            self.metrics = {"eval_loss": self.trainer.loss_without_mask()}


def _check_pad_token(pad_token: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        raise MaskftError(
            f"`pad_token` is {pad_token!r}, which the tokenizer does not know; leave it out, for the tokenizer's own."
        )
