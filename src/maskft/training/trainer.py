"""TRL's trainer with the few things that mask learning adds: a guard on the loss, and what the mask does."""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from maskft.checkpoints.adapter import check_saved
from maskft.errors import MaskftError, PreemptedError, TrainingDivergedError
from maskft.training.engines import check_part, check_values
from maskft.training.preemption import PreemptionCallback
from maskft.training.ranks import RankWatch
from maskft.training.resume import has_ended
from maskft.tuner import MaskGroup, step_in_backward
from maskft.tuner.zero import steps_copies

logger = logging.getLogger(__name__)


class GuardedTrainer(SFTTrainer):
    """An `SFTTrainer` that stops on a loss that is no number, and saves and stops on SIGTERM.

    Where a mask is learned, it logs flips and kept share.
    """

    mask_callback: "MaskCallback | None" = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_pad_token(kwargs["args"].pad_token, kwargs["processing_class"])
        super().__init__(*args, **kwargs)
        self.preemption = PreemptionCallback(self.accelerator)
        self.add_callback(self.preemption)
        self.rank_watch = RankWatch()
        self.add_callback(self.rank_watch)

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
        with self.rank_watch.watching(self.args):
            result = super().train(*args, **kwargs)
        if self.preemption.caught:
            raise PreemptedError(
                f"SIGTERM ended the run after step {self.state.global_step} of {self.state.max_steps}, which is saved "
                f"in {self.args.output_dir}; go on with --resume_from_checkpoint auto."
            )
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rank_watch.event(self.state.global_step)
        with self._micro_batch():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"The training loss became {loss.item()} in step {self.state.global_step + 1}, so training stopped "
                "before that step; the last checkpoint is as it was. Lower the learning rate and resume from it."
            )
        return loss

    def _micro_batch(self) -> AbstractContextManager[None]:
        """Where a mask learns in one process, the gradients of a step's micro-batches are added up first."""
        args = self.args
        is_alone = args.world_size == 1 and args.n_gpu <= 1 and not steps_copies()
        if self.mask_callback is None or not is_alone or args.torch_compile:
            return nullcontext()
        return self.mask_callback.group.micro_batch(is_last=self.accelerator.sync_gradients)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.low_memory:
            logs.pop("grad_norm", None)  # of gradients that are gone by then
        if self.mask_callback is not None and "loss" in logs:
            logs["flips"] = self.mask_callback.group.take_flips()
            logs["kept_share"] = self.mask_callback.group.kept_share()
        super().log(logs, start_time)


def _check_pad_token(pad_token: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        raise MaskftError(
            f"`pad_token` is {pad_token!r}, which the tokenizer does not know; leave it out, for the tokenizer's own."
        )


class MaskCallback(TrainerCallback, ExportableState):
    """Keeps the scores in training checkpoints, and only there; warns of a mask that does not move.

    Each checkpoint is read back once it is written.

    Attributes:
        reachable_share: share of the weights that could flip at all under the schedule, known once training begins.
        temperature: what logits are divided by while the mask learns.
    """

    def __init__(self, group: MaskGroup) -> None:
        self.group = group
        self.reachable_share: float | None = None
        self.temperature = 1.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.group.config.save_scores = True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in Transformers' form: the flips that are not logged yet."""
        return {"args": {}, "attributes": {"num_flips": self.group.num_flips}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.group.refresh(anew=steps_copies())  # which a checkpoint may have been loaded into
        saved: Any = state.stateful_callbacks.get(type(self).__name__, self.state())
        # Loading a checkpoint's scores flips weights too, which no step did.
        self.group.num_flips = saved["attributes"]["num_flips"] if state.global_step else 0
        total = total_learning_rate(args, state.max_steps)
        self.reachable_share = share = self.group.reachable_share(total)
        logger.info(
            "Under this schedule a score can move by about %.3g in all, so at most %.2f %% of the weights can flip.",
            total,
            100 * share,
        )
        if share == 0:
            logger.warning(
                "No weight can flip: the learning rates of all steps sum to %.3g, which is less than the distance of "
                "every score from the border; raise --learning_rate or lower --init_std.",
                total,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.group.refresh()  # by all processes, for one alone may be the next to ask

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        masks = self.group.masks()
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        try:
            check_part(checkpoint, kwargs.get("optimizer"), args.process_index)
            if args.should_save:
                check_saved(checkpoint, masks)
                check_values(checkpoint)
        except MaskftError:
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)  # so that nothing resumes from it
            raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.group.config.save_scores = False
        self.group.refresh(anew=steps_copies())  # the best checkpoint was loaded
        flips = [entry["flips"] for entry in state.log_history if "flips" in entry]
        if flips and not sum(flips):
            logger.warning("No weight flipped in the whole run: the mask is the one it started with.")


def total_learning_rate(args: TrainingArguments, num_steps: int, num_first: int | None = None) -> float:
    """Sum of the learning rates over the first steps (default: all) of a schedule of `num_steps`.

    It is about what Adam can move a score by at most. A linear schedule is summed exactly, any other is bounded by
    its peak.
    """
    num_first = num_steps if num_first is None else num_first
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) != "linear":
        return float(args.learning_rate) * num_first
    num_warmup = args.get_warmup_steps(num_steps)
    rates = (
        step / max(num_warmup, 1) if step < num_warmup else (num_steps - step) / max(num_steps - num_warmup, 1)
        for step in range(num_first)
    )
    return float(args.learning_rate) * math.fsum(rates)
