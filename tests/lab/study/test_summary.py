"""The study's page in a real browser: figures show, and nothing is cut off on a screen or a phone."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from maskft_lab.study.config import parse_study
from maskft_lab.study.plan import RESULT, plan_runs
from maskft_lab.study.summary import summarise, write_summary

METHODS = ("base", "fft", "fft_continued", "lora", "random", "mft")
STUDY: dict[str, Any] = {
    "name": "made-up",
    "seeds": [1, 2],
    "models": {"small": "a", "a-model-with-quite-a-long-name-Instruct": "b"},
    "domains": {"sums": {"generated": {"num_train": 1, "num_validation": 1, "num_test": 1}}},
    "methods": dict.fromkeys(METHODS),
}


def write_results(folder: Path, *, has_answers: Callable[[str], bool] = lambda model: True) -> Any:
    """Results as runs write them, with made-up numbers."""
    study = parse_study(STUDY, "study")
    runs = plan_runs(study, folder)
    draw = np.random.default_rng(0)
    for run in runs:
        sums = (draw.random(50) + (run.method.kind == "base")).round(3)
        test = {"nll_sums": list(sums), "num_tokens": [2] * 50, "correct": [int(v) for v in draw.random(50) < 0.5]}
        result: dict[str, Any] = {"seconds": 61.0, "test": test}
        if not has_answers(run.model):
            del result["test"]["correct"]
        result["test"] |= {"temperature": 1.25, "nll_sums_at_temperature": list((sums / (1 + run.seed)).round(3))}
        if run.method.kind not in ("base", "random"):
            points = [{"step": s, "validation_loss": 0.5, "nll_sums": list(sums + 1 / (s + 1))} for s in (0, 10, 20)]
            result |= {"best_step": 20, "num_steps": 20, "best_validation_loss": 0.5, "num_trained": 9}
            result["points"] = points
        if run.method.kind in ("random", "mft"):
            result["kept_share"] = 0.9
        run.folder.mkdir(parents=True)
        (run.folder / RESULT).write_text(json.dumps(result))
    return summarise(study, runs)


def test_the_table_holds_the_means_and_paired_differences(tmp_path: Path) -> None:
    panel = write_results(tmp_path)["panels"][0]
    rows = {row["method"]: row for row in panel["rows"]}
    place = tmp_path / "small" / "sums"

    def sums(method: str, seed: int, key: str = "nll_sums") -> np.ndarray[Any, Any]:
        test = json.loads((place / f"seed{seed}" / method / RESULT).read_text())["test"]
        return np.array(test[key]) / np.array(test["num_tokens"])

    expected = np.mean([sums("mft", seed).mean() - sums("fft", seed).mean() for seed in (1, 2)])
    found = rows["mft"]["nll_difference"]
    assert found["estimate"] == pytest.approx(expected)
    assert found["low"] < expected < found["high"]
    against_base = np.mean([sums("base", 1).mean() - sums("fft", seed).mean() for seed in (1, 2)])
    assert rows["base"]["nll_difference"]["estimate"] == pytest.approx(against_base)
    assert "nll_difference" not in rows["fft"]
    assert rows["base"]["nll_p"] < 0.01 < rows["mft"]["nll_p"] <= 1
    tempered = [sums(m, seed, "nll_sums_at_temperature").mean() for m in ("mft", "fft") for seed in (1, 2)]
    found = rows["mft"]["tempered_difference"]["estimate"]
    assert found == pytest.approx(np.mean(tempered[:2]) - np.mean(tempered[2:]))
    assert rows["mft"]["temperatures"] == [1.25, 1.25]
    assert "tempered_difference" not in rows["fft"]


@pytest.mark.parametrize(("models_with_answers", "num_accuracies"), [((), 0), (("small",), 1)])
def test_accuracy_is_drawn_and_told_where_answers_are_checked_and_no_digit_is_cut(
    tmp_path: Path, models_with_answers: tuple[str, ...], num_accuracies: int
) -> None:
    summary = write_results(tmp_path, has_answers=lambda model: model in models_with_answers)
    console = Console(width=80)
    with console.capture() as shown:
        write_summary(tmp_path, summary, console)
    assert (page := (tmp_path / "report.html").read_text()).count("<!-- chosen checkpoints -->") == num_accuracies
    assert ("accuracy of the chosen checkpoints" in page) == bool(models_with_answers)
    text = shown.get()
    assert "…" not in text
    assert ["accura" in table for table in text.split("test items")[:2]] == [bool(models_with_answers), False]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_summary(folder, write_results(folder), Console(quiet=True))
    return folder / "report.html"


def test_every_number_leads_to_a_run(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r'<a href="([^"]+)"', text))
    names = set(re.findall(r'<h2 id="([^"]+)"', text))
    assert any(target.endswith("seed2/mft/result.json") for target in targets)
    for target in targets:
        assert target[1:] in names if target.startswith("#") else (page.parent / target).is_file(), target
    for row in re.findall("<tr>(.*?)</tr>", text):
        for cell in re.findall("<td>(.*?)</td>", row)[2:]:
            assert not cell or cell.startswith("<a "), cell


PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("h1,h2,p,figure,.wide")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1);
  const figures = [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
  document.title = JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(e => e.tagName),
    figures: figures.map(box => [box.width, box.height]),
    background: getComputedStyle(document.body).backgroundColor, colour: getComputedStyle(document.body).color,
    lines: document.querySelectorAll("figure svg path").length});
});</script>"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_a_browser_shows_it_whole(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    # A window cannot be as narrow as a phone; a frame can.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body style="margin:0"><iframe id="f" src="probed.html" style="border:0;width:{width}px;height:900px">'
        "</iframe>"
        '<script>addEventListener("load", () => { document.body.dataset.found ='
        ' document.getElementById("f").contentDocument.title; });</script>'
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=5000"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [chromium, *flags, "--dump-dom", outer.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'data-found="([^"]*)"', dumped)
    assert match, dumped[-500:]
    found = json.loads(match.group(1).replace("&quot;", '"'))
    assert found["width"] == width
    assert found["page"] <= width, "the page scrolls sideways"
    assert found["wide"] == []
    assert found["lines"] > 50
    assert all(w > 300 and h > 100 for w, h in found["figures"])
    assert found["colour"] == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)")
