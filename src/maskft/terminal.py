"""What is printed, by us and by libraries: as it was written, and without characters that steer a terminal."""

import logging
import re
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but for tab and newline, C1, what turns the direction of text or breaks lines, and halves of characters.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_format_warning = warnings.formatwarning


def printable(text: str) -> str:
    """The text without control characters (an ANSI escape stays as harmless text), changes of direction, surrogates."""
    return _STEERING.sub("", text)


def markdown(text: object) -> str:
    """A foreign text in one line of Markdown, as code that ends nowhere else and stays in its cell of a table."""
    line = " ".join(printable(str(text)).split()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


class PlainConsole(Console):
    """A console to which text is text: names may hold brackets, colons and anything else."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with the text of every segment :func:`printable`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def print_plainly() -> None:
    """Make what any library logs, and warns of, :func:`printable` in this process."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *args, **kwargs: printable(_format_warning(*args, **kwargs))
