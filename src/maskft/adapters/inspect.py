"""What an adapter holds: in numbers, as a table, and as a picture."""

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from maskft.adapters.model_layout import layer_shapes
from maskft.adapters.read import WEIGHTS_FILE, Adapter, read_adapter
from maskft.errors import MaskftError
from maskft.masks import check_packed, num_kept_bits
from maskft.report import PageTable, plain_text
from maskft.storage.files import atomic_write_bytes
from maskft.terminal import printable

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")
_MAX_CELLS_WITH_TEXT = 400
_MAX_CELLS = 1_000_000
# Of a picture, rows and columns that have a name and their own size; a table has no more columns either.
_MAX_ROWS, _MAX_COLUMNS = 128, 32
_MAX_NAME = 40
_ALL: Any = object()


@dataclass(frozen=True)
class Kept:
    """Weights kept, and covered."""

    num_kept: int = 0
    num_weights: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.num_kept + other.num_kept, self.num_weights + other.num_weights)

    @property
    def share(self) -> float:
        """Share of weights kept, in [0, 1]; NaN without masks."""
        return self.num_kept / self.num_weights if self.num_weights else math.nan

    def __str__(self) -> str:
        return f"{100 * self.share:.2f}" if self.num_weights else ""


@dataclass(frozen=True)
class AdapterSummary:
    """What :func:`inspect_adapter` counted: the adapter, the bytes of its file, and its masks by layer and kind.

    Layers are in order; None, for what is outside the numbered layers, is last. The kind of a module is its name inside
    its layer. Counts are exact unless a layer's shape was not known and its last columns may be padding.
    """

    adapter: Adapter
    num_bytes: int
    layers: list[int | None]
    kinds: list[str]
    totals: dict[tuple[Any, Any], Kept]
    is_exact: bool

    def total(self, **where: int | str | None) -> Kept:
        """The sum of all masks, or of those of one `layer`, one `kind` of module, or both."""
        return self.totals.get((where.get("layer", _ALL), where.get("kind", _ALL)), Kept())


def inspect_adapter(adapter_path: str | Path) -> AdapterSummary:
    """Summarize an adapter's folder.

    The base model's folder, or the scores of a training checkpoint, tell the shapes of the layers. Otherwise last
    columns in which no row keeps a weight count as padding.

    Raises:
        MaskftError: see :func:`maskft.adapters.read.read_adapter`; or the base model's shapes do not fit.
    """
    adapter = read_adapter(adapter_path)
    # Without a base model that can be read, the masks can be counted all the same.
    shapes = layer_shapes(adapter.config.base_model_name_or_path, adapter.masks) | adapter.score_shapes
    totals: defaultdict[tuple[Any, Any], Kept] = defaultdict(Kept)
    for name, mask in adapter.masks.items():
        (layer, kind), kept = _position(name), _count(name, mask, shapes.get(name))
        for place in ((layer, kind), (layer, _ALL), (_ALL, kind), (_ALL, _ALL)):
            totals[place] += kept  # an encoder and a decoder both have a layer 0
    places = sorted(map(_position, adapter.masks), key=lambda place: (place[0] is None, place[0] or 0, place[1]))
    layers, kinds = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))
    is_exact = all(name in shapes or _num_columns(mask) % 8 == 0 for name, mask in adapter.masks.items())
    num_bytes = (adapter.path / WEIGHTS_FILE).stat().st_size
    return AdapterSummary(adapter, num_bytes, layers, kinds, dict(totals), is_exact)


def render(summary: AdapterSummary) -> PageTable:
    """The share kept in percent: a row for each layer, a column for each kind of module, totals at the edges."""
    config, kinds = summary.adapter.config, summary.kinds
    total = summary.total()
    density = f", density {config.density}" if config.selection != "threshold" else ""
    caption = (
        f"{total.num_kept:,} of {total.num_weights:,} weights kept; {summary.num_bytes:,} bytes, "
        f"{8 * summary.num_bytes / total.num_weights:.2f} bits a weight\n"
        f"selection {config.selection}{density}\n"
        f"base model {config.base_model_name_or_path}, fingerprint {config.base_fingerprint}"
    )
    if not summary.is_exact:
        caption += "\nThe base model's folder is not here: last columns that no row keeps are taken for padding."
    if len(kinds) > _MAX_COLUMNS:
        caption += f"\nLayers stand together, for there are {len(kinds)} kinds of modules."
    title, labels = "Share kept, %", _labels(kinds)
    if len(kinds) > _MAX_COLUMNS:
        of_kinds = [(label, str(summary.total(kind=kind))) for label, kind in zip(labels, kinds, strict=True)]
        return PageTable(("module", "all"), of_kinds, title, caption)
    places: list[tuple[str, dict[str, Any]]] = [(_layer_label(layer), {"layer": layer}) for layer in summary.layers]
    rows = [
        (label, *(str(summary.total(kind=kind, **where)) for kind in kinds), str(summary.total(**where)))
        for label, where in [*places, ("all", {})]
    ]
    return PageTable(("layer", *labels, "all"), rows, title, caption)


@plain_text
def draw_heat_map(summary: AdapterSummary, path: str | Path) -> None:
    """Draw the share kept, layer by kind of module, in the format of `path`'s ending.

    Raises:
        MaskftError: another ending, or the disk refuses.
    """
    picture_format = Path(path).suffix.lower().removeprefix(".")
    known = FigureCanvasAgg.get_supported_filetypes()
    if picture_format not in known:
        raise MaskftError(
            f"The name of a picture must end in one of {', '.join(f'.{ending}' for ending in sorted(known))}, got "
            f"{str(path)!r}; rename it."
        )
    layers, kinds = summary.layers, summary.kinds
    if len(layers) * len(kinds) > _MAX_CELLS:
        raise MaskftError(
            f"{len(layers)} layers with {len(kinds)} kinds of modules are too many for a picture; leave it out."
        )
    shares = np.array([[summary.total(layer=layer, kind=kind).share for kind in kinds] for layer in layers])
    slanted = 0.06 * max(map(len, labels := _labels(kinds)))
    size = 2.2 + slanted + 0.8 * min(len(kinds), _MAX_COLUMNS), 1.6 + slanted + 0.35 * min(len(layers), _MAX_ROWS)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    figure.colorbar(_draw_cells(axes, shares), ax=axes, label="share kept", format="%.3f")
    columns, rows = (slice(None, None, -(-len(kinds) // _MAX_COLUMNS)), slice(None, None, -(-len(layers) // _MAX_ROWS)))
    axes.set_xticks(range(len(kinds))[columns], labels[columns], rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers))[rows], [_layer_label(layer) for layer in layers[rows]])
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    axes.set_title(f"Share kept: {summary.total()} % of all masked weights", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format=picture_format, dpi=150)
    atomic_write_bytes(path, picture.getvalue())


def _draw_cells(axes: Any, shares: "np.ndarray[Any, Any]") -> Any:
    """The shares as colours, and as numbers where there is room; NaN, where nothing is masked, stays empty."""
    # At least a percent wide, so that a rounding of the number kept does not look like a difference.
    middle = (np.nanmin(shares) + np.nanmax(shares)) / 2
    reach = max(np.nanmax(shares) - middle, 0.005)
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=middle - reach, vmax=middle + reach)
    if shares.size <= _MAX_CELLS_WITH_TEXT:
        for (row, column), share in np.ndenumerate(shares):
            if not math.isnan(share):
                colour = "black" if share > middle + 0.2 * reach else "white"
                axes.text(column, row, f"{share:.3f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _count(name: str, mask: Tensor, shape: tuple[int, int] | None) -> Kept:
    if shape is not None:
        check_packed(mask, shape, name)
    columns = shape[1] if shape is not None else _num_columns(mask)
    return Kept(num_kept_bits(mask), len(mask) * columns)


def _num_columns(mask: Tensor) -> int:
    """Up to the last in which a row of a packed mask keeps a weight, for that one is no padding."""
    used = max(int(byte).bit_length() for byte in mask[:, -1].unique())
    return 8 * (mask.shape[1] - 1) + max(used, 1)


def _position(name: str) -> tuple[int | None, str]:
    """The layer of a module, and its name inside it."""
    match = _LAYER.search(name)
    return (int(match[1]), name[match.end() :]) if match else (None, name)


def _labels(kinds: Sequence[str]) -> list[str]:
    """The last part of each kind's name where that is enough to tell them apart; of long ones the end."""
    short = [kind.rpartition(".")[2] for kind in kinds]
    counts = Counter(short)
    names = [printable(s if counts[s] == 1 else kind) for s, kind in zip(short, kinds, strict=True)]
    return [name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names]


def _layer_label(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
