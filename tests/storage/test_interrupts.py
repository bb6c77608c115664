import os
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from maskft.storage.interrupts import NAMES, stoppable, uninterrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (*NAMES, signal.SIGALRM)] + [
        sys.unraisablehook,
        threading.excepthook,
    ]


@BOTH
def test_a_signal_raises_and_all_is_as_it_was_then(number) -> None:
    before = handlers()
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert stop.number == number
        stop.has_ended = True
        os.kill(os.getpid(), number)  # says nothing more
    assert handlers() == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_a_library_swallows_comes_again() -> None:
    begun = time.monotonic()
    with stoppable() as stop:
        with suppress(BaseException):  # as an import that can be done without
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(30)
        stop.has_ended = True
    assert time.monotonic() - begun < 20


@BOTH
@pytest.mark.parametrize("fails", [False, True])
def test_a_short_step_is_not_cut_and_its_failure_does_not_lose_the_signal(number, fails) -> None:
    done = []
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            done.append(send(number) or stop.number) or (fails and 1 / 0)
        with suppress(KeyboardInterrupt), uninterrupted():
            time.sleep(1.2)  # the signal comes again, and what a stopped command puts away is not cut either
            done.append(1)
        stop.has_ended = True
    assert done == [0, 1]
    assert stop.number == number


def test_in_another_thread_nothing_is_changed() -> None:
    before, found = handlers(), []

    def act() -> None:
        with stoppable() as stop, uninterrupted():
            found.append((handlers() == before, stop.number))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == [(True, 0)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_copy_ends_with_the_signals_status() -> None:
    reading, writing = os.pipe()
    with stoppable():
        pid = os.fork()
        if not pid:
            try:
                os.write(writing, b"1")  # a signal that came while it was made would be lost
                time.sleep(30)
            finally:
                os._exit(1)
        os.read(reading, 1)
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
