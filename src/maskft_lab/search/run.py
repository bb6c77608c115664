"""`maskft search`: which layers to mask, by one pass of gradients; writes what `maskft train --config` takes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from datasets import Dataset
from pydantic import Field
from rich.console import Console

from maskft.adapters.model_layout import read_config
from maskft.data.inputs import hash_inputs
from maskft.data.model_files import load_model
from maskft.errors import MaskftError
from maskft.report import Page, PageTable, narrow_table, write_html
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_folder, atomic_write_text, require_empty_output, require_writable
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings, flag, other_flags, training_flags
from maskft.training.prepare import check_model, load_splits, load_tokenizer
from maskft.tuner import MaskConfig, check_targets
from maskft.tuner.reference import load_reference
from maskft.values import check_value
from maskft_lab.landscape.run import loss_terms
from maskft_lab.search.saliency import layer_groups, layer_saliency

RESULT, CONFIG, ADAPTER = "search.json", "config.yaml", "adapter"
_GRADIENT_BATCH = 8


@dataclass
class SearchArguments:
    """What is ranked, and on how many rows."""

    _argument_group_name = "Search"

    layers_per_group: int = flag(4, "Neighbouring layers that are masked together.")
    num_gradient_rows: int = flag(256, "Training rows of the pass of gradients.")

    def __post_init__(self) -> None:
        for name in ("layers_per_group", "num_gradient_rows"):
            check_value(name, getattr(self, name), Annotated[int, Field(ge=1)])


def run_search(
    data: DataArguments, settings: TrainingSettings, mask: MaskArguments, search: SearchArguments, console: Console
) -> dict[str, Any]:
    """Rank the groups of layers, and write `config.yaml`, `search.json` and `report.html` into a new folder.

    Only training rows are read; give rows that the fine-tuning has not seen.

    Returns:
        What `search.json` holds.

    Raises:
        MaskftError: bad settings, data or model, or a folder that holds something.
    """
    output = Path(str(settings.output_dir))
    config = _check(data, settings, mask)
    rows, _ = load_splits(data, settings.seed)
    sample = rows.shuffle(seed=settings.seed).select(range(min(search.num_gradient_rows, len(rows))))
    models = (data.model_name_or_path, mask.reference_model_name_or_path)
    started = time.perf_counter()
    saliency = _saliency(data, config, sample, settings.max_length or 1024)
    num_layers = read_config(str(data.model_name_or_path)).get_text_config().num_hidden_layers
    sums = {
        group: sum(saliency.get(i, 0.0) for i in group) for group in layer_groups(num_layers, search.layers_per_group)
    }
    groups = [
        {"layers": list(group), "saliency": sums[group]} for group in sorted(sums, key=lambda group: -sums[group])
    ]
    result = {
        "groups": groups,
        "num_rows": len(sample),
        "seconds": round(time.perf_counter() - started, 1),
        "inputs": hash_inputs({"train": rows}, *filter(None, models)),
        "versions": versions(),
        "machine": machine(),
    }
    table = _table(groups)
    with atomic_folder(output) as folder:
        _write(folder, result, table, other_flags(data, mask) | training_flags(settings), output)
    console.print(narrow_table(table))
    console.print(f"Wrote {output / CONFIG} (for maskft train --config), {RESULT} and report.html.", highlight=False)
    return result


def _check(data: DataArguments, settings: TrainingSettings, mask: MaskArguments) -> MaskConfig:
    """Refuse what cannot work before a weight is loaded; returns the mask's settings."""
    output = Path(str(settings.output_dir))
    if data.overwrite_output_dir:
        raise MaskftError(
            "maskft search writes over no folder; leave --overwrite_output_dir out, and give another --output_dir or "
            "remove that one."
        )
    if mask.layers_to_transform is not None:
        raise MaskftError("A search chooses the layers itself: leave --layers_to_transform out, or use maskft train.")
    require_writable(output)
    require_empty_output(output, what="the search")
    config = mask.config()
    check_model(str(data.model_name_or_path), config, temperature_scaling=settings.temperature_scaling)
    return config


def _saliency(data: DataArguments, config: MaskConfig, rows: Dataset, max_length: int) -> dict[int, float]:
    """By index of the layer; see :func:`maskft_lab.search.saliency.layer_saliency`."""
    tokenizer = load_tokenizer(str(data.model_name_or_path), rows)
    model: Any = load_model(str(data.model_name_or_path), data.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    terms, _ = loss_terms(model, tokenizer, rows, _GRADIENT_BATCH, max_length)
    targets = {name: model.get_submodule(name) for name in check_targets(config, model)}
    reference = load_reference(config, model, targets) if config.reference == "pretrained" else None
    return layer_saliency(model, targets, terms, reference)


def _table(groups: Sequence[dict[str, Any]]) -> PageTable:
    rows = [
        (_label(group["layers"]), str(rank), f"{group['saliency']:.4g}") for rank, group in enumerate(groups, start=1)
    ]
    caption = "To first order, how far the best and the worst mask of the layers lie apart in loss (nats per token)."
    return PageTable(("layers", "rank", "sum |g (W - reference)|"), rows, "One pass of gradients", caption)


def _label(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _write(folder: Path, result: dict[str, Any], table: PageTable, flags: dict[str, Any], output: Path) -> None:
    best = result["groups"][0]["layers"]
    config = flags | {"layers_to_transform": best, "output_dir": str(output / ADAPTER)}
    atomic_write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    atomic_write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    shown = f"{result['num_rows']} training rows in {result['seconds']:.0f} s; {CONFIG} masks layers {_label(best)}."
    write_html(folder / "report.html", Page("maskft search", shown, tables=[table]))
