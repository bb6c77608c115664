"""Several processes: they have to be started alike, and one that stalls or is lost is named, not waited for."""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskft.errors import LostRankError, MaskftError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# The backend gives up after `ddp_timeout` (gloo on CPUs: after half an hour) and names no process. All that follows
# here takes 1.2 times this share at most.
_SHARE_OF_TIMEOUT = 0.7
_NUM_READS = 4  # between the first and the last all ranks have had their turn
_HOW_ON = (
    "Go on with --resume_from_checkpoint auto once that is mended; where a step or a save really takes so long, raise "
    "--ddp_timeout."
)


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
        for name in gathered[0] | other:
            here, there = gathered[0].get(name), other.get(name)
            if here != there:
                raise MaskftError(
                    f"Rank {rank} was started with `{name}` = {there!r} and rank 0 with {here!r}; start all processes "
                    "with the same settings, data, checkpoints and versions."
                )


def on_first_rank(act: Callable[[], T]) -> T:
    """Do something on the first process alone; every process has to call it.

    Returns:
        What `act` returned, which has to pickle, on every process.

    Raises:
        MaskftError, OSError: as `act` did; on every process alike.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return act()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = act()
        except (MaskftError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


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
    """Names the rank that the others wait for, and ends them, long before the backend's own timeout would.

    A thread of each process tells the launcher's store that it lives and how far it is. Where its own process has not
    gone on for most of `ddp_timeout`, it reads what the others told.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_event = time.monotonic()
        self._sign = Sign(socket.gethostname(), os.getpid())

    def event(self, step: int) -> None:
        """The process has gone on."""
        with self._lock:
            self._sign.num_events += 1
            self._sign.step = step
            self._last_event = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.event(state.global_step)

    on_prediction_step = on_evaluate = on_save = on_step_end

    @contextmanager
    def watching(self, args: TrainingArguments) -> Iterator[None]:
        """Watch while the block trains.

        Raises:
            LostRankError: the backend has lost the connection to a rank, or has given up waiting for it.
        """
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if args.world_size == 1 or address is None or port is None:
            yield
            return
        timeout = _SHARE_OF_TIMEOUT * args.ddp_timeout
        board = _Board(address, int(port), dist.get_rank(), args.world_size, interval=min(timeout / 20, 5.0))
        stop = threading.Event()
        self.event(0)
        board.tell(self._sign)  # so that the others know its host from the start
        threading.Thread(target=self._watch, args=(board, stop, timeout), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not _is_of_backend(error):
                raise
            words = str(error).strip().splitlines()[0].partition(". ")[0]
            raise LostRankError(f"Rank {board.rank} stops: {board.name_stalled()} ({words}). {_HOW_ON}") from error
        finally:
            stop.set()

    def _watch(self, board: "_Board", stop: threading.Event, timeout: float) -> None:
        has_warned = False
        reads: deque[list[Sign | None]] = deque(maxlen=_NUM_READS)
        while not stop.wait(board.interval):
            with self._lock:
                stalled_for = time.monotonic() - self._last_event
                self._sign.num_signs += 1
                self._sign.where = _main_thread_is_at() if stalled_for > timeout else ""
            board.tell(self._sign)
            if stalled_for <= timeout:
                reads.clear()
                continue
            try:
                reads.append(board.read())
                if len(reads) < _NUM_READS:
                    continue
                reason, is_certain = board.first_verdict(*name_stalled(reads[0], reads[-1]))
            except RuntimeError as error:
                reason, is_certain = board.is_silent(error), True
            waited = f"Rank {board.rank} has waited for {stalled_for:.0f} s: {reason}. {_HOW_ON}"
            if is_certain and not stop.is_set():
                # The main thread waits in a call that nothing else can end.
                sys.stderr.write(f"maskft: error: {waited}\n")
                sys.stderr.flush()
                os._exit(LostRankError.exit_status)
            if not has_warned:
                logger.warning("%s", waited)  # a long step of all of them looks the same
                has_warned = True


class _Board:
    """Where the ranks tell how far they are: the store of the launcher, which torchrun keeps in a process of its own.

    Attributes:
        rank: the own one.
        interval: seconds between two signs of a rank.
    """

    def __init__(self, address: str, port: int, rank: int, num_ranks: int, interval: float) -> None:
        self.rank, self.interval = rank, interval
        self._address = f"{address}:{port}"
        timeout = timedelta(seconds=max(3 * interval, 1.0))
        self._store: Any = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        # A run that the launcher starts again meets the signs of the one before.
        run = f"maskft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._names = [f"{run}/{i}" for i in range(num_ranks)]
        self._verdict = f"{run}/verdict"

    def tell(self, sign: Sign) -> None:
        """Leave a sign; one that is lost is no stall."""
        words = json.dumps(asdict(sign))
        try:
            self._ask(lambda: self._store.set(self._names[self.rank], words))
        except RuntimeError as error:
            logger.debug("A sign of life was lost: %s", error)

    def read(self) -> list[Sign | None]:
        """The last sign of each rank."""
        store = self._store
        told = self._ask(lambda: [store.get(name) if store.check([name]) else None for name in self._names])
        return [Sign(**json.loads(words)) if words else None for words in told]

    def name_stalled(self) -> str:
        """Which ranks the others wait for; takes some intervals."""
        try:
            before = self.read()
            time.sleep((_NUM_READS - 1) * self.interval)
            return self.first_verdict(*name_stalled(before, self.read()))[0]
        except RuntimeError as error:
            return self.is_silent(error)

    def first_verdict(self, reason: str, is_certain: bool) -> tuple[str, bool]:
        """What the first rank that named another said: it has ended since, and is silent as well."""
        store = self._store
        found = self._ask(lambda: store.get(self._verdict) if store.check([self._verdict]) else b"")
        if found:
            return found.decode(), True
        if is_certain:
            self._ask(lambda: store.set(self._verdict, reason))
        return reason, is_certain

    def is_silent(self, error: RuntimeError) -> str:
        """The words for a store that cannot be read."""
        return (
            f"the launcher's store at {self._address} does not answer, so that machine or its network is gone "
            f"({type(error).__name__})"
        )

    def _ask(self, act: Callable[[], Any]) -> Any:
        """What `act` finds in the store; its own timeout does not hold where a network takes messages and loses them.

        Raises:
            RuntimeError: the store is gone, or has not answered.
        """
        answers: SimpleQueue[Any] = SimpleQueue()

        def work() -> None:
            try:
                answers.put(act())
            except RuntimeError as error:
                answers.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            answer = answers.get(timeout=max(3 * self.interval, 1.0))
        except Empty:
            answer = RuntimeError("no answer")
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def name_stalled(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> tuple[str, bool]:
    """Say which ranks keep the others waiting, from what each told at two moments (None: nothing yet).

    Ranks that tell nothing new are stopped or gone. Where all live, those that have done least are behind. Where all
    have done as much, none can be named, and the places at which they are must do.

    Returns:
        The words, and whether they name a rank.
    """
    silent = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if b is None or a == b]
    if silent:
        what = "no longer answers: the process is stopped, or its machine or network is gone"
        return "; ".join(f"{_name(i, after[i])} {what}" for i in silent), True
    signs = [sign for sign in after if sign is not None]
    least = min(sign.num_events for sign in signs)
    if least < max(sign.num_events for sign in signs):
        behind = [i for i, sign in enumerate(signs) if sign.num_events == least]
        words = [f"{_name(i, signs[i])} is behind the others, at {signs[i].where or 'work'}" for i in behind]
        return "; ".join(words), True
    places = "; ".join(f"{_name(i, sign)} is at {sign.where or 'work'}" for i, sign in enumerate(signs))
    return f"all processes are equally far: {places}", False


def _name(rank: int, sign: Sign | None) -> str:
    if sign is None:
        return f"rank {rank}, which never answered,"
    return f"rank {rank} (host {sign.host}, process {sign.pid}, after step {sign.step})"


def _main_thread_is_at() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    return f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _is_of_backend(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors, which name its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
