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
from maskft_lab import demo as run
from maskft_lab.demo import COLUMNS, RECIPE
from maskft_lab.study.summary import table_of

NAMES = ["before", "fine-tuned", "WiSE-FT", "all-weights", "restored"]


def demonstrate(folder: Path, tiny_model: Path, **of_all_weights: float) -> tuple[Path, str]:
    """A demo of a tiny model that chats: its folder, and what the terminal showed."""
    shutil.copytree(tiny_model, folder / "base")
    turn = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(turn)
    recipe = copy.deepcopy(RECIPE)
    recipe["sums"] = {"num_train": 32, "num_validation": 6, "num_test": 12, "seed": 1}
    recipe["prompts"] = RECIPE["prompts"][:48]
    recipe["training"] |= {"disable_tqdm": True}
    recipe["fine-tuned"] |= {"learning_rate": 0.02}
    for name in NAMES[3:]:
        recipe[name] |= {"max_steps": 4, "eval_steps": 2}
    recipe["all-weights"] |= of_all_weights
    recipe["restoring"] = {"max_task_loss": 5.0, "retain_max_new_tokens": 6}
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fetch_demo_model", lambda console: folder / "base")
        run.run_demo(folder / "run", console=Console(file=shown, width=200), recipe=recipe)
    return folder / "run", shown.getvalue()


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return demonstrate(tmp_path_factory.mktemp("demo"), tiny_model)


@pytest.fixture
def report(finished: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((finished[0] / "report.json").read_text())


def test_the_table_has_what_a_mask_has_to_beat(report: dict[str, Any]) -> None:
    rows = {row["name"].partition(",")[0]: row for row in report["models"]}
    assert list(rows) == NAMES
    before, tuned, scaled, whole, mask = rows.values()
    assert before["general_nll"] < mask["general_nll"] < tuned["general_nll"]
    for row in rows.values():
        expected = wilson(round(12 * row["right"]["estimate"]), 12)
        assert (row["right"]["low"], row["right"]["high"]) == (expected.low, expected.high)
        assert ("general_difference" in row) == ("right_difference" in row) == (row not in (before, tuned))
        assert ("train_seconds" in row) == (row not in (before, scaled))
    back = tuned["general_nll"] - mask["general_nll"]
    assert mask["general_difference"]["estimate"] == pytest.approx(-back)
    # One bit a weight, beside four bytes.
    assert 10 * mask["num_bytes"] < whole["num_bytes"]
    assert len(report["samples"]) == 10
    assert len(report["samples"][0]) == 6


def test_the_three_ways_are_drawn_from_the_fine_tuned_model_on(report: dict[str, Any]) -> None:
    scaled, mask, whole = report["curve"]["lines"].values()
    assert len(scaled) == 11
    assert scaled[-1] == mask[0] == whole[0]
    assert len(mask) == len(whole) == 3
    assert mask[1] != whole[1]
    (star,) = report["curve"]["stars"].values()
    assert star in mask


def test_weights_that_lose_the_task_are_told_and_leave_the_table(tiny_model: Path, tmp_path: Path) -> None:
    folder, shown = demonstrate(tmp_path, tiny_model, learning_rate=2.0)
    assert "all-weights: No step gives anything back and keeps the task within 5 nats per token" in shown
    models = json.loads((folder / "report.json").read_text())["models"]
    assert [row["name"].partition(",")[0] for row in models] == [name for name in NAMES if name != "all-weights"]


def test_the_prompts_of_the_table_are_not_those_that_train(finished, report: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "restored" / "general.jsonl").read_text().splitlines()]
    given = {row["prompt"][0]["content"] for row in rows}
    assert len(given) == 32
    assert not given & {sample["prompt"] for sample in report["samples"]}


def test_the_terminal_and_the_page_show_the_same_values(finished: tuple[Path, str], report: dict[str, Any]) -> None:
    folder, shown = finished
    page = (folder / "report.html").read_text()
    for row in table_of(report["models"], COLUMNS).rows:
        for cell in filter(None, row):
            assert f"<td>{cell}</td>" in page
            assert all(part in shown for part in cell.split())
    assert "Wrote" in shown


def test_what_is_left_can_be_used_by_other_commands(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert names(folder) == ["fine-tuned", "general", "report.html", "report.json", "restored"]
    assert not list(folder.glob("*/checkpoint-*"))
    assert PeftConfig.from_pretrained(folder / "restored").base_model_name_or_path == str(folder / "fine-tuned")
    AutoPeftModelForCausalLM.from_pretrained(folder / "restored")
    assert AutoTokenizer.from_pretrained(folder / "fine-tuned").eos_token == "<eos>"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("folder", "message"),
    [("file/demo", "/file is a file; give another --output_dir"), (".", "--overwrite_output_dir")],
)
def test_a_folder_that_cannot_be_used_is_refused_before_the_download(tmp_path, monkeypatch, folder, message) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "fetch_demo_model", pytest.fail)
    with pytest.raises(MaskftError, match=message):
        run.run_demo(tmp_path / folder, console=Console(quiet=True))
