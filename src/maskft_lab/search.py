"""`maskft search`: which layers to mask, by one pass of gradients; writes what `maskft train --config` takes."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from datasets import Dataset
from pydantic import Field
from rich.console import Console
from torch import nn

from maskft.adapters.model_files import load_model
from maskft.adapters.model_layout import read_config
from maskft.errors import MaskftError
from maskft.report import Page, PageTable, narrow_table, write_html
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_folder, require_empty_output, require_writable
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings, flag, other_flags, training_flags
from maskft.training.inputs import hash_inputs
from maskft.training.prepare import check_model
from maskft.training.preview import show_rows
from maskft.training.run import read_rows
from maskft.tuner import MaskConfig, check_targets
from maskft.tuner.reference import load_reference
from maskft.tuner.targets import layer_index
from maskft.values import check_value
from maskft_lab.device import DEVICE
from maskft_lab.landscape.directions import Terms
from maskft_lab.landscape.run import loss_terms

RESULT, CONFIG, ADAPTER = "search.json", "config.yaml", "adapter"
_GRADIENT_BATCH = 8


@dataclass
class SearchArguments:
    """What is ranked, and on how many rows."""

    _argument_group_name = "Search"

    layers_per_group: int = flag(4, "Neighbouring layers that are masked together.")
    num_gradient_rows: int = flag(256, "Training rows of the pass of gradients.")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_value(name, value, Annotated[int, Field(ge=1)])


def run_search(
    data: DataArguments, settings: TrainingSettings, mask: MaskArguments, search: SearchArguments, console: Console
) -> dict[str, Any]:
    """Rank the groups of layers, and write `config.yaml`, `search.json` and `report.html` into a new folder.

    Only training rows are read; give rows that the fine-tuning has not seen. A dry run shows them, and writes nothing.

    Returns:
        What `search.json` holds; nothing of a dry run.

    Raises:
        MaskftError: bad settings, data or model, or a folder that holds something.
    """
    name, output, config = str(data.model_name_or_path), Path(str(settings.output_dir)), mask.config()
    if not data.dry_run:
        require_writable(output)
        require_empty_output(output, what="the search")
    check_model(name, config, temperature_scaling=settings.temperature_scaling)
    splits, _, tokenizer = read_rows(data, settings, None, require_gain=False)
    if data.dry_run:
        return show_rows(splits, tokenizer, name, settings.max_length)
    rows = splits["train"]
    sample = rows.shuffle(seed=settings.seed).select(range(min(search.num_gradient_rows, len(rows))))
    started = time.perf_counter()
    saliency = _saliency(data, config, sample)
    groups = layer_groups(read_config(name).get_text_config().num_hidden_layers, search.layers_per_group)
    sums = {group: sum(saliency.get(i, 0.0) for i in group) for group in groups}
    if not math.isfinite(sum(sums.values())):
        raise MaskftError("The loss or a gradient is no finite number; try --dtype float32, or give a whole model.")
    ranked = sorted(groups, key=lambda group: -sums[group])
    result = {
        "groups": [{"layers": list(group), "saliency": sums[group]} for group in ranked],
        "num_rows": len(sample),
        "seconds": round(time.perf_counter() - started, 1),
        "inputs": hash_inputs({"train": rows}, *filter(None, (name, mask.reference_model_name_or_path))),
        "versions": versions(),
        "machine": machine(),
    }
    flags = other_flags(data, mask) | training_flags(settings) | {"layers_to_transform": list(ranked[0])}
    _write(output, result, flags, console)
    return result


def _write(output: Path, result: dict[str, Any], flags: dict[str, Any], console: Console) -> None:
    rows = []
    for rank, group in enumerate(result["groups"], start=1):
        name = "-".join(map(str, sorted({group["layers"][0], group["layers"][-1]})))
        rows.append((name, str(rank), f"{group['saliency']:.4g}"))
    caption = "To first order, how far the best and the worst mask of the layers lie apart in loss (nats per token)."
    table = PageTable(("layers", "rank", "sum |g (W - reference)|"), rows, "One pass of gradients", caption)
    shown = f"{result['num_rows']} training rows in {result['seconds']:.0f} s; {CONFIG} masks layers {rows[0][0]}."
    with atomic_folder(output) as folder:
        config = yaml.safe_dump(flags | {"output_dir": str(output / ADAPTER)}, sort_keys=False)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_html(folder / "report.html", Page("maskft search", shown, tables=[table]))
    console.print(narrow_table(table, console.width))
    console.print(f"Wrote {output / CONFIG} (for maskft train --config), {RESULT} and report.html.")


def _saliency(data: DataArguments, config: MaskConfig, rows: Dataset) -> dict[int, float]:
    """By index of the layer; see :func:`layer_saliency`."""
    model: Any = load_model(str(data.model_name_or_path), data.dtype)
    model.to(DEVICE).eval().requires_grad_(False)
    terms, _ = loss_terms(model, rows, _GRADIENT_BATCH)
    targets = {name: model.get_submodule(name) for name in check_targets(config, model)}
    reference = load_reference(config, model, targets) if config.reference == "pretrained" else None
    return layer_saliency(model, targets, terms, reference)


def layer_saliency(
    model: nn.Module, names: Iterable[str], terms: Terms, reference: nn.Module | None = None
) -> dict[int, float]:
    """`sum |g * (W - W_reference)|` over the masked weights of each layer, g being the gradient of the whole loss.

    To first order, leaving out a weight changes the loss by `-g * (W - W_reference)`, so the sum is the change that the
    best and the worst mask of the layer lie apart.

    Args:
        model: its parameters are left as they are.
        names: modules that would be masked.
        terms: the loss, as functions of moved parameters that add up to it; kept gradients need as much memory as the
            weights of `names`.
        reference: a model of the same modules, on any device, whose weights stand where a mask leaves one out; None is
            zeros.

    Returns:
        The sum by index of the layer, in units of the loss.
    """
    moving = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().requires_grad_() for name in names}
    gradients = {name: torch.zeros_like(weight) for name, weight in moving.items()}
    for term in terms:
        # Not `backward`, which would leave gradients on the model's other parameters.
        parts = torch.autograd.grad(term(moving), list(moving.values()), materialize_grads=True)
        for total, part in zip(gradients.values(), parts, strict=True):
            total += part
    totals: dict[int, float] = {}
    for name, weight in moving.items():
        layer = layer_index(name)
        if layer is None:
            continue
        change = weight.detach()
        if reference is not None:
            change = change - reference.get_parameter(name).detach().to(weight)
        totals[layer] = totals.get(layer, 0.0) + float((gradients[name] * change).abs().sum(dtype=torch.float64))
    return totals


def layer_groups(num_layers: int, layers_per_group: int) -> list[tuple[int, ...]]:
    """Neighbouring layers in groups; the last holds what is left."""
    layers = tuple(range(num_layers))
    return [layers[start : start + layers_per_group] for start in range(0, num_layers, layers_per_group)]
