"""SIGTERM, which a scheduler sends to a job before it takes the machine away: finish the step, save, and end."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class PreemptionCallback(TrainerCallback):
    """Saves a checkpoint after the step in which SIGTERM arrives, on whichever process, and stops all of them there.

    Transformers' `enable_jit_checkpoint` waits for seconds, may save in the middle of a step, and asks no other
    process, so that a run of several would hang.

    Attributes:
        caught: whether a signal has ended the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.caught, self._signalled = accelerator, False, False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signalled: Any = self._signalled
        if self.accelerator.num_processes > 1:
            signalled = self.accelerator.reduce(torch.tensor(int(signalled), device=self.accelerator.device))
        if signalled and state.global_step < state.max_steps:
            self.caught = control.should_save = control.should_training_stop = True
            # Of one checkpoint to keep, Transformers removes all but the best when a run ends, and so this one.
            args.save_total_limit = 2 if args.save_total_limit == 1 else args.save_total_limit

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._signalled = True
