"""What a trainer does for a mask that learns: scores in its checkpoints, and a word where the mask does not move."""

import logging
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from maskft.adapters.read import check_saved
from maskft.errors import MaskftError
from maskft.training.engines import check_values
from maskft.tuner import AdapterMasks, find_group
from maskft.tuner.zero import steps_copies

logger = logging.getLogger(__name__)

_SHOWN = ("loss", "flips", "kept_share")
# Of an evaluation: how fast it was, and what TRL counts beside.
_UNSHOWN = ("_runtime", "_per_second", "_num_tokens", "_entropy")


class MaskCallback(TrainerCallback, ExportableState):
    """For any trainer of Transformers or TRL that learns a mask: `SFTTrainer(..., callbacks=[MaskCallback()])`.

    Keeps the scores in training checkpoints, and only there, so that `resume_from_checkpoint` and
    `load_best_model_at_end` work and the final adapter has one bit a weight. Warns of a mask that does not move, and
    reads back each checkpoint once it is written.

    Args:
        group: the masks that learn. Default: those of the trainer's model under `adapter_name`.
        adapter_name: PEFT's name of the adapter that learns.

    Attributes:
        group: the same, known once the trainer is made.
        reachable_share: share of the weights that could flip at all under the schedule, known once training begins.
        temperature: what logits are divided by while the mask learns.
    """

    def __init__(self, group: AdapterMasks | None = None, *, adapter_name: str = "default") -> None:
        self.group: Any = group
        self.adapter_name = adapter_name
        self.reachable_share: float | None = None
        self.temperature = 1.0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.group is None:
            self.group = find_group(kwargs["model"], self.adapter_name)
        self.group.config.save_scores = True

    def state(self) -> dict[str, Any]:
        # The flips that are not logged yet. Transformers asks before it says which model it trains.
        return {"args": {}, "attributes": {"num_flips": self.group.num_flips if self.group else 0}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.group.refresh(anew=steps_copies())  # which a checkpoint may have been loaded into
        saved: Any = state.stateful_callbacks.get(type(self).__name__, self.state())
        # Loading a checkpoint's scores flips weights too, which no step did.
        self.group.num_flips = saved["attributes"]["num_flips"] if state.global_step else 0
        total = total_learning_rate(args, state.max_steps)
        self.reachable_share = share = self.group.reachable_share(total)
        logger.info("A score can move by about %.3g, so at most %.2f %% of the weights can flip.", total, 100 * share)
        if share == 0:
            logger.warning(
                "No weight can flip: the learning rates of all steps sum to %.3g; raise them, or lower --init_std.",
                total,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.group.refresh()  # by all processes, for one alone may be the next to ask

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        masks = self.group.masks()
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        try:
            if args.should_save:
                check_saved(checkpoint, masks)
                check_values(checkpoint)
        except MaskftError:
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)  # so that nothing resumes from it
            raise

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.group.config.save_scores = False
        self.group.refresh(anew=steps_copies())  # the best checkpoint was loaded
        flips = [entry["flips"] for entry in state.log_history if "flips" in entry]
        if flips and not sum(flips):
            logger.warning("No weight flipped in the whole run: the mask is the one it started with.")


class StepCallback(ProgressCallback):
    """One bar of steps, and logs as lines above it: losses, flips, scores; `log_history` has the rest.

    Without the bar under `--disable_tqdm`, without the lines under a `--log_level` above info.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm)
        self.current_step = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No bar inside the bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        values = {name: value for name, value in logs.items() if name in _SHOWN or name.startswith("eval_")}
        shown = [f"{name} {value:.4g}" for name, value in values.items() if not name.endswith(_UNSHOWN)]
        if shown and state.is_world_process_zero and args.log_level not in ("warning", "error", "critical"):
            tqdm.write("  ".join([f"step {state.global_step}/{state.max_steps}", *shown]))


def total_learning_rate(args: TrainingArguments, num_steps: int) -> float:
    """Sum of the learning rates, about what Adam can move a score by; a schedule not linear is bounded by its peak."""
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) != "linear":
        return float(args.learning_rate) * num_steps
    num_warmup = args.get_warmup_steps(num_steps)
    rates = (
        step / max(num_warmup, 1) if step < num_warmup else (num_steps - step) / max(num_steps - num_warmup, 1)
        for step in range(num_steps)
    )
    return float(args.learning_rate) * math.fsum(rates)
