"""SIGTERM, which a scheduler sends to a job before it takes the machine away: finish the step, save, and end."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class PreemptionCallback(TrainerCallback):
    """Saves a checkpoint after the step in which SIGTERM arrives, and stops.

    Attributes:
        caught: whether a signal has ended the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.caught = False
        self._signalled = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_signalled() and state.global_step < state.max_steps:
            self.caught = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _any_signalled(self) -> bool:
        """All processes have to stop after the same step, whichever the signal reached first."""
        if self.accelerator.num_processes == 1:
            return self._signalled
        flag = torch.tensor(int(self._signalled), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum"))
