"""`maskft restore` on a tiny model that was fine-tuned on sums and forgot how it went on with words."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import data, settings
from transformers import AutoModelForCausalLM

from maskft.errors import MaskftError, NoGainError, PreemptedError
from maskft.scoring.nll import NllResult
from maskft.scoring.verdict import restore_verdict
from maskft.training.arguments import MaskArguments
from maskft.training.restore import (
    Point,
    RestoreArguments,
    RestoreSettings,
    RestoreTrainer,
    Restoring,
    restoring_mask,
)
from maskft.training.retain import with_answer
from maskft.training.run import read_rows, run_sft, run_train

pytestmark = pytest.mark.usefixtures("undrawn_reports")


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning that has forgotten."""
    folder = tmp_path_factory.mktemp("tuned")
    run_sft(data(tiny_model, sums), settings(folder, learning_rate=1e-2, max_steps=20, eval_strategy="no",
                                             save_strategy="no", load_best_model_at_end=False))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts without answers, and one row that has one."""
    path = tmp_path_factory.mktemp("general") / "rows.jsonl"
    prompts = [f"The {a} {b} is" for a in ("red", "blue", "grey", "pink") for b in ("cat", "dog", "cow", "hen")]
    rows = [{"prompt": prompt} for prompt in prompts] + [{"prompt": "An answer is", "completion": " here"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def restore(before: Path, tuned: Path, rows: Path, general: Path, out: Path, require_gain: bool = False, **changes):
    asked = {
        "max_task_loss": 0.5,
        "retain_weight": 3.0,
        "retain_max_new_tokens": 6,
        "retain_split_percentage": 50,
    } | changes.pop("asked", {})
    told = {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "max_steps": 12, "eval_steps": 2}
    told |= {"disable_tqdm": True, "bf16": False} | changes
    config = restoring_mask(MaskArguments(reference_model_name_or_path=str(before)))
    restoring = Restoring(RestoreArguments(retain_dataset_name=str(general), **asked), str(before))
    told = RestoreSettings(output_dir=str(out), **told)
    return run_train(data(tuned, rows), told, config, require_gain=require_gain, restoring=restoring)


@pytest.fixture(scope="module")
def restored(tiny_model, tuned, sums, general, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("restored") / "out"
    return out, restore(tiny_model, tuned, sums, general, out)


def test_it_gives_back_a_part_and_each_weight_is_one_of_two(restored, tiny_model: Path, tuned: Path) -> None:
    out, report = restored
    told = report["restore"]
    assert [point["share"] for point in told["wise_ft"]] == pytest.approx([i / 10 for i in range(11)])
    assert [point["step"] for point in told["mask"]] == [0, 2, 4, 6, 8, 10, 12]
    before, after = told["wise_ft"][0], told["wise_ft"][-1]
    assert told["mask"][0] == {"step": 0} | {key: after[key] for key in ("task", "retained")}
    assert before["retained"] < told["chosen"]["retained"] < after["retained"]
    assert told["chosen"]["task"] <= after["task"] + 0.5
    assert told["chosen"] == min(told["mask"], key=lambda point: point["retained"])
    assert "of what the general rows lost is given back" in (out / "report.html").read_text()
    weights = [dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (tiny_model, tuned)]
    merged = AutoPeftModelForCausalLM.from_pretrained(out).merge_and_unload()
    num_back = 0
    for name, weight in merged.named_parameters():
        first, last = (each[name] for each in weights)
        assert ((weight == first) | (weight == last)).all(), name
        num_back += int((weight != last).sum())
    assert 0 < num_back < sum(weight.numel() for weight in merged.parameters())


def test_answers_are_those_of_the_model_before_and_are_written_once(
    restored, tiny_model, tuned, sums, general, tmp_path
) -> None:
    out, report = restored
    lines = (out / "general.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 16
    assert sum(report["data"][name]["n"] for name in ("retained", "retained validation")) == 17
    (tmp_path / "out").mkdir()
    # A kill left two answers and half of a third.
    (tmp_path / "out" / "general.jsonl").write_text(lines[0] + lines[1].replace('"answer": "', '"answer": "Z') + "{")
    interrupted = mock.patch("maskft.training.retain.generate_answers", side_effect=KeyboardInterrupt)
    with interrupted as ask, pytest.raises(KeyboardInterrupt):
        restore(tiny_model, tuned, sums, general, tmp_path / "out", resume_from_checkpoint="auto")
    assert len(ask.call_args.args[2]) == 8  # a batch of those that are missing
    restore(tiny_model, tuned, sums, general, tmp_path / "out", resume_from_checkpoint="auto", max_steps=2)
    again = (tmp_path / "out" / "general.jsonl").read_text().splitlines(keepends=True)
    assert len(again) == 16
    assert again[0] == lines[0]
    assert '"answer": "Z' in again[1]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(restored, tiny_model, tuned, sums, general, tmp_path) -> None:
    out, report = restored
    plain = RestoreTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 5:
            self.preemption.caught = True
        return plain(self, *args, **kwargs)

    with mock.patch.object(RestoreTrainer, "training_step", step), pytest.raises(PreemptedError):
        restore(tiny_model, tuned, sums, general, tmp_path / "out")
    again = restore(tiny_model, tuned, sums, general, tmp_path / "out", resume_from_checkpoint="auto")
    assert again["restore"] == report["restore"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("of_mask", "of_scaling", "is_told"),
    [
        (Point(1.005, 1.6), Point(1.005, 1.4), True),
        (Point(1.005, 1.4), Point(1.005, 1.6), False),
        (Point(1.005, 1.6), Point(1.05, 1.4), False),  # which the task cannot afford
        (Point(1.05, 1.4), Point(1.005, 1.6), True),  # no step of the mask can it
    ],
)
def test_a_report_says_where_scaling_gives_back_more(of_mask: Point, of_scaling: Point, is_told: bool) -> None:
    restoring = Restoring(RestoreArguments(retain_dataset_name="rows"), "before")
    restoring.curve = [(0.0, Point(2.0, 1.0)), (0.7, of_scaling), (1.0, Point(1.0, 2.0))]
    log = [{"step": 4, "eval_loss": of_mask.task, "eval_retained_loss": of_mask.retained}]
    told = restoring.told({"log_history": log, "best": {"step": 4}})
    assert (told["chosen"] is None) == (of_mask.task > 1.01)
    beyond = "All changes scaled to 70 % give back more without training"
    assert (beyond in told["sentence"]) == is_told
    if is_told:
        assert told["sentence"].endswith(f"{100 * (2 - of_scaling.retained):.0f} %, for +0.0050 nats per token.")


@pytest.mark.parametrize("changes", [{"learning_rate": 0.1}, {"eval_delay": 9}])  # or no step is scored
def test_without_a_step_that_keeps_the_task_nothing_is_written(
    changes, tiny_model, tuned, sums, general, tmp_path
) -> None:
    told = {"asked": {"max_task_loss": 1e-9}, "max_steps": 2} | changes
    with pytest.raises(NoGainError, match="No step gives anything back and keeps the task within 1e-09"):
        restore(tiny_model, tuned, sums, general, tmp_path / "out", **told)
    assert not list((tmp_path / "out").glob("adapter_*"))
    assert (tmp_path / "out" / "report.html").exists()


def test_it_ends_at_its_target(tiny_model, tuned, sums, general, tmp_path) -> None:
    given = tiny_model, tuned, sums, general, tmp_path / "out"
    asked = {"asked": {"retain_target": 1e-3}}
    report = restore(*given, **asked)
    assert report["restore"]["chosen"] == report["restore"]["mask"][-1]
    assert report["restore"]["mask"][-1]["step"] < 12
    # Killed before it wrote its result, it takes no other step.
    (tmp_path / "out" / "report.json").unlink()
    with mock.patch.object(RestoreTrainer, "training_step", side_effect=AssertionError):
        again = restore(*given, **asked, resume_from_checkpoint="auto")
    assert again["restore"] == report["restore"]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_curve_ends_at_the_models_before_and_after(bf16, restored, tiny_model, tuned, sums, tmp_path) -> None:
    settings = RestoreSettings(output_dir=str(tmp_path), bf16=bf16)
    rows, _, tokenizer = read_rows(data(tiny_model, sums), settings, None, require_gain=False)
    general = tmp_path / "answered.jsonl"
    shown = ("prompt", "answer")
    lines = [json.loads(line) for line in (restored[0] / "general.jsonl").read_text().splitlines()]
    lines = [dict(zip(("prompt", "completion"), (line[key] for key in shown), strict=True)) for line in lines]
    general.write_text("".join(json.dumps(line) + "\n" for line in lines))
    restoring = Restoring(RestoreArguments(retain_dataset_name=str(general)), str(tiny_model))
    restoring.read(settings, require_gain=False)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    restoring.prepare(model, rows["validation"], tokenizer, settings)
    for place, folder in ((0, tiny_model), (-1, tuned)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            expected = restoring.measure(AutoModelForCausalLM.from_pretrained(folder))
        assert vars(restoring.curve[place][1]) == pytest.approx(vars(expected), abs=1e-6)


def test_a_model_that_lost_nothing_is_refused(tiny_model, sums, general, tmp_path) -> None:
    with pytest.raises(MaskftError, match="has lost nothing on the general rows"):
        restore(tiny_model, tiny_model, sums, general, tmp_path / "out")


def test_epochs_are_refused_beside_steps(tmp_path) -> None:
    with pytest.raises(MaskftError, match="`num_train_epochs` has no effect beside `max_steps`, which is 32"):
        RestoreSettings(output_dir=str(tmp_path), num_train_epochs=1)
    assert RestoreSettings(output_dir=str(tmp_path), num_train_epochs=1, max_steps=-1).num_train_epochs == 1


def test_a_mask_of_the_change_needs_the_model_before() -> None:
    with pytest.raises(MaskftError, match="--reference_model_name_or_path is missing"):
        restoring_mask(MaskArguments())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "--retain_dataset_name is missing"),
        ({"retain_dataset_name": "x", "retain_target": 1.5}, "`retain_target`"),
        ({"retain_dataset_name": "x", "max_task_loss": 0}, "`max_task_loss`"),
        ({"retain_dataset_name": "x", "retain_weight": float("nan")}, "`retain_weight`"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given, told) -> None:
    with pytest.raises(MaskftError, match=told):
        RestoreArguments(**given)


USER, SAID = [{"role": "user", "content": "Hi"}], {"role": "assistant", "content": "?"}


@pytest.mark.parametrize(
    ("row", "filled"),
    [
        ({"prompt": "Hi"}, {"prompt": "Hi", "completion": "?"}),
        ({"prompt": USER, "completion": None}, {"prompt": USER, "completion": [SAID]}),
        ({"messages": USER}, {"messages": [*USER, SAID]}),
        ({"conversations": [{"from": "human", "value": "Hi"}]},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "?"}]}),
        ({"instruction": "Hi"}, {"instruction": "Hi", "output": "?"}),
        ({"prompt": "Hi", "completion": "Ho"}, None),
        ({"messages": [*USER, SAID]}, None),
        ({"text": "Hi"}, None),
        ({"messages": []}, None),
        ({"messages": ["Hi"]}, None),
        (7, None),
    ],
)  # fmt: skip
def test_a_row_of_each_form_gets_an_answer_where_it_has_none(row, filled) -> None:
    assert with_answer(row, "?") == (row if filled is None else filled)


@pytest.mark.parametrize("retained", [-0.2, 0.0])
@pytest.mark.parametrize("task", [0.0, 0.02])
def test_the_verdict_needs_both_less_lost_and_the_task_kept(task: float, retained: float) -> None:
    draw = np.random.default_rng(0)

    def results(shift: float) -> tuple[NllResult, NllResult]:
        tokens = np.full(200, 10)
        sums = draw.normal(20, 3, 200)
        masked = sums + tokens * shift + draw.normal(0, 0.02, 200)
        return NllResult(sums, tokens, np.zeros(200, bool)), NllResult(masked, tokens, np.zeros(200, bool))

    names = [str(i) for i in range(200)]
    found = restore_verdict(results(task), results(retained), (names, names), 0.01)
    assert found.has_gain == (task == 0 and retained < 0)
    assert found.task.estimate == pytest.approx(task, abs=1e-3)
    assert found.retained.estimate == pytest.approx(retained, abs=1e-3)
    assert ("and keeps the task" in found.sentence) == found.has_gain
    assert ("gives back" in found.sentence) == (retained < 0)


def test_a_verdict_needs_problems_and_is_written(tiny_model, tuned, sums, tmp_path, general) -> None:
    many = tmp_path / "many.jsonl"
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqrst"]
    many.write_text("".join(json.dumps({"prompt": f"Say {word}"}) + "\n" for word in words))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(sums.read_text().replace("=", f"={i}=") for i in range(16)))
    with pytest.raises(MaskftError, match="half of the held-out general rows hold 4; give more with --retain_dataset"):
        restore(tiny_model, tuned, rows, general, tmp_path / "out", require_gain=True)
    asked = {"max_task_loss": 5.0}
    report = restore(
        tiny_model, tuned, rows, many, tmp_path / "out", require_gain=True, asked=asked, learning_rate=2e-3
    )
    assert report["verdict"]["has_gain"]
    assert report["data"]["retained guard"]["n"] == 20
    assert torch.isfinite(torch.tensor(report["verdict"]["p_task"]))
