"""`maskft landscape`: the loss around a model and its masked version, in the same directions, and its sharpness."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import Field
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from maskft.adapters.model_files import load_model, model_limits, read_tokenizer
from maskft.data.rows import Reader, data_hash, load_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError, require_flags
from maskft.evaluation.models import ModelSpec, check_models
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_folder, require_empty_output, require_writable
from maskft.training.arguments import flag
from maskft.training.prepare import check_model
from maskft.tuner import MaskConfig, check_targets, find_group
from maskft.values import check_value
from maskft_lab.device import DEVICE
from maskft_lab.landscape.curvature import largest_eigenvalue
from maskft_lab.landscape.directions import Term, Weights, losses_at, random_direction
from maskft_lab.landscape.surfaces import describe_sharpness, draw_landscape

# Beyond both ends of the line from the model to its masked version, in its length.
_OVERSHOOT = 0.5
Points = np.ndarray[Any, Any]

_LEAST = {"limit": 1, "batch_size": 1, "num_iterations": 1, "max_length": 2, "num_points_1d": 3, "num_points_2d": 9}
_RANGES: dict[str, Any] = {name: Annotated[int, Field(ge=least)] for name, least in {**_LEAST, "seed": 0}.items()}
_RANGES["span"] = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class LandscapeArguments:
    """What `maskft landscape` can be told."""

    model_name_or_path: str | None = flag(None, "Folder or hub name of the model.")
    adapter_name_or_path: str | None = flag(None, "Folder of a mask on that model. Default: the model alone.")
    dataset_name: str | None = flag(None, "Rows of the loss, as for maskft train.")
    output_dir: str | None = flag(None, "Folder to write; it must be new or empty.")
    limit: int = flag(64, "Rows of the loss, a random part that --seed chooses.")
    max_length: int = flag(512, "Tokens after which a row is cut.")
    batch_size: int = flag(16, "Rows in one pass.")
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layers whose weights move, from 0. Default: all; with an adapter, its layers."}
    )
    span: float = flag(0.5, "Half the width of the surfaces, in filter norms.")
    num_points_1d: int = flag(33, "Most points of a line.")
    num_points_2d: int = flag(121, "Most points of a surface.")
    num_iterations: int = flag(30, "Most Hessian-vector products for the sharpness.")
    seed: int = flag(0, "Seed of the directions and of the rows.")

    def __post_init__(self) -> None:
        require_flags(self, "model_name_or_path", "dataset_name", "output_dir")
        for name, hint in _RANGES.items():
            setattr(self, name, check_value(name, getattr(self, name), hint))
        if self.adapter_name_or_path and self.layers_to_transform is not None:
            raise MaskftError("With --adapter_name_or_path the adapter's layers move; leave --layers_to_transform out.")


def measure_landscape(
    terms: Sequence[Term], sets: dict[str, Weights], arguments: LandscapeArguments, progress: Progress
) -> dict[str, Any]:
    """The loss (mean NLL per trained token, nats) around each of `sets`, in the same directions of the first's filters.

    Args:
        terms: the loss, as functions of the moved weights that add up to it.
        sets: one or two sets of the moved weights, by name.
        progress: gets a bar for each thing that is measured.

    Returns:
        As in `landscape.json`: "names" of the sets; points, and losses with a column for each set, of "line", along
        the first direction, "plane", along both, and "between", from the first set (0) to the second (1) and beyond;
        and "sharpness" by name of the set.

    Raises:
        MaskftError: the loss is a finite number at too few points of a line or a surface.
    """
    span, seed, num = arguments.span, arguments.seed, arguments.num_iterations
    first, *others = sets.values()
    directions = [random_direction(first, seed), random_direction(first, seed + 1)]

    def surface(what: str, origins: Iterable[Weights], axes: list[Weights], points: Points) -> dict[str, Any]:
        columns = [losses_at(terms, o, axes, progress.track(points.tolist(), description=what)) for o in origins]
        losses = [[v if math.isfinite(v) else None for v in row] for row in zip(*columns, strict=True)]
        return {"points": points.tolist(), "losses": losses}

    # An odd number of points passes through the model; one more than a multiple of four, between, through both.
    along = max(3, arguments.num_points_1d - (arguments.num_points_1d - 1) % 4)
    side = (math.isqrt(arguments.num_points_2d) + 1) // 2 * 2 - 1
    result: dict[str, Any] = {"names": list(sets)}
    for what, num_dims, num_points in (("line", 1, along), ("plane", 2, side)):
        points = np.array(list(product(np.linspace(-span, span, num_points), repeat=num_dims)))
        result[what] = surface(what, sets.values(), directions[:num_dims], points)
        _require_extent(points, np.array(result[what]["losses"], dtype=np.float64), span)
    for other in others:
        step = {name: other[name].float() - first[name].float() for name in first}
        points = np.linspace(-_OVERSHOOT, 1 + _OVERSHOOT, along)[:, None]
        result["between"] = surface("between", [first], [step], points)
    result["sharpness"] = {}
    for name, weights in sets.items():
        bar = progress.add_task("sharpness", total=num)
        advance = partial(progress.advance, bar)
        found = largest_eigenvalue(terms, weights, num_iterations=num, seed=seed, advance=advance)
        progress.update(bar, total=found.num_iterations)  # fewer can be enough
        result["sharpness"][name] = asdict(found)
    return result


def _require_extent(points: Points, losses: Points, span: float) -> None:
    for column in losses.T:
        finite = points[np.isfinite(column)]
        if not len(finite) or np.linalg.matrix_rank(finite - finite[0]) < points.shape[1]:
            raise MaskftError(
                f"Of {len(column)} points within `span` {span:g} the loss is a finite number at {len(finite)}, too few "
                "to draw; lower it, or give a model whose own loss is one."
            )


def run_landscape(arguments: LandscapeArguments, console: Console) -> dict[str, Any]:
    """Measure, draw and write `landscape.json` and `landscape.png` into a new folder.

    Returns:
        What `landscape.json` holds.

    Raises:
        MaskftError: bad settings, model, adapter or rows, or a folder that holds something.
    """
    output = Path(str(arguments.output_dir))
    rows = _check(arguments, output)
    model, sets = _load(arguments)
    terms, num_tokens = loss_terms(model, rows, arguments.batch_size)
    moving = next(iter(sets.values()))
    started = time.perf_counter()
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        landscape = measure_landscape(terms, sets, arguments, progress)
    result = {
        "settings": asdict(arguments),
        "num_rows": len(rows),
        "num_tokens": num_tokens,
        "data_sha256": data_hash(rows),
        "num_weights": sum(weight.numel() for weight in moving.values()),
        "modules": [name.removesuffix(".weight") for name in moving],
        **landscape,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "machine": machine(),
    }
    with atomic_folder(output) as folder:
        (folder / "landscape.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        draw_landscape(result, folder / "landscape.png")
    for name, sharpness in result["sharpness"].items():
        console.print(f"Sharpness, {name}: {describe_sharpness(sharpness)}")
    console.print(f"Wrote {output / 'landscape.png'} and landscape.json.")
    return result


def _check(arguments: LandscapeArguments, output: Path) -> Dataset:
    """Refuse what cannot work before a weight is loaded; the rows of the loss, with their tokens."""
    require_writable(output)
    require_empty_output(output, what="the landscape")
    base = str(arguments.model_name_or_path)
    check_models([ModelSpec(base, base, arguments.adapter_name_or_path)])
    check_model(base, MaskConfig(layers_to_transform=arguments.layers_to_transform))
    tokenise = RowTokeniser(read_tokenizer(base), arguments.max_length, limits=model_limits(base))
    rows = load_rows(str(arguments.dataset_name), reader=Reader(tokenise)).shuffle(seed=arguments.seed)
    return rows.select(range(min(arguments.limit, len(rows))))


def loss_terms(model: nn.Module, rows: Dataset, batch_size: int) -> tuple[list[Term], int]:
    """The mean NLL per trained token (nats) as a sum of terms, one for each batch of rows of like length.

    Args:
        rows: with their tokens, each with one to train on.

    Returns:
        Functions of some of the model's parameters, by name, and the number of trained tokens.
    """
    device = next(model.parameters()).device
    in_order = sorted(rows, key=lambda row: len(row["input_ids"]))
    num_tokens = sum(label != -100 for row in in_order for label in row["labels"][1:])

    def loss(weights: Weights, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Padding follows the text, where a causal model does not see it: no attention mask is needed.
        logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_tokens

    terms: list[Term] = []
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in batch], True, value).to(device)
            for key, value in (("input_ids", 0), ("labels", -100))
        )
        terms.append(partial(loss, ids=ids, labels=labels))
    return terms, num_tokens


def _load(arguments: LandscapeArguments) -> tuple[nn.Module, dict[str, Weights]]:
    """The model, and the weights that move, as they are and, with an adapter, masked."""
    base, adapter = arguments.model_name_or_path, arguments.adapter_name_or_path
    # Fused attention has no second derivative.
    model: Any = load_model(str(base), "float32", {"attn_implementation": "eager"})
    model.to(DEVICE).eval().requires_grad_(False)
    if adapter is None:
        names = check_targets(MaskConfig(layers_to_transform=arguments.layers_to_transform), model)
        return model, {"model": {f"{name}.weight": model.get_submodule(name).weight.detach() for name in names}}
    wrapped = PeftModel.from_pretrained(model, adapter)
    try:
        layers = find_group(wrapped, "default").layers
    except MaskftError as error:
        raise MaskftError(f"{adapter} is no mask, so its surface is not drawn; give the folder of a mask.") from error
    weights = {f"{name}.weight": layer.get_base_layer().weight for name, layer in layers.items()}
    unmasked = {name: weight.detach().clone() for name, weight in weights.items()}
    wrapped.merge_adapter()
    masked = {name: weight.detach().clone() for name, weight in weights.items()}
    return wrapped.unload(), {"unmasked": unmasked, "masked": masked}
