"""Cross-fitted masks of the change."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from runs import as_flags, data, last_checkpoint, logits
from safetensors.torch import load_file
from same import assert_close_masks, report_of
from transformers import AutoModelForCausalLM

import maskft.training.crossfit as crossfit
from maskft import MaskftError, find_group
from maskft.cli import main
from maskft.masks import unpack_mask
from maskft.training.arguments import MaskArguments, TrainingSettings
from maskft.training.crossfit import CrossFitArguments, deal_folds, run_crossfit

pytestmark = pytest.mark.usefixtures("undrawn_reports")

RESULT = ["adapter", "inputs.json", "model", "settings.json"]


def held_out(rows: Path) -> Path:
    """A file beside the rows with the prompts of none of them."""
    path = rows.with_name("differences.jsonl")
    lines = [json.dumps({"prompt": f"{a}-{a % 7}=", "completion": str(a - a % 7)}) + "\n" for a in range(20, 80)]
    path.write_text("".join(lines))
    return path


def command(model: Path, rows: Path, output: Path, **changes: object) -> list[str]:
    given = {"model_name_or_path": model, "dataset_name": rows, "output_dir": output}
    given |= {"eval_dataset_name": held_out(rows), "learning_rate": 2e-3, "per_device_train_batch_size": 8}
    given |= {"num_train_epochs": 1, "disable_tqdm": True, "layers_to_transform": 1} | changes
    return ["crossfit", *as_flags({key: value for key, value in given.items() if value is not None})]


@pytest.fixture
def run(tiny_model: Path, sums: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `maskft crossfit` into the folder `run`; its exit status."""
    return lambda **changes: main(command(tiny_model, sums, tmp_path / "run", **changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stages(list[SimpleNamespace]):
    """The stages as they begin, with the model or the scores that they end with; one at index `killed` is killed."""

    killed: int | None = None

    def note(self, kind: str, plain: Callable, data, settings, *arguments, splits, **named) -> dict:
        folder = Path(settings.output_dir)
        stage = SimpleNamespace(kind=kind, folder=folder, seed=settings.seed, prompts=set(splits[0]["prompt"]))
        self.append(stage)
        if len(self) - 1 == self.killed:
            stage.tensors = {}
            raise KeyboardInterrupt
        report = plain(data, settings, *arguments, splits=splits, **named)
        at = last_checkpoint(folder) / "adapter_model.safetensors" if kind == "train" else folder / "model.safetensors"
        stage.tensors, stage.best = load_file(at), report["best"]
        return report

    def of(self, kind: str) -> list[SimpleNamespace]:
        return [stage for stage in self if stage.kind == kind]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    noted = Stages()
    for kind in ("sft", "train"):
        monkeypatch.setattr(crossfit, f"run_{kind}", partial(noted.note, kind, getattr(crossfit, f"run_{kind}")))
    return noted


@given(st.lists(st.integers(0, 12), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_folds_are_disjoint_and_hold_whole_problems(problems: list[int], num_folds: int, seed: int) -> None:
    rows = Dataset.from_list([{"prompt": f"{p}?", "completion": str(i)} for i, p in enumerate(problems)])
    if len(set(problems)) < num_folds:
        with pytest.raises(MaskftError, match="cannot be dealt into"):
            deal_folds(rows, num_folds, seed)
        return
    folds = deal_folds(rows, num_folds, seed)
    assert sorted(index for fold in folds for index in fold) == list(range(len(problems)))
    assert all(folds)
    of_folds = [{problems[index] for index in fold} for fold in folds]
    assert sum(map(len, of_folds)) == len(set(problems))


def test_the_mask_learns_on_rows_that_its_change_has_not_seen(run, stages, tiny_model, sums, tmp_path, caplog) -> None:
    output = tmp_path / "run"
    assert run() == 0
    assert "Fine-tuning on all 60 rows." in caplog.messages
    assert caplog.messages[-1] == f"Wrote {output / 'adapter'} (the adapter, report.html, report.json)."
    assert caplog.text.count("one-sided p") == 1
    prompts = {json.loads(line)["prompt"] for line in sums.read_text().splitlines()}
    assert [stage.kind for stage in stages] == ["sft", "train", "sft", "train", "sft", "train", "sft"]
    for fine_tuning, learning in zip(stages[:6:2], stages[1:6:2], strict=True):
        assert fine_tuning.prompts | learning.prompts == prompts
        assert not fine_tuning.prompts & learning.prompts
    assert set().union(*(stage.prompts for stage in stages.of("train"))) == stages[-1].prompts == prompts

    assert names(output) == RESULT
    tuned = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    weights = {name: weight.clone() for name, weight in tuned.state_dict().items()}
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    model = PeftModel.from_pretrained(tuned, output / "adapter")
    group = find_group(model, "default")
    model.merge_adapter()
    report = report_of(output / "adapter")
    left_out = 0
    for name, layer in group.layers.items():
        first, last = (stages[i].tensors[f"base_model.model.{name}.maskft_scores"] for i in (1, 5))
        mask = unpack_mask(group.masks()[name], layer.in_features)
        assert torch.equal(mask, last >= 0)
        left_out += int((~mask).sum())
        # Carried over all folds: further from the start than one fold's share of the way.
        assert (last - first).abs().max() > 0
        expected = torch.where(mask, weights[f"{name}.weight"], before[f"{name}.weight"])
        assert torch.equal(layer.oriented_weight(), expected)
    assert 0 < left_out == round((1 - report["mask"]["kept_share"]) * report["mask"]["num_weights"])
    assert report["verdict"]["sentence"] in (output / "adapter" / "README.md").read_text()


def test_scores_move_as_far_as_they_are_told(run, tmp_path) -> None:
    left_out = []
    for reach in (0.3, 3.0):
        output = tmp_path / str(reach)
        assert run(output_dir=output, score_reach=reach, num_folds=2) == 0
        left_out.append(1 - report_of(output / "adapter")["mask"]["kept_share"])
    assert 0 < left_out[0] < min(0.3, left_out[1])


def test_a_model_in_bfloat16_is_masked_merged_and_loaded(run, tmp_path) -> None:
    output = tmp_path / "run"
    assert run(num_folds=2, dtype="bfloat16", score_reach=3.0) == 0
    merged = {"adapter_name_or_path": output / "adapter", "output_dir": tmp_path / "merged"}
    assert main(["merge", *as_flags(merged)]) == 0
    tuned = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(tuned, output / "adapter")
    assert 0 < find_group(model, "default").kept_share() < 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(model))


# Flags of a run by one or two processes, the same rows in each step.
ALONE = {"per_device_train_batch_size": 6, "num_folds": 2, "temperature_scaling": True, "num_fine_tunings": 2}
BY_TWO = ALONE | {"per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def alone(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(tiny_model, sums, output, **ALONE)) == 0
    return output


def test_a_killed_run_goes_on_to_the_same_mask(run, stages, alone, tmp_path) -> None:
    output = tmp_path / "run"
    stages.killed = 3  # before the scores learn on the second fold
    with pytest.raises(KeyboardInterrupt):
        run(**ALONE)
    # What a run that was ended says, to go on with this flag, holds for each of its stages anyway.
    assert run(**ALONE, resume_from_checkpoint="auto") == 0
    assert len(stages.of("train")) == 3
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (alone, output)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (output / "fold-1").mkdir()  # killed between the result and its clean-up
    assert run(**ALONE) == 0
    assert len(stages.of("train")) == 3
    assert not (output / "fold-1").exists()
    assert run(**ALONE | {"num_folds": 3}) == 2


def test_the_masks_alone_are_learned_at_the_temperature(run, alone, tmp_path) -> None:
    assert run(**ALONE | {"temperature_scaling": False}) == 0
    for file, is_same in (("adapter/adapter_model.safetensors", False), ("model/model.safetensors", True)):
        assert ((alone / file).read_bytes() == (tmp_path / "run" / file).read_bytes()) is is_same
    assert report_of(alone / "model")["settings"]["temperature_scaling"] is False


def test_masks_of_repeats_with_other_folds_and_scores_are_voted_into_one(run, stages, tmp_path) -> None:
    stages.killed = 7  # in the middle of a repeat, with the scores of the one before kept
    told = {"num_folds": 2, "num_repeats": 3, "score_reach": 3.0}
    with pytest.raises(KeyboardInterrupt):
        run(**told)
    assert run(**told) == 0
    # A repeat has another seed than the repeats of the seeds beside this one.
    assert len({stage.seed // 1000 for stage in stages.of("train")}) == 3
    learned = [stage for stage in stages.of("train") if stage.tensors]
    assert len(learned) == 6
    assert len({frozenset(stage.prompts) for stage in learned}) == 6
    assert names(tmp_path / "run") == RESULT
    voted = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, packed in voted.items():
        scores_name = name.replace("maskft_mask", "maskft_scores")
        first, second, third = (learned[last].tensors[scores_name] >= 0 for last in (1, 3, 5))
        assert not torch.equal(first, second)
        votes = first.int() + second.int() + third.int()
        assert torch.equal(unpack_mask(packed, first.shape[1]), votes >= 2)


def test_the_mask_is_put_over_an_average_of_fine_tunings_of_other_seeds(run, stages, tmp_path) -> None:
    stages.killed = 5  # before the second of the fine-tunings on all rows
    told = {"num_folds": 2, "num_fine_tunings": 2, "score_reach": 3.0}
    with pytest.raises(KeyboardInterrupt):
        run(**told)
    assert run(**told) == 0
    first, killed, second = (stage for stage in stages if stage.folder.name.startswith("fine-tuning"))
    assert killed.seed == second.seed != first.seed, "the first fine-tuning was not made again"
    assert names(tmp_path / "run") == RESULT
    report, card = report_of(tmp_path / "run" / "model"), (tmp_path / "run" / "model" / "README.md").read_text()
    assert [each["seed"] for each in report["averaged"]] == [first.seed, second.seed]
    assert [each["best"] for each in report["averaged"]] == [first.best, second.best]
    assert "of 2 fine-tunings, which are averaged: eval_loss" in card
    assert all(f"{stage.best['value']:.4f}" in card for stage in (first, second))
    average = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(first.tensors[name], second.tensors[name]) for name in average)
    for name, weight in average.items():
        torch.testing.assert_close(weight, (first.tensors[name] + second.tensors[name]) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    model = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")  # which checks the fingerprint
    assert 0 < find_group(model, "default").kept_share() < 1


def test_a_model_that_is_fine_tuned_already_is_taken(run, alone, tiny_model, tmp_path) -> None:
    assert run(num_folds=2, fine_tuned_model_name_or_path=alone / "model") == 0
    assert names(tmp_path / "run") == ["adapter", "inputs.json", "settings.json"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(alone / "model")
    assert config["reference_model_name_or_path"] == str(tiny_model)


def test_stages_and_the_verdict_are_told_once_and_without_a_gain_no_adapter(run, tmp_path, caplog, capsys) -> None:
    told = {"num_folds": 2, "num_fine_tunings": 2, "score_reach": 1e-9, "require_gain": True}
    assert run(**told) == 3
    stages = [line for line in caplog.messages if line.startswith(("Fold", "Fine-tuning"))]
    assert stages == [
        "Fold 1 of 2: fine-tuning on the other folds.",
        "Fold 1 of 2: the mask learns on 30 rows.",
        "Fold 2 of 2: fine-tuning on the other folds.",
        "Fold 2 of 2: the mask learns on 30 rows.",
        "Fine-tuning 1 of 2 on all 60 rows.",
        "Fine-tuning 2 of 2 on all 60 rows.",
    ]
    assert "No gain is shown" not in caplog.text
    assert capsys.readouterr().err.count("No gain is shown") == 1
    assert not (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert report_of(tmp_path / "run" / "adapter")["verdict"]["has_gain"] is False
    assert run(**told) == 3


@pytest.mark.parametrize("engine", [[], ["--fsdp"]])
def test_several_processes_fit_the_mask_of_one(engine, run_ranks, alone, tiny_model, sums, tmp_path) -> None:
    several = tmp_path / "several"
    told = [*engine, *command(tiny_model, sums, several, **BY_TWO)]
    run_ranks(2, told)
    assert names(several) == RESULT
    assert_close_masks(several / "adapter", alone / "adapter", share=0.005)
    shares = [report_of(folder / "adapter")["mask"]["kept_share"] for folder in (alone, several)]
    assert 0 < shares[0] < 0.99
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)
    # Told what is wrong by the first process alone, all of them end.
    for said in run_ranks(2, [*told, "--score_reach", "1"], ends=2):
        assert "has a cross-fitting with other settings" in said


def test_the_mask_gives_back_what_each_fold_has_forgotten(run, stages, tmp_path, monkeypatch) -> None:
    general, dealt, deal = tmp_path / "general.jsonl", [], crossfit.Retaining.deal
    prompts = [f"Say {a}{b} " for a in "abcdef" for b in "klmnopqr"]
    general.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def noted(self, settings, nth=0) -> None:
        deal(self, settings, nth)
        dealt.append([row.row["input_ids"] for n in range(3) for row in self.batch(n)])

    monkeypatch.setattr(crossfit.Retaining, "deal", noted)
    told = {"retain_dataset_name": general, "retain_max_new_tokens": 6, "retain_split_percentage": 50}
    told |= {"retain_weight": 30.0, "max_task_loss": 5.0, "require_gain": True, "layers_to_transform": None}
    told |= {"learning_rate": 1e-2, "num_folds": 2, "score_reach": 10.0}
    stages.killed = 3  # before the scores learn on the second fold
    with pytest.raises(KeyboardInterrupt):
        run(**told)
    answers = (tmp_path / "run" / "general.jsonl").read_bytes()
    monkeypatch.setattr("maskft.training.retain.generate_answers", pytest.fail)
    assert run(**told) == 0
    assert (tmp_path / "run" / "general.jsonl").read_bytes() == answers
    assert names(tmp_path / "run") == sorted([*RESULT, "general.jsonl"])
    # Asked, the first fold, the second one; and the same where the run goes on.
    assert dealt[0] == dealt[1] == dealt[3] != dealt[2] == dealt[4]
    report = report_of(tmp_path / "run" / "adapter")
    verdict, num_rows = report["verdict"], {name: split["n"] for name, split in report["data"].items()}
    assert verdict["has_gain"]
    assert verdict["retained"]["estimate"] < -0.03
    assert verdict["retained"]["high"] < 0
    assert (verdict["retained"]["n"], verdict["task"]["n"]) == (24, 60)
    assert num_rows == {"train": 60, "validation": 60, "retained": 24, "retained validation": 24}
    assert "gives back what fine-tuning took" in (tmp_path / "run" / "adapter" / "README.md").read_text()


SPLIT = {"eval_dataset_name": None, "validation_split_percentage": 20}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_fine_tunings": 0}, "`num_fine_tunings` must be at least 1"),
        ({"num_fine_tunings": 2, "fine_tuned_model_name_or_path": "fft"}, "nothing is left to average"),
        ({"num_folds": 1}, "`num_folds` must be at least 2"),
        ({"num_repeats": 0}, "`num_repeats` must be at least 1"),
        ({"score_reach": 0}, "`score_reach` must be above 0"),
        ({"score_num_train_epochs": 0}, "`score_num_train_epochs` must be at least 1"),
        ({"per_device_train_batch_size": 64}, "would make 1 step on a fold of 20 rows in batches of 64"),
        (SPLIT | {"validation_split_percentage": 1}, "needs 2 different problems, and the validation rows hold 1"),
        (SPLIT | {"require_gain": True}, "needs 20 different problems, and the validation rows hold 12"),
        ({"fine_tuned_model_name_or_path": "{model}"}, "has the same weights as"),
        ({"fine_tuned_model_name_or_path": "{folder}/same"}, "has the same weights as"),
        ({"fine_tuned_model_name_or_path": "{folder}/empty"}, "empty holds no weights, neither"),
        ({"retain_weight": 2}, "--retain_dataset_name is missing"),
        ({"retain_dataset_name": "{rows}", "temperature_scaling": True}, "`temperature_scaling` would move the model"),
        (
            {"retain_dataset_name": "{rows}", "require_gain": True},
            "and the held-out general rows hold 15; give more with --retain_dataset_name",
        ),
        ({"eval_dataset_name": "{folder}/mixed.jsonl"}, "3 of 63 validation rows have the prompt of a training row"),
    ],
)
def test_what_cannot_be_cross_fitted_is_refused_first(changes, told, run, tiny_model, sums, tmp_path, capsys) -> None:
    shutil.copytree(tiny_model, tmp_path / "same")
    shutil.copytree(tiny_model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = sums.read_text().splitlines(keepends=True)
    (tmp_path / "mixed.jsonl").write_text("".join([held_out(sums).read_text(), *lines[:3]]))
    place = {"model": tiny_model, "folder": tmp_path, "rows": sums}
    assert run(**{name: v.format(**place) if isinstance(v, str) else v for name, v in changes.items()}) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused_before_anything_is_written(tiny_model, sums, tmp_path) -> None:
    under_deepspeed = TrainingSettings(output_dir=str(tmp_path / "run"))
    under_deepspeed.deepspeed_plugin = object()
    with pytest.raises(MaskftError, match="not under DeepSpeed"):
        run_crossfit(data(tiny_model, sums), under_deepspeed, MaskArguments(), CrossFitArguments())
    assert not (tmp_path / "run").exists()


def test_what_a_folder_was_begun_with_must_be_the_same(tiny_model, sums, tmp_path, capsys) -> None:
    model, rows, output = tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    shutil.copy(sums, rows)
    told = command(model, rows, output, num_folds=2)
    assert main(told) == 0
    weights = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights.lm_head.weight.data += 1
    weights.save_pretrained(model)
    assert main(told) == 2
    assert f"was begun with other weights of {model} than there are now" in capsys.readouterr().err
    shutil.copytree(tiny_model, model, dirs_exist_ok=True)
    validation = Path(told[told.index("--eval_dataset_name") + 1])
    lines = validation.read_text().splitlines(keepends=True)
    validation.write_text("".join(lines[1:]))
    assert main(told) == 2
    assert "was begun with other validation rows than there are now" in capsys.readouterr().err
    validation.write_text("".join(lines))
    assert main(told) == 0
