"""What cards and pages say of a run, by its command and what it chose."""

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


def of(report: dict[str, Any], **settings: object) -> dict[str, Any]:
    """The report of a run with these settings."""
    return report | {"settings": report["settings"] | settings}


UNMASKED = {"without_mask": {"eval_loss": 1.375}}
BEFORE = {"mask": {"reference": "pretrained", "reference_model_name_or_path": "before"}}
PARTS = "keeps 90.000 % of 1,000 weights of the base model and leaves out the rest; no weight is changed."
GO_BACK = "go back to their values in the reference model,\n`before`, which loading the mask needs too."
CHOSEN = "the best, eval_loss 1.2500 (NLL per token in nats, mean over batches) at step 8"
LAST = "the last, not chosen by validation"
COMPARED = "Validation loss without the mask 1.3750, with it "


@pytest.mark.parametrize(
    ("report", "in_card", "in_page", "in_both", "in_neither"),
    [
        # Where the weights that are left out come from.
        (TRAIN, [PARTS], [], [], []),
        (of(TRAIN, **BEFORE), [GO_BACK], [], [], ["no weight is changed"]),
        # A cross-fitted mask is not told of as one run.
        (
            CROSSFIT,
            [GO_BACK, "Cross-fitted on 50 rows and judged on 10 validation rows."],
            ["2 x cross-fitting of 3 folds", "chose none of the scores, but may have chosen the checkpoints of fine-"],
            ["The verdict."],
            ["no weight is changed", "One run, one seed", "chosen by validation"],
        ),
        # What was chosen.
        *((run, [], ["validation chose the checkpoint"], [CHOSEN], []) for run in (TRAIN, SFT)),
        *(
            (
                run | {"best": NONE},
                [],
                ["no checkpoint was chosen"],
                [f"{LAST} (last evaluation: eval_loss 1.5000", "at step 9)"],
                [],
            )
            for run in (TRAIN, SFT)
        ),
        *((run | {"best": NONE, "log_history": []}, [f"{LAST}. Trained"], [], [], []) for run in (TRAIN, SFT)),
        # The loss without the mask stands beside the one with it.
        (TRAIN | UNMASKED, [], [], [f"{COMPARED}1.2500, which is optimistic: validation chose"], []),
        (TRAIN | UNMASKED | {"best": NONE}, [], [], [f"{COMPARED}1.5000 at the last evaluation."], []),
        (TRAIN | UNMASKED | {"best": NONE, "log_history": []}, [], [], [], ["without the mask"]),
        # Another loss has no unit.
        (of(TRAIN, loss_type="dft"), [], [], ["eval_loss 1.2500 at step 8"], ["nats"]),
        (of(TRAIN, label_smoothing_factor=0.1), [], [], ["eval_loss 1.2500 at step 8"], ["nats"]),
        # An average tells of each.
        (
            SFT | {"best": NONE, "averaged": [{"seed": 0, "best": BEST}, {"seed": 1, "best": NONE}]},
            ["of 2 fine-tunings, which are averaged: eval_loss 1.2500 (NLL", "at step 8; not chosen by validation."],
            ["The average of runs with other seeds"],
            [],
            [],
        ),
    ],
)
@pytest.mark.usefixtures("undrawn_reports")
def test_cards_and_pages_say(report, in_card, in_page, in_both, in_neither, tmp_path) -> None:
    write_reports(tmp_path, report)
    card, page = ((tmp_path / name).read_text() for name in ("README.md", "report.html"))
    page = page[: page.index("<details>")]
    assert [text for text in (*in_card, *in_both) if text not in card] == []
    assert [text for text in (*in_page, *in_both) if text not in page] == []
    assert [text for text in in_neither if text in card or text in page] == []


def test_the_loss_without_the_mask_is_drawn_over_the_evaluations() -> None:
    drawn = training_curves(_logs(TRAIN | UNMASKED))[0]["lines"]
    assert drawn == {"with the mask": [[8, 1.25], [9, 1.5]], "without the mask": [[8, 1.375], [9, 1.375]]}


@pytest.mark.usefixtures("undrawn_reports")
@pytest.mark.parametrize(("report", "told"), [(CROSSFIT, "The verdict."), (TRAIN | UNMASKED, COMPARED)])
def test_a_page_starts_with_what_came_out_and_its_picture(report, told, tmp_path) -> None:
    write_reports(tmp_path, report)
    page = (tmp_path / "report.html").read_text()
    assert page.count(told) == 1 + page[page.index("<details>") :].count(told)
    assert page.index("<h1>") < page.index(told) < page.index("<table")
    if report["log_history"]:
        assert page.index(told) < page.index("<figure>") < page.index("<table")
