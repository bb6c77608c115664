"""`maskft landscape` on a tiny model, and its measure on a quadratic whose surface and eigenvalue are known."""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig
from maskft.cli import main
from maskft.data.rows import load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.scoring.nll import token_nll
from maskft_lab.landscape.curvature import Sharpness
from maskft_lab.landscape.directions import random_direction
from maskft_lab.landscape.run import LandscapeArguments, loss_terms, measure_landscape, run_landscape
from maskft_lab.landscape.surfaces import describe_sharpness, draw_landscape


@pytest.mark.parametrize(("num_1d", "num_2d", "num_measured"), [(9, 25, "9 25 9"), (12, 24, "9 9 9"), (4, 9, "3 9 3")])
def test_a_quadratic_has_the_surface_and_the_sharpness_it_has(num_1d: int, num_2d: int, num_measured: str) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([[4.0, 1.0], [0.5, 2.0]])
    base = {"w": torch.randn(2, 2)}
    masked = {"w": base["w"] * torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    given = LandscapeArguments("m", None, "d", "o", span=1.0, num_points_1d=num_1d, num_points_2d=num_2d, seed=5)
    terms = [lambda w: (scale * w["w"] ** 2).sum() / 2]
    found = measure_landscape(terms, {"base": base, "masked": masked}, given, Progress(disable=True))
    assert " ".join(str(len(found[what]["points"])) for what in ("line", "plane", "between")) == num_measured
    corners = {tuple(point) for point in found["plane"]["points"]}
    assert {(-1.0, -1.0), (-1.0, 1.0), (0.0, 0.0), (1.0, 1.0)} < corners
    assert len(corners) == len(found["plane"]["points"])
    between = [t for (t,) in found["between"]["points"]]
    assert (min(between), max(between)) == (-0.5, 1.5)
    assert num_1d < 5 or {0.0, 1.0} < {round(t, 9) for t in between}
    one, two = random_direction(base, 5)["w"].double(), random_direction(base, 6)["w"].double()

    def loss(weights: torch.Tensor) -> float:
        return float((scale * weights.double() ** 2).sum() / 2)

    for (a, b), row in zip(found["plane"]["points"], found["plane"]["losses"], strict=True):
        for value, place in zip(row, (base, masked), strict=True):
            assert value == pytest.approx(loss(place["w"] + a * one + b * two), rel=1e-4)
    for (t,), (value,) in zip(found["between"]["points"], found["between"]["losses"], strict=True):
        assert value == pytest.approx(loss(base["w"] + t * (masked["w"] - base["w"])), rel=1e-4)
    assert [found["sharpness"][name]["eigenvalue"] for name in found["names"]] == pytest.approx([4.0, 4.0], rel=1e-3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((16.1234, 5, True), "16.12"),
        ((2.2512, 30, False), "not settled after 30 products, at least 2.251"),
        ((math.nan, 1, False), "not settled after 1 product"),
    ],
)
def test_a_sharpness_that_has_not_settled_is_a_lower_bound(values: tuple[Any, ...], text: str) -> None:
    assert describe_sharpness(asdict(Sharpness(*values))) == text


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("mask") / "adapter"
    config = MaskConfig(layers_to_transform=[1], density=0.7, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def run(model: Path, sums: Path, output: Path, console: Console | None = None, **settings: Any) -> dict[str, Any]:
    small = {"limit": 20, "num_points_1d": 5, "num_points_2d": 9, "num_iterations": 3}
    given = LandscapeArguments(str(model), dataset_name=str(sums), output_dir=str(output), **small | settings)
    return run_landscape(given, console or Console(quiet=True))


def test_the_loss_is_that_of_validation(tiny_model: Path, sums: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rows = tokenise_rows(load_rows(str(sums)), RowTokeniser(AutoTokenizer.from_pretrained(tiny_model)))
    terms, num_tokens = loss_terms(model, rows, batch_size=7)
    nll = token_nll(model, rows)
    assert num_tokens == nll.num_tokens.sum()
    with torch.no_grad():
        assert sum(float(term({})) for term in terms) == pytest.approx(nll.mean, rel=1e-5)


def test_a_model_and_its_mask(tiny_model: Path, sums: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "landscape"
    console = Console(width=120)
    with console.capture() as shown:
        result = run(tiny_model, sums, output, console, adapter_name_or_path=str(adapter), num_points_2d=12)
    # Each bar ends full: a line and a surface of each model, the line between, and the products of each.
    counts = re.findall(r"(\d+)/(\d+)", shown.get())
    assert len(counts) == 7
    assert all(done == total for done, total in counts)
    assert result == json.loads((output / "landscape.json").read_text())
    assert result["names"] == ["unmasked", "masked"]
    assert all(".layers.1." in name for name in result["modules"])
    at = {round(p[0], 6): losses for p, losses in zip(result["line"]["points"], result["line"]["losses"], strict=True)}
    ends = {p[0]: losses for p, losses in zip(result["between"]["points"], result["between"]["losses"], strict=True)}
    # Every line and surface passes through the two models.
    assert at[0.0] == pytest.approx([ends[0.0][0], ends[1.0][0]], rel=1e-5)
    middle = result["plane"]["losses"][result["plane"]["points"].index([0.0, 0.0])]
    assert middle == pytest.approx(at[0.0], rel=1e-6)
    assert ends[0.0] != ends[1.0]
    # Three products are too few: the console says what they are worth.
    for name in result["names"]:
        known = describe_sharpness(result["sharpness"][name])
        assert known.startswith("not settled after 3 products, at least ")
        assert f"Sharpness, {name}: {known}" in shown.get()
    picture = np.asarray(Image.open(output / "landscape.png").convert("L"))
    assert picture.std() > 10
    # A second start is refused before anything is loaded.
    with pytest.raises(MaskftError, match="is not empty"):
        run(tiny_model, sums, output)


def test_a_model_alone_has_nothing_between(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    result = run(tiny_model, sums, tmp_path / "out", layers_to_transform=[0])
    assert result["names"] == ["model"]
    assert "between" not in result
    assert all(".layers.0." in name for name in result["modules"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"span": 0.0}, "`span` must be above 0, got 0.0"),
        ({"num_points_2d": 8}, "`num_points_2d` must be at least 9, got 8"),
        ({"layers_to_transform": [7]}, "names layer 7"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"adapter_name_or_path": "nowhere"}, "holds no adapter_config.json"),
        ({"adapter_name_or_path": "nowhere", "layers_to_transform": [0]}, "leave --layers_to_transform out"),
    ],
)
def test_what_cannot_work_is_refused(given: dict, message: str, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskftError, match=message):
        run(tiny_model, sums, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("part", "message"), [("*.safetensors", "no weights"), ("tokenizer*", "No tokenizer can be")])
def test_a_model_that_lacks_a_part_is_refused(
    part: str, message: str, tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(part))
    with pytest.raises(MaskftError, match=message):
        run(tmp_path / "model", sums, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_told_before_the_measurement(tiny_model: Path, sums: Path, monkeypatch) -> None:
    monkeypatch.setattr("maskft_lab.landscape.run.measure_landscape", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(MaskftError, match=r"cannot be made: .* is a file; give another"):
        run(tiny_model, sums, sums / "out")


def test_a_span_in_which_nothing_is_finite_is_refused(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskftError, match=r"within `span` 1e\+30 the loss is a finite number at 1, too few to draw"):
        run(tiny_model, sums, tmp_path / "out", span=1e30)


def test_the_command_and_its_picture(tiny_model: Path, sums: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = {"--model_name_or_path": tiny_model, "--adapter_name_or_path": adapter, "--dataset_name": sums}
    flags |= {"--output_dir": output, "--limit": 8, "--num_points_1d": 5, "--num_points_2d": 9, "--num_iterations": 2}
    command = ["landscape", *(str(part) for pair in flags.items() for part in pair)]
    assert main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == ["landscape.json", "landscape.png"]
    draw_landscape(json.loads((output / "landscape.json").read_text()), tmp_path / "picture.svg")
    # Text stands in an SVG as comments: a title for each line and surface, and what is known of the sharpness.
    picture = (tmp_path / "picture.svg").read_text()
    for text in ("along one direction", "from unmasked (0) to masked (1)", "unmasked: sharpness", "masked: sharpness"):
        assert f"<!-- {text} -->" in picture
    assert picture.count("<!-- not settled after 2 products, at least ") == 2
