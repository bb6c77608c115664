"""`maskft search` on a tiny model, and the ranking of layers against a plain reference."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.cli import main, parse
from maskft.data.rows import load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings
from maskft.tuner import MaskConfig, check_targets
from maskft_lab.landscape.run import loss_terms
from maskft_lab.search import SearchArguments, layer_groups, layer_saliency, run_search

FLAGS = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_length": 64, "disable_tqdm": True}


def test_saliency_is_the_sum_over_the_layer_s_weights(tiny_model: Path, sums: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model = copy.deepcopy(before)
    names = check_targets(MaskConfig(), model)
    torch.manual_seed(0)
    changes = {name: 1e-3 * torch.randn_like(model.get_parameter(f"{name}.weight")) for name in names if ".2." in name}
    for name, change in changes.items():
        model.get_parameter(f"{name}.weight").data += change
    rows = tokenise_rows(load_rows(str(sums)), RowTokeniser(AutoTokenizer.from_pretrained(tiny_model), 64))
    terms, _ = loss_terms(model, rows, 16)
    of_weights, of_changes = layer_saliency(model, names, terms), layer_saliency(model, names, terms, before)
    assert not any(p.grad is not None for p in model.parameters())
    (whole,), _ = loss_terms(model, rows, len(rows))
    whole({}).backward()
    wanted, wanted_of_changes = [dict.fromkeys(range(3), 0.0) for _ in range(2)]
    for name in names:
        weight, layer = model.get_parameter(f"{name}.weight"), int(name.split(".")[2])
        wanted[layer] += float((weight.grad * weight.detach()).abs().sum())
        wanted_of_changes[layer] += float((weight.grad * changes.get(name, torch.zeros(()))).abs().sum())
    assert of_weights == pytest.approx(wanted, rel=1e-4)
    # Under a reference the layer that alone was fine-tuned comes first, which the weights do not rank first.
    assert of_changes == pytest.approx(wanted_of_changes, rel=1e-3)
    assert max(of_weights, key=lambda layer: of_weights[layer]) != 2


def test_groups_hold_every_layer_once() -> None:
    assert layer_groups(5, 2) == [(0, 1), (2, 3), (4,)]
    assert layer_groups(3, 9) == [(0, 1, 2)]


def run(model: Path, sums: Path, output: Path, mask: Any = None, **given: Any) -> dict[str, Any]:
    rows = DataArguments(str(model), str(sums), validation_split_percentage=30)
    settings, of_mask = TrainingSettings(output_dir=str(output), **FLAGS), mask or {"init_scores": "magnitude"}
    search = SearchArguments(**{"layers_per_group": 1} | given)
    return run_search(rows, settings, MaskArguments(**of_mask), search, Console(quiet=True))


def test_it_ranks_the_groups_and_writes_what_train_takes(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "search"
    result = run(tiny_model, sums, output, num_gradient_rows=20)
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "report.html", "search.json"]
    assert result == json.loads((output / "search.json").read_text())
    assert result["num_rows"] == 20
    saliencies = [group["saliency"] for group in result["groups"]]
    assert saliencies == sorted(saliencies, reverse=True)
    assert sorted(group["layers"] for group in result["groups"]) == [[0], [1], [2]]
    assert all(f"<td>{value:.4g}</td>" in (output / "report.html").read_text() for value in saliencies)

    flags = ["--config", str(output / "config.yaml"), "--output_dir", str(tmp_path / "adapter")]
    data, settings, mask = parse("train", [DataArguments, TrainingSettings, MaskArguments], flags)
    assert (mask.layers_to_transform, mask.init_scores) == (result["groups"][0]["layers"], "magnitude")
    assert (settings.learning_rate, data.validation_split_percentage) == (1e-2, 30)
    assert main(["train", *flags, "--max_steps", "1"]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(MaskftError, match="search"):
        run(tiny_model, sums, output)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": {"target_modules": ["q_prj"]}}, "matches no module"),
        ({"layers_per_group": 0}, "`layers_per_group` must be at least 1"),
        ({"num_gradient_rows": 0}, "`num_gradient_rows` must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(given: dict, message: str, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskftError, match=message):
        run(tiny_model, sums, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_under_a_reference_the_gradients_rank_the_changes(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ".layers.2." in name and weight.dim() == 2:
            weight.data += 1e-2 * torch.randn_like(weight)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    mask = {"init_scores": "magnitude", "reference": "pretrained", "reference_model_name_or_path": str(tiny_model)}
    result = run(tmp_path / "model", sums, tmp_path / "search", mask=mask)
    assert [group["saliency"] > 0 for group in result["groups"]] == [True, False, False]
    assert result["groups"][0]["layers"] == [2]
