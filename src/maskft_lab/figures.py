"""A figure of matplotlib as the bytes of its files."""

import io

from matplotlib.figure import Figure


def save_figure(figure: Figure) -> dict[str, bytes]:
    """The picture as `png` and as `svg`."""
    pictures = {}
    for suffix, settings in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, **settings)
        pictures[suffix] = buffer.getvalue()
    return pictures
