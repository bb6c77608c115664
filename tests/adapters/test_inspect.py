import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from tiny_adapters import load, make_model, save_base_and_adapter

from maskft import MaskConfig, cli, find_group
from maskft.adapters.inspect import AdapterSummary, Kept, draw_heat_map, inspect_adapter, render
from maskft.adapters.read import WEIGHTS_FILE
from maskft.errors import MaskftError
from maskft.report import narrow_table
from maskft.storage.fingerprint import fingerprint


@pytest.fixture
def saved(tmp_path) -> tuple[Path, float]:
    """An adapter whose base model lies beside it, and the share it keeps."""
    config = MaskConfig(density=0.7, selection="global_topk", target_modules=["q_proj", "down_proj"])
    _, adapter, model = save_base_and_adapter(tmp_path, make_model(num_layers=11), config)
    return adapter, find_group(model, "default").kept_share()


def text(summary: AdapterSummary, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(narrow_table(render(summary), width))
    return capture.get()


def test_counts_with_the_base_model_here(saved) -> None:
    path, kept_share = saved
    summary = inspect_adapter(path)
    num_weights = 11 * (12 * 12 + 12 * 20)
    total = summary.total()
    assert summary.is_exact
    assert total.num_weights == num_weights
    assert total.share == kept_share
    assert summary.num_bytes == (path / "adapter_model.safetensors").stat().st_size
    assert summary.layers == list(range(11))
    assert set(summary.kinds) == {"self_attn.q_proj", "mlp.down_proj"}
    model = PeftModel.from_pretrained(load(path.parent / "base"), path)
    mask = model.get_base_model().get_submodule("model.layers.10.mlp.down_proj").mask(["default"])
    assert summary.total(layer=10, kind="mlp.down_proj") == Kept(mask.sum().item(), 240)
    assert str(summary.total(layer=None, kind="mlp.down_proj")) == ""
    weights = {"self_attn.q_proj": 11 * 144, "mlp.down_proj": 11 * 240}
    by_kind = [summary.total(kind=kind).share * number for kind, number in weights.items()]
    by_layer = [summary.total(layer=layer).share * 384 for layer in summary.layers]
    assert sum(by_kind) == pytest.approx(sum(by_layer)) == pytest.approx(total.num_kept)
    # The table.
    shown = text(summary)
    rows = [line.split() for line in shown.splitlines()]
    assert any("q_proj" in line and "down_proj" in line for line in shown.splitlines())
    assert [row[0] for row in rows if len(row) == 4 and row[1][0].isdigit()] == [*map(str, range(11)), "all"]
    assert next(row for row in rows if row[:1] == ["all"])[-1] == f"{100 * kept_share:.2f}"
    assert "selection global_topk, density 0.7" in " ".join(shown.split())
    assert f"{8 * summary.num_bytes / num_weights:.2f} bits a weight" in " ".join(shown.split())
    assert "padding" not in shown


def test_without_the_base_model_columns_are_counted_up_to_the_last_that_keeps_a_weight(saved) -> None:
    path, _ = saved
    exact = inspect_adapter(path).total()
    shutil.rmtree(path.parent / "base")
    summary = inspect_adapter(path)
    assert summary.total() == exact
    assert not summary.is_exact
    assert "last columns that no row keeps are taken for padding" in " ".join(text(summary).split())


def test_picture(saved, tmp_path) -> None:
    draw_heat_map(inspect_adapter(saved[0]), tmp_path / "figures" / "kept.png")
    with Image.open(tmp_path / "figures" / "kept.png") as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colours is not None
        assert len(colours) > 30
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["kept.png"]


def test_scores_tell_the_shapes_and_all_kinds_of_modules_fit_into_80_columns(tmp_path) -> None:
    get_peft_model(make_model(num_layers=11), MaskConfig(save_scores=True)).save_pretrained(tmp_path)
    summary = inspect_adapter(tmp_path)
    assert summary.adapter.score_shapes
    assert summary.is_exact
    shown = text(summary, width=80)
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert kind in shown
    assert "…" not in shown


@pytest.mark.parametrize(("ending", "start"), [(".pdf", b"%PDF"), (".SVG", b"<?xml"), (".foo", None), ("", None)])
def test_a_picture_is_what_its_ending_says(saved, tmp_path, ending, start) -> None:
    path = tmp_path / f"kept{ending}"
    if start is None:
        with pytest.raises(MaskftError, match=r"must end in one of .*\.pdf, .*\.png, .*kept.*; rename it"):
            draw_heat_map(inspect_adapter(saved[0]), path)
        assert not path.exists()
    else:
        draw_heat_map(inspect_adapter(saved[0]), path)
        assert path.read_bytes().startswith(start)


def with_masks(folder: Path, names: list[str]) -> Path:
    """An adapter of masks of one byte each."""
    masks = {name: torch.full((1, 1), 255, dtype=torch.uint8) for name in names}
    folder.mkdir()
    save_file({f"base_model.model.{name}.maskft_mask": mask for name, mask in masks.items()}, folder / WEIGHTS_FILE)
    settings = {"peft_type": "MASKFT", "base_model_name_or_path": "no[/where]", "mask_digest": fingerprint(masks)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"layers.{i}.up" for i in range(3000)],
        [f"layers.0.experts.{i}.up" for i in range(400)],
        ["layers.0.$a", "layers.0.$\\frac{1", "layers.1.[/red]", "layers.2.\x1b[2Ja\nb"],
        ["layers." + 5000 * "7" + ".up", "layers.0.up"],
    ],
)
def test_names_and_numbers_of_layers_and_modules_are_any(tmp_path, names) -> None:
    path = with_masks(tmp_path / "adapter", names)
    summary = inspect_adapter(path)
    assert summary.total().num_kept == 8 * len(names)
    assert cli.main(["inspect", "--adapter_name_or_path", str(path), "--output_file", str(tmp_path / "kept.png")]) == 0
    with Image.open(tmp_path / "kept.png") as image:
        assert max(image.size) < 8000


def test_layers_of_one_number_in_encoder_and_decoder_are_summed_and_too_many_cells_are_not_drawn(tmp_path) -> None:
    summary = inspect_adapter(with_masks(tmp_path / "two", ["encoder.block.0.q", "decoder.block.0.q"]))
    assert summary.total(layer=0) == summary.total() == Kept(16, 16)
    many = inspect_adapter(with_masks(tmp_path / "many", [f"layers.{i}.a{i}" for i in range(1001)]))
    with pytest.raises(MaskftError, match="1001 layers with 1001 kinds of modules are too many"):
        draw_heat_map(many, tmp_path / "kept.png")
