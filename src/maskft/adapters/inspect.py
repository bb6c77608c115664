"""What an adapter holds: in numbers, as a table, and as a picture."""

import io
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from maskft.adapters.model_layout import read_layout
from maskft.adapters.read import WEIGHTS_FILE, Adapter, read_adapter
from maskft.errors import MaskftError
from maskft.masks import check_packed, num_kept_bits
from maskft.storage.files import atomic_write_bytes

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_MAX_CELLS_WITH_TEXT = 400


@dataclass(frozen=True)
class ModuleSummary:
    """One mask; the two numbers of weights differ only where the padding of its rows is not known."""

    layer: int | None  # None outside the numbered layers
    kind: str  # its name inside the layer
    num_kept: int
    min_weights: int
    max_weights: int


@dataclass(frozen=True)
class Share:
    """Share of weights kept, in [0, 1]: exact where `low` equals `high`, else between them; NaN without masks."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def __str__(self) -> str:
        if math.isnan(self.low):
            return ""
        low, high = f"{100 * self.low:.2f}", f"{100 * self.high:.2f}"
        return low if self.low == self.high else f"{low} to {high}"


@dataclass(frozen=True)
class AdapterSummary:
    """What :func:`inspect_adapter` counted: the adapter, the bytes of its file, and its masks by layers."""

    adapter: Adapter
    num_bytes: int
    modules: tuple[ModuleSummary, ...]

    @property
    def num_kept(self) -> int:
        """Weights kept."""
        return sum(m.num_kept for m in self.modules)

    @property
    def num_weights(self) -> tuple[int, int]:
        """Fewest and most weights covered; equal where `is_exact`."""
        return sum(m.min_weights for m in self.modules), sum(m.max_weights for m in self.modules)

    @property
    def is_exact(self) -> bool:
        """Whether the number of weights is known; the file alone does not tell the padding of its rows."""
        low, high = self.num_weights
        return low == high

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each covered weight (for the most it can cover where that is not known)."""
        return 8 * self.num_bytes / self.num_weights[1]

    @property
    def layers(self) -> list[int | None]:
        """Layers in order; None, for what is outside the numbered layers, last."""
        return list(dict.fromkeys(m.layer for m in self.modules))

    @property
    def kinds(self) -> list[str]:
        """Names of the modules inside their layers, in the order of the first layer that has them."""
        return list(dict.fromkeys(m.kind for m in self.modules))

    def share(self, **where: int | str | None) -> Share:
        """Share kept of all covered weights, or of those of one `layer`, one `kind` of module, or both."""
        chosen = [m for m in self.modules if all(getattr(m, key) == value for key, value in where.items())]
        num_kept = sum(m.num_kept for m in chosen)
        if not chosen:
            return Share(math.nan, math.nan)
        return Share(num_kept / sum(m.max_weights for m in chosen), num_kept / sum(m.min_weights for m in chosen))


def inspect_adapter(adapter_path: str | Path) -> AdapterSummary:
    """Summarize an adapter's folder.

    The number of weights is exact where the base model's folder, or the scores of a training checkpoint, tell the
    shapes; otherwise the last 0 to 7 columns may be padding, and shares are given as a range.

    Raises:
        MaskftError: see :func:`maskft.adapters.read.read_adapter`; or the base model's shapes do not fit.
    """
    adapter = read_adapter(adapter_path)
    shapes = _base_shapes(adapter) | adapter.score_shapes
    modules = [_summarize(name, mask, shapes.get(name)) for name, mask in adapter.masks.items()]
    modules.sort(key=lambda m: (m.layer is None, m.layer or 0, m.kind))
    return AdapterSummary(adapter, (adapter.path / WEIGHTS_FILE).stat().st_size, tuple(modules))


def render(summary: AdapterSummary) -> Table:
    """The share kept in percent: a row for each layer, a column for each kind of module, totals at the edges."""
    config, kinds = summary.adapter.config, summary.kinds
    low, high = summary.num_weights
    weights = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    density = f", density {config.density}" if config.selection != "threshold" else ""
    caption = (
        f"{summary.num_kept:,} of {weights} weights kept; {summary.num_bytes:,} bytes, "
        f"{summary.bits_per_weight:.2f} bits a weight\n"
        f"selection {config.selection}{density}\n"
        f"base model {config.base_model_name_or_path}, fingerprint {config.base_fingerprint}"
    )
    if not summary.is_exact:
        caption += "\nThe base model's folder is not here, so the padding of rows is not known: shares are ranges."
    # Seven kinds of modules fit into 80 columns.
    table = Table(title="Share kept, %", caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    for label in ("layer", *_labels(kinds), "all"):
        table.add_column(label, justify="right", overflow="fold")
    for layer in summary.layers:
        shares = [*(summary.share(layer=layer, kind=kind) for kind in kinds), summary.share(layer=layer)]
        table.add_row(_layer_label(layer), *map(str, shares))
    table.add_section()
    table.add_row("all", *(str(summary.share(kind=kind)) for kind in kinds), str(summary.share()))
    return table


def draw_heat_map(summary: AdapterSummary, path: str | Path) -> None:
    """Draw the share kept, layer by kind of module (where it is a range, its middle), in the format of `path`'s ending.

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
    shares = np.array([[summary.share(layer=layer, kind=kind).middle for kind in kinds] for layer in layers])
    figure = Figure(figsize=(2.8 + 0.8 * len(kinds), 2.2 + 0.35 * len(layers)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(_draw_cells(axes, shares), ax=axes, label="share kept", format="%.3f")
    axes.set_xticks(range(len(kinds)), _labels(kinds), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), map(_layer_label, layers))
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    axes.set_title(f"Share kept: {100 * summary.share().middle:.2f} % of all masked weights", fontsize=10)
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


def _base_shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """The shapes of the masked layers, as far as the base model's folder is here and tells them."""
    base = adapter.config.base_model_name_or_path
    with suppress(MaskftError):  # the masks can be counted all the same
        if base and Path(base).is_dir():
            layout = read_layout(base)
            layers = {name: layout.find(name) for name in adapter.masks}
            return {name: (layer.out_features, layer.in_features) for name, layer in layers.items() if layer}
    return {}


def _summarize(name: str, mask: Tensor, shape: tuple[int, int] | None) -> ModuleSummary:
    if shape is not None:
        check_packed(mask, shape, name)
        low = high = shape[0] * shape[1]
    else:
        # A bit that is set anywhere in the last byte of a row is no padding.
        rows, columns = mask.shape
        used = max((int(byte).bit_length() for byte in mask[:, -1].unique()), default=0)
        low, high = rows * (8 * (columns - 1) + max(used, 1)), rows * 8 * columns
    match = _LAYER.search(name)
    layer, kind = (int(match[1]), name[match.end() :]) if match else (None, name)
    return ModuleSummary(layer, kind, num_kept_bits(mask), low, high)


def _labels(kinds: Sequence[str]) -> list[str]:
    """The last part of each kind's name where that is enough to tell them apart."""
    short = [kind.rpartition(".")[2] for kind in kinds]
    return [s if short.count(s) == 1 else kind for s, kind in zip(short, kinds, strict=True)]


def _layer_label(layer: int | None) -> str:
    return "-" if layer is None else str(layer)
