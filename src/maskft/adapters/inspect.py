"""What an adapter holds: in numbers, as a table, and as a picture."""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from maskft.adapters.read import WEIGHTS_FILE, Adapter, ModelLayout, read_adapter, read_layout
from maskft.errors import MaskftError
from maskft.masks import check_packed, num_kept_bits
from maskft.storage.files import atomic_write_bytes

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_MAX_CELLS_WITH_TEXT = 400


@dataclass(frozen=True)
class ModuleSummary:
    """One mask; the two numbers of weights differ only where the padding of its rows is not known.

    Attributes:
        name: the module.
        layer: its layer, or None outside the numbered layers.
        kind: its name inside the layer.
        num_kept: weights kept.
        min_weights: fewest weights it can cover.
        max_weights: most weights it can cover.
    """

    name: str
    layer: int | None
    kind: str
    num_kept: int
    min_weights: int
    max_weights: int


@dataclass(frozen=True)
class Share:
    """Share of weights kept, in [0, 1]: exact where `low` equals `high`, else between them."""

    low: float
    high: float

    @property
    def is_exact(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        if self.is_exact:
            return f"{100 * self.low:.2f}"
        return f"{100 * self.low:.2f} to {100 * self.high:.2f}"


@dataclass(frozen=True)
class AdapterSummary:
    """What :func:`inspect_adapter` found.

    Attributes:
        path: the adapter's folder.
        base_model: name or folder of the base model, as the adapter has it.
        base_fingerprint: hash of the masked weights of the base model.
        selection: how the mask was chosen.
        density: the share asked for; without effect under selection='threshold'.
        has_scores: whether training can go on from it.
        num_bytes: bytes of the file of masks.
        modules: the masks.
    """

    path: Path
    base_model: str | None
    base_fingerprint: str | None
    selection: str
    density: float
    has_scores: bool
    num_bytes: int
    modules: tuple[ModuleSummary, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the number of weights is known; the file alone does not tell the padding of its rows."""
        return all(m.min_weights == m.max_weights for m in self.modules)

    @property
    def num_kept(self) -> int:
        """Weights kept."""
        return sum(m.num_kept for m in self.modules)

    @property
    def num_weights(self) -> tuple[int, int]:
        """Fewest and most weights covered; equal where `is_exact`."""
        return sum(m.min_weights for m in self.modules), sum(m.max_weights for m in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each covered weight (for the most it can cover where that is not known)."""
        return 8 * self.num_bytes / self.num_weights[1]

    @property
    def kept_share(self) -> Share:
        """Share kept of all covered weights."""
        return _share(self.modules)

    @property
    def layers(self) -> list[int | None]:
        """Layers in order; None, for what is outside the numbered layers, last."""
        found = {m.layer for m in self.modules}
        ordered = sorted(layer for layer in found if layer is not None)
        return [*ordered, None] if None in found else [*ordered]

    @property
    def kinds(self) -> list[str]:
        """Names of the modules inside their layers, in the order of the first layer that has them."""
        return list(dict.fromkeys(m.kind for m in self.modules))

    def share_by_layer(self) -> dict[int | None, Share]:
        """Share kept in each layer."""
        return {layer: _share(m for m in self.modules if m.layer == layer) for layer in self.layers}

    def share_by_kind(self) -> dict[str, Share]:
        """Share kept in each kind of module."""
        return {kind: _share(m for m in self.modules if m.kind == kind) for kind in self.kinds}

    def share(self, layer: int | None, kind: str) -> Share | None:
        """Share kept in one module, or None where it is not masked."""
        modules = [m for m in self.modules if m.layer == layer and m.kind == kind]
        return _share(modules) if modules else None


def inspect_adapter(adapter_path: str | Path) -> AdapterSummary:
    """Summarize an adapter's folder.

    The number of weights is exact where the base model's folder, or the scores of a training checkpoint, tell the
    shapes; otherwise the last 0 to 7 columns may be padding, and shares are given as a range.

    Raises:
        MaskftError: see :func:`maskft.adapters.read.read_adapter`; or the base model's shapes do not fit.
    """
    adapter = read_adapter(adapter_path)
    layout = _base_layout(adapter)
    return AdapterSummary(
        path=adapter.path,
        base_model=adapter.config.base_model_name_or_path,
        base_fingerprint=adapter.config.base_fingerprint,
        selection=adapter.config.selection,
        density=adapter.config.density,
        has_scores=adapter.has_scores,
        num_bytes=(adapter.path / WEIGHTS_FILE).stat().st_size,
        modules=tuple(
            _summarize(name, mask, _shape(adapter, layout, name))
            for name, mask in sorted(adapter.masks.items(), key=lambda item: _place(item[0]))
        ),
    )


def render(summary: AdapterSummary) -> Table:
    """The share kept in percent: a row for each layer, a column for each kind of module, totals at the edges."""
    low, high = summary.num_weights
    weights = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    caption = (
        f"{summary.num_kept:,} of {weights} weights kept; {summary.num_bytes:,} bytes, "
        f"{summary.bits_per_weight:.2f} bits a weight\n"
        f"selection {summary.selection}"
        + (f", density {summary.density}" if summary.selection != "threshold" else "")
        + f"\nbase model {summary.base_model}, fingerprint {summary.base_fingerprint}"
    )
    if not summary.is_exact:
        caption += "\nThe base model's folder is not here, so the padding of rows is not known: shares are ranges."
    # Seven kinds of modules fit into 80 columns.
    table = Table(title="Share kept, %", caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    for label in ("layer", *_labels(summary), "all"):
        table.add_column(label, justify="right", overflow="fold")
    for layer, share in summary.share_by_layer().items():
        cells = [summary.share(layer, kind) for kind in summary.kinds]
        table.add_row("-" if layer is None else str(layer), *["" if c is None else str(c) for c in cells], str(share))
    table.add_section()
    table.add_row("all", *[str(s) for s in summary.share_by_kind().values()], str(summary.kept_share))
    return table


def draw_heat_map(summary: AdapterSummary, path: str | Path) -> None:
    """Draw the share kept, layer by kind of module; where it is a range, its middle.

    Args:
        path: the picture, in the format of its ending: .png, .pdf, .svg or another that matplotlib writes.

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
    values = []
    for layer in layers:
        shares = [summary.share(layer, kind) for kind in kinds]
        values.append([float("nan") if s is None else _middle(s) for s in shares])
    figure = Figure(figsize=(2.8 + 0.8 * len(kinds), 2.2 + 0.35 * len(layers)), layout="constrained")
    axes = figure.subplots()
    known = [value for line in values for value in line if not math.isnan(value)]
    # At least a percent wide, so that a rounding of the number kept does not look like a difference.
    middle = (min(known) + max(known)) / 2
    reach = max((max(known) - min(known)) / 2, 0.005)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=middle - reach, vmax=middle + reach)
    axes.set_xticks(range(len(kinds)), _labels(summary), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers])
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    axes.set_title(f"Share kept: {100 * _middle(summary.kept_share):.2f} % of all masked weights", fontsize=10)
    figure.colorbar(image, ax=axes, label="share kept", format="%.3f")
    if len(layers) * len(kinds) <= _MAX_CELLS_WITH_TEXT:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    is_light = value > middle + 0.2 * reach
                    axes.text(
                        column,
                        row,
                        f"{value:.3f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="black" if is_light else "white",
                    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=picture_format, dpi=150)
    atomic_write_bytes(path, buffer.getvalue())


def _middle(share: Share) -> float:
    return (share.low + share.high) / 2


def _base_layout(adapter: Adapter) -> ModelLayout | None:
    base = adapter.config.base_model_name_or_path
    if not base or not Path(base).is_dir():
        return None
    try:
        return read_layout(base)
    except MaskftError:
        return None  # the masks can be counted all the same


def _shape(adapter: Adapter, layout: ModelLayout | None, name: str) -> tuple[int, int] | None:
    shape = adapter.score_shapes.get(name)
    linear = layout.find(name) if layout is not None else None
    if shape is None and linear is not None:
        shape = (linear.out_features, linear.in_features)
    return shape


def _summarize(name: str, mask: Tensor, shape: tuple[int, int] | None) -> ModuleSummary:
    if shape is not None:
        check_packed(mask, shape, name)
        low = high = shape[0] * shape[1]
    else:
        # A bit that is set anywhere in the last byte of a row is no padding.
        rows, columns = mask.shape
        used = max((int(byte).bit_length() for byte in mask[:, -1].unique()), default=0)
        low, high = rows * (8 * (columns - 1) + max(used, 1)), rows * 8 * columns
    layer, kind = _place(name)[1:]
    return ModuleSummary(name, layer if layer >= 0 else None, kind, num_kept_bits(mask), low, high)


def _place(name: str) -> tuple[bool, int, str]:
    """Whether a module is outside the numbered layers, its layer (-1 there), and its name inside it."""
    match = _LAYER.search(name)
    if match is None:
        return True, -1, name
    return False, int(match.group(1)), name[match.end() :]


def _labels(summary: AdapterSummary) -> list[str]:
    """The last part of each kind's name where that is enough to tell them apart."""
    short = [kind.rpartition(".")[2] for kind in summary.kinds]
    return [s if short.count(s) == 1 else kind for s, kind in zip(short, summary.kinds, strict=True)]


def _share(modules: Iterable[ModuleSummary]) -> Share:
    found = list(modules)
    num_kept = sum(m.num_kept for m in found)
    return Share(num_kept / sum(m.max_weights for m in found), num_kept / sum(m.min_weights for m in found))
