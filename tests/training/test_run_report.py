"""What cards and pages say of a run, by its command and what it chose."""

import copy
from pathlib import Path
from typing import Any

import pytest

from maskft.report import training_curves
from maskft.training.report import _logs, write_reports

BEST = {"metric": "eval_loss", "value": 1.25, "step": 8}
NONE = {"metric": "eval_loss", "value": None, "step": None}
TRAIN: dict[str, Any] = {
    "command": "train",
    "model_name_or_path": "tuned",
    "settings": {"mask": {"reference": "zero", "reference_model_name_or_path": None}, "loss_type": "nll"},
    "versions": {"maskft": "1"},
    "machine": "CPU",
    "data": {"train": {"n": 50}, "validation": {"n": 10}},
    "seconds": 1.0,
    "best": BEST,
    "log_history": [{"step": 8, "eval_loss": 1.25}, {"step": 9, "eval_loss": 1.5}],
    "mask": {"kept_share": 0.9, "num_weights": 1000},
}
SFT = {key: value for key, value in TRAIN.items() if key != "mask"} | {"command": "sft", "settings": {}}
CROSSFIT = TRAIN | {
    "command": "crossfit",
    "best": NONE,
    "log_history": [],
    "verdict": {"sentence": "The verdict."},
    "settings": {
        "data": {"model_name_or_path": "before"},
        "crossfit": {"num_folds": 3, "num_repeats": 2, "num_fine_tunings": 1},
    },
}


def write(folder: Path, report: dict[str, Any], **settings: object) -> tuple[str, str]:
    report = copy.deepcopy(report)
    report["settings"] |= settings
    write_reports(folder, report)
    page = (folder / "report.html").read_text()
    return (folder / "README.md").read_text(), page[: page.index("<details>")]


def test_a_card_says_where_the_other_weights_come_from(tmp_path) -> None:
    card, _ = write(tmp_path, TRAIN)
    assert "keeps 90.000 % of 1,000 weights of the base model and leaves out the rest; no weight is changed." in card
    for report, settings in (
        (TRAIN, {"mask": {"reference": "pretrained", "reference_model_name_or_path": "before"}}),
        (CROSSFIT, {}),
    ):
        card, _ = write(tmp_path, report, **settings)
        assert "go back to their values in the reference model,\nbefore, which loading the mask needs too." in card
        assert "no weight is changed" not in card


def test_a_cross_fitted_mask_is_not_told_of_as_one_run(tmp_path) -> None:
    card, page = write(tmp_path, CROSSFIT)
    assert "Cross-fitted on 50 rows and judged on 10 validation rows." in card
    assert "2 x cross-fitting of 3 folds" in page
    assert "validation rows chose none of the scores, but may have chosen the checkpoints of fine-tunings" in page
    for text in (card, page):
        assert "One run, one seed" not in text
        assert "chosen by validation" not in text


@pytest.mark.parametrize("report", [TRAIN, SFT])
def test_what_was_chosen_is_told(report, tmp_path) -> None:
    card, page = write(tmp_path, report)
    chosen = "the best, eval_loss 1.2500 (NLL per token in nats, mean over batches) at step 8"
    for text in (card, page):
        assert chosen in text
    assert "validation chose the checkpoint" in page
    card, page = write(tmp_path, report | {"best": NONE})
    for text in (card, page):
        assert "the last, not chosen by validation (last evaluation: eval_loss 1.5000" in text
        assert "at step 9)" in text
    assert "no checkpoint was chosen" in page
    card, _ = write(tmp_path, report | {"best": NONE, "log_history": []})
    assert "the last, not chosen by validation. Trained" in card


def test_the_loss_without_the_mask_stands_beside_the_one_with_it(tmp_path) -> None:
    report = TRAIN | {"without_mask": {"eval_loss": 1.375}}
    for text in write(tmp_path, report):
        assert "Validation loss without the mask 1.3750, with it 1.2500, which is optimistic: validation chose" in text
    drawn = training_curves(_logs(report))[0]["lines"]
    assert drawn == {"with the mask": [[8, 1.25], [9, 1.5]], "without the mask": [[8, 1.375], [9, 1.375]]}
    for text in write(tmp_path, report | {"best": NONE}):
        assert "Validation loss without the mask 1.3750, with it 1.5000 at the last evaluation." in text
    for text in write(tmp_path, report | {"best": NONE, "log_history": []}):
        assert "without the mask" not in text


@pytest.mark.parametrize(("name", "value"), [("loss_type", "dft"), ("label_smoothing_factor", 0.1)])
def test_another_loss_has_no_unit(name, value, tmp_path) -> None:
    for text in write(tmp_path, TRAIN, **{name: value}):
        assert "eval_loss 1.2500 at step 8" in text
        assert "nats" not in text


def test_an_average_tells_of_each(tmp_path) -> None:
    average = SFT | {"best": NONE, "averaged": [{"seed": 0, "best": BEST}, {"seed": 1, "best": NONE}]}
    card, page = write(tmp_path, average)
    assert "of 2 fine-tunings, which are averaged: eval_loss 1.2500 (NLL" in card
    assert "at step 8; not chosen by validation." in card
    assert "The average of runs with other seeds" in page
