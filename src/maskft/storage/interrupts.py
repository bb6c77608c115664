"""Ctrl-C and SIGTERM: a command ends at once and in one sentence, and never in the middle of a step that is short."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_REMINDERS = [signal.SIGALRM] if hasattr(signal, "SIGALRM") else []  # Windows has none
HELD: list[Path] = []
"""Output folders of a command that has not come to its end."""


class Stop:
    """The number of the signal that is to end a command, 0 until there is one; and whether it has ended."""

    number, has_ended = 0, False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within, both signals raise KeyboardInterrupt in the main thread.

    They do so again each second until the block ends, for not all libraries let it pass: an import that fails may be
    done without, and a callback of C has nobody to pass it to. What a library writes of it then is not shown.
    """
    stop, owner = Stop(), os.getpid()

    def interrupt(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a copy, as a data loader's worker is
            os._exit(128 + number)
        if stop.has_ended or (number in _REMINDERS and not stop.number):
            return
        if not stop.number:
            stop.number = number
            sys.unraisablehook = lambda _: None
            threading.excepthook = lambda _: None
            for reminder in _REMINDERS:
                signal.signal(reminder, interrupt)  # again, for lm-eval's timeouts leave their own handler there
                signal.setitimer(signal.ITIMER_REAL, 1, 1)
        raise KeyboardInterrupt

    HELD.clear()
    hooks = sys.unraisablehook, threading.excepthook
    with _handled(interrupt):
        try:
            yield stop
        finally:
            if stop.number and _REMINDERS:
                signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook, threading.excepthook = hooks


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that come within, the reminder of one too, are acted on at the end, however it ends."""
    caught: list[int] = []
    try:
        with _handled(lambda number, _: caught.append(number)):
            yield
    finally:
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Both signals and the reminder go to a handler, where Python allows that: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (*NAMES, *_REMINDERS)}
    try:
        yield
    finally:
        for number, its in before.items():
            signal.signal(number, its)
