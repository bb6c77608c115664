"""Several processes: they have to be started alike, and one that stalls is named before the others hang with it."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskft.errors import MaskftError

STALLED_STATUS = 75  # EX_TEMPFAIL: a launcher may try again
# The backend's own limit is `ddp_timeout`; its message, which comes then, names no process.
_SHARE_OF_TIMEOUT = 0.9


def require_equal_ranks(facts: dict[str, Any]) -> None:
    """Compare what the processes of a run were started with; every process has to call it.

    Args:
        facts: values that JSON can hold, by name.

    Raises:
        MaskftError: a process has another value than the first one; on every process alike.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    for rank, other in enumerate(gathered[1:], start=1):
        for name in gathered[0]:
            if other.get(name) != gathered[0][name]:
                raise MaskftError(
                    f"Rank {rank} was started with `{name}` = {other.get(name)!r} and rank 0 with "
                    f"{gathered[0][name]!r}; start all processes with the same settings, data and versions."
                )


@dataclass
class Sign:
    """What a process says of itself.

    Attributes:
        num_signs: how often it has said something; it goes up while the process lives, whatever it waits for.
        num_events: steps begun and ended, evaluations and checkpoints; the same number everywhere at the same place.
        step: optimizer steps done.
        where: where its main thread is, once it finds that nothing goes on.
    """

    host: str
    pid: int
    num_signs: int = 0
    num_events: int = 0
    step: int = 0
    where: str = ""


class RankWatch(TrainerCallback):
    """Ends the process with a sentence that names the stalled rank, before the backend's timeout without one.

    A thread of each process tells the launcher's store that it lives and how far it is. Where the own process has not
    gone on for most of `ddp_timeout`, it reads what the others told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_event = time.monotonic()
        self._stop = threading.Event()
        self._sign = Sign(socket.gethostname(), os.getpid())

    def event(self, step: int) -> None:
        """The process has gone on."""
        with self._lock:
            self._sign.num_events += 1
            self._sign.step = step
            self._last_event = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if args.world_size == 1 or address is None or port is None:
            return
        timeout = _SHARE_OF_TIMEOUT * args.ddp_timeout
        interval = min(timeout / 10, 10.0)
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=max(interval, 1.0)))
        # A run that the launcher starts again meets the signs of the one before.
        run = f"maskft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        names = [f"{run}/{rank}" for rank in range(args.world_size)]
        self._stop.clear()
        self.event(state.global_step)
        threading.Thread(
            target=self._watch,
            args=(store, names, dist.get_rank(), timeout, interval),
            daemon=True,
        ).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.event(state.global_step)

    on_prediction_step = on_evaluate = on_save = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop.set()

    def _watch(self, store: dist.TCPStore, names: list[str], rank: int, timeout: float, interval: float) -> None:
        while not self._stop.wait(interval):
            with self._lock:
                stalled_for = time.monotonic() - self._last_event
                self._sign.num_signs += 1
                self._sign.where = _main_thread_is_at() if stalled_for > timeout else ""
            try:
                store.set(names[rank], json.dumps(asdict(self._sign)))
                if stalled_for <= timeout:
                    continue
                before = _read_signs(store, names)
                time.sleep(3 * interval)  # all of the others have had their turn in it
                after = _read_signs(store, names)
            except (RuntimeError, ValueError) as error:
                if stalled_for <= timeout:
                    continue  # one lost message is no stall
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                message = f"the launcher's store at {where} does not answer: that machine or its network is gone"
                _end(rank, stalled_for, f"{message} ({type(error).__name__})")
            if time.monotonic() - self._last_event > timeout and not self._stop.is_set():
                _end(rank, stalled_for, name_stalled(before, after))


def name_stalled(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> str:
    """Say which ranks keep the others waiting, from what each told at two moments (None: nothing yet).

    Ranks that tell nothing new are stopped or gone. Where all live, those that have done least are behind. Where all
    have done as much, none can be named, and the places at which they are must do.
    """
    silent = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if b is None or a == b]
    if silent:
        what = "no longer answers: the process is stopped, or its machine or network is gone"
        return "; ".join(f"{_name(i, after[i])} {what}" for i in silent)
    signs = [sign for sign in after if sign is not None]
    least = min(sign.num_events for sign in signs)
    if least < max(sign.num_events for sign in signs):
        behind = [i for i, sign in enumerate(signs) if sign.num_events == least]
        return "; ".join(f"{_name(i, signs[i])} is behind the others, at {signs[i].where or 'work'}" for i in behind)
    places = "; ".join(f"{_name(i, sign)} is at {sign.where or 'work'}" for i, sign in enumerate(signs))
    return f"all processes are equally far: {places}"


def _name(rank: int, sign: Sign | None) -> str:
    if sign is None:
        return f"rank {rank}, which never answered,"
    return f"rank {rank} (host {sign.host}, process {sign.pid}, after step {sign.step})"


def _read_signs(store: dist.TCPStore, names: list[str]) -> list[Sign | None]:
    return [Sign(**json.loads(store.get(name))) if store.check([name]) else None for name in names]


def _main_thread_is_at() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    return f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _end(rank: int, seconds: float, reason: str) -> None:
    """Say why and end at once: the main thread waits in a call that nothing else can end."""
    sys.stderr.write(
        f"maskft: error: Rank {rank} has waited for {seconds:.0f} s: {reason}. Go on with --resume_from_checkpoint "
        "auto once that is mended; where a step or a save really takes so long, raise --ddp_timeout.\n"
    )
    sys.stderr.flush()
    os._exit(STALLED_STATUS)
