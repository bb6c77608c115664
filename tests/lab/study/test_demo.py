import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM, PeftConfig
from rich.console import Console
from transformers import AutoTokenizer

from maskft.errors import MaskftError
from maskft.scoring.statistics import wilson
from maskft_lab.study import demo as run
from maskft_lab.study.demo import COLUMNS, CONTROL_COLUMNS, RECIPE
from maskft_lab.study.summary import table_of

OF_MASKS = ["Flips since the last log", "Kept share"]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo of a tiny model that chats: its folder, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_model, folder / "base")
    turn = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(turn)
    recipe = copy.deepcopy(RECIPE)
    recipe["models"] = {"tiny": str(folder / "base")}
    recipe["domains"]["sums"]["generated"] = {"num_train": 32, "num_validation": 6, "num_test": 12, "seed": 1}
    recipe["defaults"] |= {"disable_tqdm": True, "max_length": 256, "logging_steps": 1}
    recipe["methods"]["fft"]["learning_rate"] = recipe["methods"]["mft"]["learning_rate"] = 0.02
    recipe["methods"]["mft"]["layers_to_transform"] = [1]
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fetch_demo_model", lambda console: None)
        run.run_demo(folder / "run", console=Console(file=shown, width=200), recipe=recipe)
    return folder / "run", shown.getvalue()


@pytest.fixture
def report(finished: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((finished[0] / "report.json").read_text())


def test_the_table_compares_the_mask_with_its_controls(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["base", "best FFT", "FFT continued", "random mask", "MFT"]
    assert [row["name"] for row in report["controls"]] == list(rows)[:-1]
    assert rows["best FFT"]["nll"]["estimate"] < rows["base"]["nll"]["estimate"]
    assert 0 < rows["MFT"]["share_left_out"] == rows["random mask"]["share_left_out"] < 1
    assert rows["MFT"]["file_bytes"] == rows["random mask"]["file_bytes"]
    assert rows["MFT"]["nll"] != rows["random mask"]["nll"]
    assert {name for name, row in rows.items() if "train_seconds" in row} == {"best FFT", "FFT continued", "MFT"}
    for name, row in rows.items():
        assert ("nll_difference" in row) == ("mcnemar_p" in row) == (name != "best FFT")
        expected = wilson(round(12 * row["accuracy"]["estimate"]), 12)
        assert (row["accuracy"]["low"], row["accuracy"]["high"]) == (expected.low, expected.high)
        assert row["accuracy"]["low"] < row["accuracy"]["high"]
    (control,) = (row for row in report["controls"] if row["name"] == "best FFT")
    assert control["nll_difference"] == rows["MFT"]["nll_difference"]
    assert [curve["title"] for curve in report["curves"]] == ["Training loss", "Validation loss", *OF_MASKS]
    assert set(report["curves"][1]["lines"]) == {"best FFT", "FFT continued", "MFT"}
    assert len(report["samples"]) == 10
    assert set(report["samples"][0]) == {"question", "right", *rows}


def test_the_terminal_and_the_page_show_the_same_values(finished: tuple[Path, str], report: dict[str, Any]) -> None:
    folder, shown = finished
    page = (folder / "report.html").read_text()
    tables = table_of(report["models"], COLUMNS), table_of(report["controls"], CONTROL_COLUMNS)
    for row in (*tables[0].rows, *tables[1].rows):
        for cell in filter(None, row):
            assert f"<td>{cell}</td>" in page
            assert all(part in shown for part in cell.split())
    assert "Wrote" in shown


def test_what_is_left_can_be_used_by_other_commands(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["fft-best", "mask", "report.html", "report.json"]
    assert PeftConfig.from_pretrained(folder / "mask").base_model_name_or_path == str(folder / "fft-best")
    AutoPeftModelForCausalLM.from_pretrained(folder / "mask")
    assert AutoTokenizer.from_pretrained(folder / "fft-best").eos_token == "<eos>"


@pytest.mark.parametrize(
    ("folder", "message"),
    [("file/demo", "/file is a file; give another --output_dir"), (".", "--overwrite_output_dir")],
)
def test_a_folder_that_cannot_be_used_is_refused_before_the_download(tmp_path, monkeypatch, folder, message) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "fetch_demo_model", pytest.fail)
    with pytest.raises(MaskftError, match=message):
        run.run_demo(tmp_path / folder, console=Console(quiet=True))
