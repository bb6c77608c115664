"""`maskft landscape`: the loss around a model and its masked version, in the same directions, and its sharpness."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from maskft.data.rows import data_hash, load_rows
from maskft.data.tokens import tokenise_rows
from maskft.errors import MaskftError, require_flags
from maskft.evaluation.models import ModelSpec, check_models
from maskft.storage.environment import machine, versions
from maskft.storage.files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    require_empty_output,
    require_writable,
)
from maskft.training.prepare import check_model, load_tokenizer
from maskft.tuner import MaskConfig, check_targets, find_group
from maskft_lab.landscape.curvature import Sharpness, largest_eigenvalue
from maskft_lab.landscape.directions import Weights, losses_at, random_direction
from maskft_lab.landscape.grid import Grid, adaptive_grid
from maskft_lab.landscape.surfaces import describe_sharpness, draw_landscape, interactive_page, plotly

_MAX_POINTS_PER_PASS = 16
# Beyond both ends of the line from the model to its masked version, in its length.
_OVERSHOOT = 0.5


@dataclass
class LandscapeArguments:
    """What `maskft landscape` can be told."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of the model."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of a mask on that model. Default: the model alone."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Rows of the loss, as for maskft train."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it must be new or empty."})
    limit: int = field(default=64, metadata={"help": "Rows of the loss, a random part that --seed chooses."})
    max_length: int = field(default=512, metadata={"help": "Tokens after which a row is cut."})
    batch_size: int = field(default=16, metadata={"help": "Rows in one pass."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layers whose weights move, from 0. Default: all; with an adapter, its layers."}
    )
    span: float = field(default=0.5, metadata={"help": "Half the width of the surfaces, in filter norms."})
    num_points_1d: int = field(default=33, metadata={"help": "Most points of a line."})
    num_points_2d: int = field(default=121, metadata={"help": "Most points of a surface."})
    num_iterations: int = field(default=30, metadata={"help": "Most Hessian-vector products for the sharpness."})
    points_per_pass: int | None = field(
        default=None, metadata={"help": "Points that share one pass. Default: 1 on a CPU, what memory allows on a GPU."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the directions and of the rows."})

    def __post_init__(self) -> None:
        require_flags(self, "model_name_or_path", "dataset_name", "output_dir")
        at_least = {"limit": 1, "max_length": 2, "batch_size": 1, "num_points_1d": 3, "num_points_2d": 9}
        for name, low in (at_least | {"num_iterations": 1}).items():
            if getattr(self, name) < low:
                raise MaskftError(f"`{name}` must be at least {low}, got {getattr(self, name)}.")
        if self.points_per_pass is not None and self.points_per_pass < 1:
            raise MaskftError(f"`points_per_pass` must be at least 1, got {self.points_per_pass}.")
        if not 0 < self.span < math.inf:
            raise MaskftError(f"`span` must be a positive number, got {self.span}.")
        if self.seed < 0:
            raise MaskftError(f"`seed` must be at least 0, got {self.seed}.")
        if self.adapter_name_or_path and self.layers_to_transform is not None:
            raise MaskftError("With --adapter_name_or_path the adapter's layers move; leave --layers_to_transform out.")


@dataclass(frozen=True)
class Landscape:
    """The loss (mean NLL per trained token, nats) around one or two sets of weights.

    Attributes:
        names: what the sets are called, in the order of the grids' columns: "model" alone, or "unmasked" and "masked".
        line: along the first direction.
        plane: along both.
        between: from the first set (0) to the second (1), and beyond; None where there is one set.
        sharpness: of each set.
    """

    names: tuple[str, ...]
    line: Grid
    plane: Grid
    between: Grid | None
    sharpness: tuple[Sharpness, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as in `landscape.json`."""
        grids = {"line": self.line, "plane": self.plane, "between": self.between}
        return {
            "names": list(self.names),
            **{
                key: {
                    "points": grid.points.tolist(),
                    "losses": [[v if math.isfinite(v) else None for v in row] for row in grid.values.tolist()],
                    "largest_expected_error": grid.largest_misfit,
                }
                for key, grid in grids.items()
                if grid is not None
            },
            "sharpness": {
                name: asdict(value) | {"history": list(value.history)}
                for name, value in zip(self.names, self.sharpness, strict=True)
            },
        }


def measure_landscape(
    terms: Sequence[Callable[[Weights], torch.Tensor]],
    places: dict[str, Weights],
    *,
    span: float,
    num_points_1d: int,
    num_points_2d: int,
    num_iterations: int,
    points_per_pass: int = 1,
    seed: int = 0,
    advance: Callable[[str, int], object] = lambda what, n: None,
) -> Landscape:
    """The loss around each of `places`, in the same filter-normalised directions, which are those of the first.

    Args:
        terms: the loss, as functions of the moved weights that add up to it.
        places: one or two sets of the moved weights, by name.
        span: the surfaces reach from -span to span.
        num_points_1d: most points of a line.
        num_points_2d: most points of a surface.
        num_iterations: most Hessian-vector products for each sharpness.
        points_per_pass: points that share one pass.
        seed: of both directions and of the first vector of each sharpness.
        advance: called with what is measured and the number of points or products after each pass.

    Raises:
        MaskftError: the loss is a finite number at too few places for a line or a surface.
    """
    first = next(iter(places.values()))
    directions = [random_direction(first, seed), random_direction(first, seed + 1)]

    def around(num_directions: int, what: str) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        return lambda points: np.stack(
            [
                losses_at(
                    terms,
                    weights,
                    directions[:num_directions],
                    points,
                    points_per_pass=points_per_pass,
                    advance=lambda n: advance(what, n),
                )
                for weights in places.values()
            ],
            axis=1,
        )

    line = adaptive_grid(around(1, "line"), -span, span, 1, num_points_1d)
    _require_extent(line, span)
    plane = adaptive_grid(around(2, "plane"), -span, span, 2, num_points_2d)
    _require_extent(plane, span)
    between = None
    if len(places) > 1:
        second = list(places.values())[1]
        step = {name: second[name].float() - first[name].float() for name in first}

        def along(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return losses_at(
                terms,
                first,
                [step],
                points,
                points_per_pass=points_per_pass,
                advance=lambda n: advance("between", n),
            )[:, None]

        between = adaptive_grid(along, -_OVERSHOOT, 1 + _OVERSHOOT, 1, num_points_1d)
    sharpness = tuple(
        largest_eigenvalue(
            terms,
            weights,
            list(weights),
            num_iterations=num_iterations,
            seed=seed,
            advance=lambda n: advance("sharpness", n),
        )
        for weights in places.values()
    )
    return Landscape(tuple(places), line, plane, between, sharpness)


def _require_extent(grid: Grid, span: float) -> None:
    for values in grid.values.T:
        finite = grid.points[np.isfinite(values)]
        if not len(finite) or np.linalg.matrix_rank(finite - finite[0]) < grid.points.shape[1]:
            raise MaskftError(
                f"Of {len(values)} points within `span` {span:g} the loss is a finite number at {len(finite)}, too few "
                "to draw; lower it, or give a model whose own loss is one."
            )


def run_landscape(arguments: LandscapeArguments, console: Console) -> dict[str, Any]:
    """Measure, draw and write `landscape.json`, `landscape.png` and `report.html` into a new folder.

    Returns:
        What `landscape.json` holds.

    Raises:
        MaskftError: bad settings, model, adapter or rows, or a folder that holds something.
    """
    output = Path(str(arguments.output_dir))
    require_writable(output)
    require_empty_output(output, what="the landscape")
    plotly()  # its absence is told now, not after the measurement
    base = str(arguments.model_name_or_path)
    spec = ModelSpec(base, base, arguments.adapter_name_or_path)
    check_models([spec])
    config = MaskConfig(layers_to_transform=arguments.layers_to_transform)
    check_model(base, config)
    rows = load_rows(str(arguments.dataset_name))
    rows = rows.shuffle(seed=arguments.seed).select(range(min(arguments.limit, len(rows))))
    tokenizer = load_tokenizer(base, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Fused attention has no second derivative.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.to(device).eval().requires_grad_(False)
    text_config = model.config.get_text_config()
    model, places = _places(model, spec, config)
    terms, num_tokens = loss_terms(model, tokenizer, rows, arguments.batch_size, arguments.max_length)
    moving = next(iter(places.values()))
    num_weights = sum(weight.numel() for weight in moving.values())
    per_pass = arguments.points_per_pass or _points_per_pass(
        num_weights, arguments.batch_size * arguments.max_length, text_config, device
    )
    started = time.perf_counter()
    with _Bars(console, arguments, len(places)) as bars:
        landscape = measure_landscape(
            terms,
            places,
            span=arguments.span,
            num_points_1d=arguments.num_points_1d,
            num_points_2d=arguments.num_points_2d,
            num_iterations=arguments.num_iterations,
            points_per_pass=per_pass,
            seed=arguments.seed,
            advance=bars.advance,
        )
    result = {
        "settings": asdict(arguments),
        "num_rows": len(rows),
        "num_tokens": num_tokens,
        "data_sha256": data_hash(rows),
        "num_weights": num_weights,
        "modules": [name.removesuffix(".weight") for name in moving],
        **landscape.to_dict(),
        "points_per_pass": per_pass,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "machine": machine(),
    }
    with atomic_folder(output) as folder:
        atomic_write_text(folder / "landscape.json", json.dumps(result) + "\n")
        atomic_write_bytes(folder / "landscape.png", draw_landscape(result))
        interactive_page(folder / "report.html", result)
    for name, sharpness in result["sharpness"].items():
        console.print(f"Sharpness, {name}: {describe_sharpness(sharpness)}", highlight=False)
    console.print(f"Wrote {output / 'report.html'}, landscape.png and landscape.json.", highlight=False)
    return result


def loss_terms(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int, max_length: int
) -> tuple[list[Callable[[Weights], torch.Tensor]], int]:
    """The mean NLL per trained token (nats) as a sum of terms, one for each batch of rows of like length.

    Returns:
        Functions of some of the model's parameters, by name, and the number of trained tokens.

    Raises:
        MaskftError: no row has a trained token within `max_length`.
    """
    encoded = tokenise_rows(rows, tokenizer, max_length=max_length)
    device = next(model.parameters()).device
    in_order = sorted(encoded, key=lambda row: len(row["input_ids"]))
    num_tokens = sum(label != -100 for row in in_order for label in row["labels"][1:])
    if not num_tokens:
        raise MaskftError(f"No row has a trained token within `max_length` {max_length}; raise it.")

    def term(ids: torch.Tensor, labels: torch.Tensor) -> Callable[[Weights], torch.Tensor]:
        def loss(weights: Weights) -> torch.Tensor:
            # Padding follows the text, where a causal model does not see it: no attention mask is needed.
            logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
            flat = logits[:, :-1].flatten(0, 1).float()
            return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_tokens

        return loss

    terms = []
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in batch], True, value).to(device)
            for key, value in (("input_ids", 0), ("labels", -100))
        )
        terms.append(term(ids, labels))
    return terms, num_tokens


def _places(model: Any, spec: ModelSpec, config: MaskConfig) -> tuple[nn.Module, dict[str, Weights]]:
    """The weights that move, as they are and, with an adapter, masked."""
    if spec.adapter is None:
        names = [f"{name}.weight" for name in check_targets(config, model)]
        return model, {"model": {name: model.get_parameter(name).detach() for name in names}}
    wrapped = PeftModel.from_pretrained(model, spec.adapter)
    try:
        layers = find_group(wrapped, "default").layers
    except MaskftError as error:
        raise MaskftError(
            f"{spec.adapter} is no mask, so its surface is not drawn; give the folder of a mask."
        ) from error
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    unmasked = {f"{name}.weight": weight.detach().clone() for name, weight in weights.items()}
    wrapped.merge_adapter()
    masked = {f"{name}.weight": weight.detach().clone() for name, weight in weights.items()}
    return wrapped.unload(), {"unmasked": unmasked, "masked": masked}


def _points_per_pass(num_weights: int, num_tokens: int, config: Any, device: str) -> int:
    """Points whose weights and widest activations fit into half of the free memory; more than one only on a GPU.

    On a CPU, whose cores one point keeps busy, sharing a pass only costs memory.
    """
    if device == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info()
    widest = max(3 * config.vocab_size, 8 * config.hidden_size)
    return int(min(_MAX_POINTS_PER_PASS, max(1, free // 2 // (4 * (3 * num_weights + num_tokens * widest)))))


class _Bars:
    """One bar for each thing that is measured."""

    def __init__(self, console: Console, arguments: LandscapeArguments, num_places: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        totals = {"line": arguments.num_points_1d * num_places, "plane": arguments.num_points_2d * num_places}
        if num_places > 1:
            totals["between"] = arguments.num_points_1d
        totals["sharpness"] = arguments.num_iterations * num_places
        self.tasks = {what: self.progress.add_task(what, total=total) for what, total in totals.items()}

    def __enter__(self) -> "_Bars":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # the totals were the most points and products; fewer can be enough
            for task in self.progress.tasks:
                self.progress.update(task.id, total=task.completed)
        self.progress.stop()

    def advance(self, what: str, amount: int) -> None:
        self.progress.update(self.tasks[what], advance=amount)
