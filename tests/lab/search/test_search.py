"""`maskft search` on a tiny model, and the ranking of layers against a plain reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.cli import main, parse
from maskft.data.rows import load_rows
from maskft.errors import MaskftError
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings
from maskft_lab.landscape.run import loss_terms
from maskft_lab.search import run as search_module
from maskft_lab.search.run import SearchArguments, run_search
from maskft_lab.search.saliency import layer_groups, layer_saliency

FLAGS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_length": 64,
    "disable_tqdm": True,
}


def test_saliency_is_the_sum_over_the_layer_s_weights(tiny_model: Path, sums: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = load_rows(str(sums))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    terms, _ = loss_terms(model, tokenizer, rows, 16, 64)
    found = layer_saliency(model, names, terms)
    assert not any(p.grad is not None for p in model.parameters())
    (whole,), _ = loss_terms(model, tokenizer, rows, len(rows), 64)
    whole({}).backward()
    wanted = {layer: 0.0 for layer in range(3)}
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        change = weight.grad * weight.detach()  # type: ignore[operator]
        wanted[int(name.split(".")[2])] += float(change.abs().sum())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_groups_hold_every_layer_once() -> None:
    assert layer_groups(5, 2) == [(0, 1), (2, 3), (4,)]
    assert layer_groups(3, 9) == [(0, 1, 2)]


def run(tiny_model: Path, sums: Path, output: Path, mask: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    return run_search(
        DataArguments(str(tiny_model), str(sums), validation_split_percentage=30),
        TrainingSettings(output_dir=str(output), **FLAGS),
        MaskArguments(**mask or {"init_scores": "magnitude"}),
        SearchArguments(**{"layers_per_group": 1, "num_candidates": 2, "densities": [0.9, 0.5]} | given),
        Console(quiet=True),
    )


def test_it_finds_trains_and_writes_what_train_takes(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "search"
    result = run(tiny_model, sums, output, full_sweep=True)
    assert result == json.loads((output / "search.json").read_text())
    ranked = sorted(result["groups"], key=lambda group: -group["saliency"])
    assert [group["rank"] for group in ranked] == [1, 2, 3]
    # The best groups at each density, and no more steps than short runs have.
    short = result["short_runs"]
    assert [(t["layers"], t["density"]) for t in short] == [(g["layers"], d) for g in ranked[:2] for d in (0.9, 0.5)]
    assert all(t["steps"] == 4 for t in short if t["state"] == "complete")
    assert result["cost"]["short_run_steps"] == sum(t["steps"] for t in short)
    complete = [t for t in short if t["state"] == "complete"]
    winner = min(complete, key=lambda t: t["best"])
    assert result["winner"] == {"layers": winner["layers"], "density": winner["density"]}
    assert len(result["sweep"]) == 6
    # A whole run of the winner is the same whether the sweep or the search trains it.
    (again,) = [t for t in result["sweep"] if t["label"] == winner["label"]]
    assert result["final"]["validation_loss"] == pytest.approx(again["best"], rel=1e-6)
    report = json.loads((output / "adapter" / "report.json").read_text())
    assert result["final"]["loss_without_mask"] == report["without_mask"]["eval_loss"] > 0
    assert f"<td>{result['final']['loss_without_mask']:.4f}</td>" in (output / "report.html").read_text()
    assert result["agreement"]["num_groups"] == 3
    assert -1 <= result["agreement"]["gradients_tau"]["tau"] <= 1
    assert "Short runs" in (output / "report.html").read_text()

    # `maskft train` takes the configuration as it is, and comes to the same adapter.
    flags = ["--config", str(output / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    data, settings, mask = parse("train", [DataArguments, TrainingSettings, MaskArguments], flags)
    assert mask.layers_to_transform == winner["layers"]
    assert settings.learning_rate == 1e-2
    assert data.validation_split_percentage == 30
    assert main(["train", *flags]) == 0
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (output / "adapter" / file).read_bytes()


@pytest.mark.usefixtures("undrawn_reports")
def test_a_short_run_has_at_most_four_rungs(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    result = run(tiny_model, sums, tmp_path / "search", densities=[0.9], short_run_share=0.4)
    complete = [t for t in result["short_runs"] if t["state"] == "complete"]
    # After the steps 2, 4 and 5.
    assert [(t["steps"], len(t["losses"])) for t in complete] == [(5, 3)] * len(complete) != []


def test_rankings_of_equals_do_not_agree() -> None:
    assert search_module._tau([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None
    assert search_module._tau([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])["tau"] == 1.0


@pytest.mark.usefixtures("undrawn_reports")
def test_a_search_that_was_killed_goes_on(
    tiny_model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tiny_model, sums, tmp_path / "straight")
    trained: list[Any] = []
    plain = search_module._Runner._trial

    def killed_in_the_third(self: Any, name: str, candidate: Any, *rest: Any) -> dict[str, Any]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(candidate)
        return plain(self, name, candidate, *rest)

    monkeypatch.setattr(search_module._Runner, "_trial", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, sums, tmp_path / "killed")

    def watched(self: Any, name: str, candidate: Any, *rest: Any) -> dict[str, Any]:
        trained.append(candidate)
        return plain(self, name, candidate, *rest)

    monkeypatch.setattr(search_module._Runner, "_trial", watched)
    resumed = run(tiny_model, sums, tmp_path / "killed")
    assert len(trained) == len(set(trained)) == 4
    assert resumed["winner"] == straight["winner"]
    assert resumed["final"]["validation_loss"] == straight["final"]["validation_loss"]
    assert [t["losses"] for t in resumed["short_runs"]] == [t["losses"] for t in straight["short_runs"]]
    with pytest.raises(MaskftError, match="holds a search with other settings"):
        run(tiny_model, sums, tmp_path / "killed", num_candidates=1)


@pytest.mark.usefixtures("undrawn_reports")
def test_no_short_run_learns_under_the_temperature_of_another(
    tiny_model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: list[tuple[int, int]] = []
    plain = search_module._Runner._trial

    def watched(self: Any, *arguments: Any) -> dict[str, Any]:
        before = sum(len(module._forward_hooks) for module in self.model.modules())
        result = plain(self, *arguments)
        hooks.append((before, sum(len(module._forward_hooks) for module in self.model.modules())))
        return result

    monkeypatch.setattr(search_module._Runner, "_trial", watched)
    monkeypatch.setitem(FLAGS, "temperature_scaling", True)
    run(tiny_model, sums, tmp_path / "search", densities=[0.9])
    assert hooks == [(0, 0)] * 2


@pytest.mark.usefixtures("undrawn_reports")
def test_a_search_goes_on_with_what_it_was_begun_with(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    model, rows, output = tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "search"
    shutil.copytree(tiny_model, model)
    shutil.copy(sums, rows)
    first = run(model, rows, output, densities=[0.9])
    weights = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights.lm_head.weight.data += 1
    weights.save_pretrained(model)
    rows.write_text("".join(sums.read_text().splitlines(keepends=True)[1:]))
    message = f"was begun with other train rows, validation rows and weights of {model} than there are now"
    with pytest.raises(MaskftError, match=message):
        run(model, rows, output, densities=[0.9])
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    shutil.copy(sums, rows)
    (output / "inputs.json").unlink()  # which a folder of an earlier version lacks
    assert run(model, rows, output, densities=[0.9])["short_runs"] == first["short_runs"]


@pytest.mark.usefixtures("undrawn_reports")
def test_short_runs_of_whole_length_are_judged_at_their_end(
    tiny_model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"eval_delay": 99, "load_best_model_at_end": False}.items():
        monkeypatch.setitem(FLAGS, name, value)
    result = run(tiny_model, sums, tmp_path / "search", densities=[0.9], num_candidates=1, short_run_share=1.0)
    assert [len(trial["losses"]) for trial in result["short_runs"]] == [1]
    assert result["final"]["validation_loss"] is None


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"overwrite_output_dir": True}, {}, "leave --overwrite_output_dir out"),
        ({}, {"eval_strategy": "no", "load_best_model_at_end": False}, "`eval_strategy` is 'no'"),
    ],
)
def test_what_a_search_does_not_do_is_refused(
    data: dict[str, Any], training: dict[str, Any], message: str, tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    with pytest.raises(MaskftError, match=message):
        run_search(
            DataArguments(str(tiny_model), str(sums), **data),
            TrainingSettings(output_dir=str(tmp_path / "out"), **FLAGS | training),
            MaskArguments(),
            SearchArguments(),
            Console(quiet=True),
        )
    assert not (tmp_path / "out").exists()


def test_a_free_threshold_has_no_densities(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    mask = {"selection": "threshold", "init_scores": "keep_all", "init_std": 0.005}
    result = run(tiny_model, sums, tmp_path / "search", mask=mask, densities=None)
    assert [t["density"] for t in result["short_runs"]] == [None, None]
    assert "density" not in (tmp_path / "search" / "config.yaml").read_text()


def test_short_runs_in_which_nothing_can_flip_are_refused(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    mask = {"selection": "threshold", "init_scores": "keep_all", "init_std": 0.07}
    with pytest.raises(MaskftError, match="In a short run of 4 of 12 steps a score moves by"):
        run(tiny_model, sums, tmp_path / "search", mask=mask, densities=None)


@pytest.mark.parametrize(
    ("mask", "search", "message"),
    [
        ({"layers_to_transform": [1]}, {}, "chooses the layers itself"),
        ({"selection": "threshold"}, {}, "the share is free: leave --densities out"),
        ({}, {"densities": [0.9, 1.5]}, "`density` must be in"),
        ({}, {"densities": [0.9, 0.9]}, "names one twice"),
        ({}, {"short_run_share": 0.0}, "`short_run_share` must be in"),
        ({}, {"num_candidates": 0}, "`num_candidates` must be at least 1"),
        ({"target_modules": ["q_prj"]}, {}, "matches no module"),
    ],
)
def test_what_cannot_work_is_refused(
    mask: dict[str, Any], search: dict[str, Any], message: str, tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    with pytest.raises(MaskftError, match=message):
        run(tiny_model, sums, tmp_path / "out", mask=mask or None, **search)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn_reports")
def test_under_a_reference_the_gradients_rank_the_changes(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if ".layers.2." in name and weight.dim() == 2:
            weight.data += 1e-2 * torch.randn_like(weight)
    shutil.copytree(tiny_model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    mask = {"init_scores": "magnitude", "reference": "pretrained", "reference_model_name_or_path": str(tiny_model)}
    result = run(tmp_path / "model", sums, tmp_path / "search", mask=mask, num_candidates=1, densities=[0.9])
    assert [group["saliency"] > 0 for group in result["groups"]] == [False, False, True]
    assert result["winner"]["layers"] == [2]
