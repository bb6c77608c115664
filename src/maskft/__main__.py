"""The process of the command `maskft`."""

import os
import signal
import sys


def run() -> int:
    """Its exit status; a second Ctrl-C, while what runs at exit takes its time, ends the process at once."""
    try:
        from maskft.cli import main

        status = main()
    except KeyboardInterrupt:  # before any command has begun
        sys.stderr.write("maskft: stopped by Ctrl-C; nothing is kept.\n")
        return 128 + signal.SIGINT
    eval("0")  # Python notes a KeyboardInterrupt that passed through code of text, and would end by the signal
    if status > 128:
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
    return status


if __name__ == "__main__":
    sys.exit(run())
