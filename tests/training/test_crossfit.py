"""Cross-fitted masks of the change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from runs import as_flags, data
from safetensors.torch import load_file
from same import num_differing_bits
from transformers import AutoModelForCausalLM

import maskft.training.crossfit as crossfit
from maskft import MaskftError, find_group
from maskft.cli import main
from maskft.masks import unpack_mask
from maskft.training.arguments import MaskArguments, TrainingSettings
from maskft.training.crossfit import CrossFitArguments, deal_folds, run_crossfit

pytestmark = pytest.mark.usefixtures("undrawn_reports")


RESULT = ["adapter", "inputs.json", "model", "settings.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter" / "report.json").read_text())


def held_out(rows: Path) -> Path:
    """A file beside the rows with the prompts of none of them."""
    path = rows.with_name("differences.jsonl")
    pairs = [(a, a % 7) for a in range(20, 80)]
    path.write_text("".join(json.dumps({"prompt": f"{a}-{b}=", "completion": str(a - b)}) + "\n" for a, b in pairs))
    return path


def flags(model: Path, rows: Path, output: Path, **changes: object) -> list[str]:
    given = {"model_name_or_path": model, "dataset_name": rows, "output_dir": output}
    given |= {"eval_dataset_name": held_out(rows)}
    given |= {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    given |= {"disable_tqdm": True, "layers_to_transform": 1}
    return as_flags(given | changes)


@given(st.lists(st.integers(0, 12), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_folds_are_disjoint_and_hold_whole_problems(problems: list[int], num_folds: int, seed: int) -> None:
    rows = Dataset.from_list([{"prompt": f"{p}?", "completion": str(i)} for i, p in enumerate(problems)])
    if len(set(problems)) < num_folds:
        with pytest.raises(MaskftError, match="cannot be dealt into"):
            deal_folds(rows, num_folds, seed)
        return
    folds = deal_folds(rows, num_folds, seed)
    assert sorted(place for fold in folds for place in fold) == list(range(len(problems)))
    assert all(folds)
    of_folds = [{problems[place] for place in fold} for fold in folds]
    assert sum(map(len, of_folds)) == len(set(problems))


def test_the_mask_learns_on_rows_that_its_change_has_not_seen(tiny_model, sums, tmp_path, monkeypatch, caplog) -> None:
    output = tmp_path / "run"
    seen: list[tuple[str, set[str]]] = []
    scores: list[dict[str, torch.Tensor]] = []
    plain = {"sft": crossfit.run_sft, "train": crossfit.run_train}

    def note(kind: str, *arguments: object, **named: object) -> object:
        seen.append((kind, set(named["splits"][0]["prompt"])))
        result = plain[kind](*arguments, **named)
        if kind == "train":
            checkpoint = crossfit.newest_complete_checkpoint(arguments[1].output_dir)
            scores.append(load_file(checkpoint / "adapter_model.safetensors"))
        return result

    monkeypatch.setattr(crossfit, "run_sft", lambda *a, **k: note("sft", *a, **k))
    monkeypatch.setattr(crossfit, "run_train", lambda *a, **k: note("train", *a, **k))
    assert main(["crossfit", *flags(tiny_model, sums, output)]) == 0
    assert "Fine-tuning on all 60 rows." in caplog.messages
    assert caplog.messages[-1] == f"Wrote {output / 'adapter'} (the adapter, report.html, report.json)."
    assert caplog.text.count("one-sided p") == 1
    prompts = {json.loads(line)["prompt"] for line in sums.read_text().splitlines()}
    assert [kind for kind, _ in seen] == ["sft", "train", "sft", "train", "sft", "train", "sft"]
    for fold in range(3):
        assert seen[2 * fold][1] | seen[2 * fold + 1][1] == prompts
        assert not seen[2 * fold][1] & seen[2 * fold + 1][1]
    assert set().union(*(rows for kind, rows in seen if kind == "train")) == seen[-1][1] == prompts

    assert names(output) == RESULT
    tuned = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    weights = {
        name: module.weight.detach().clone() for name, module in tuned.named_modules() if hasattr(module, "weight")
    }
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_modules())
    model = PeftModel.from_pretrained(tuned, output / "adapter")
    group = find_group(model, "default")
    model.merge_adapter()
    report = report_of(output)
    left_out = 0
    for name, layer in group.layers.items():
        (last,) = (value for key, value in scores[-1].items() if name in key and key.endswith("scores"))
        (first,) = (value for key, value in scores[0].items() if name in key and key.endswith("scores"))
        mask = unpack_mask(group.masks()[name], layer.in_features)
        assert torch.equal(mask, last >= 0)
        left_out += int((~mask).sum())
        # Carried over all folds: further from the start than one fold's share of the way.
        assert (last - first).abs().max() > 0
        expected = torch.where(mask, weights[name], before[name].weight)
        assert torch.equal(layer.oriented_weight(), expected)
    assert 0 < left_out == round((1 - report["mask"]["kept_share"]) * report["mask"]["num_weights"])
    assert report["verdict"]["sentence"] in (output / "adapter" / "README.md").read_text()


def test_scores_move_as_far_as_they_are_told(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    left_out = []
    for reach in (0.3, 3.0):
        output = tmp_path / str(reach)
        main(["crossfit", *flags(tiny_model, sums, output, score_reach=reach, num_folds=2)])
        left_out.append(1 - report_of(output)["mask"]["kept_share"])
    assert 0 < left_out[0] < min(0.3, left_out[1])


def test_a_model_in_bfloat16_is_masked_merged_and_loaded(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(["crossfit", *flags(tiny_model, sums, output, num_folds=2, dtype="bfloat16", score_reach=3.0)]) == 0
    merged = ["--adapter_name_or_path", str(output / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(["merge", *merged]) == 0
    tuned = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(tuned, output / "adapter")
    assert 0 < find_group(model, "default").kept_share() < 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, model.eval()(tokens).logits)


# Flags of a run by one or two processes, the same rows in each step.
ALONE = {"per_device_train_batch_size": 6, "num_folds": 2, "temperature_scaling": True, "num_fine_tunings": 2}
BY_TWO = ALONE | {"per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def alone(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main(["crossfit", *flags(tiny_model, sums, output, **ALONE)]) == 0
    return output


def test_a_killed_run_goes_on_to_the_same_mask(alone, tiny_model, sums, tmp_path, monkeypatch) -> None:
    calls = []
    plain = crossfit.run_train

    def killed(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **named)

    monkeypatch.setattr(crossfit, "run_train", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["crossfit", *flags(tiny_model, sums, tmp_path / "killed", **ALONE)])
    # What a run that was ended says, to go on with this flag, holds for each of its stages anyway.
    again = flags(tiny_model, sums, tmp_path / "killed", **ALONE, resume_from_checkpoint="auto")
    assert main(["crossfit", *again]) == 0
    assert len(calls) == 3
    files = [run / "adapter" / "adapter_model.safetensors" for run in (alone, tmp_path / "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    (tmp_path / "killed" / "fold-1").mkdir()  # killed between the result and its clean-up
    assert main(["crossfit", *flags(tiny_model, sums, tmp_path / "killed", **ALONE)]) == 0
    assert len(calls) == 3
    assert not (tmp_path / "killed" / "fold-1").exists()
    assert main(["crossfit", *flags(tiny_model, sums, tmp_path / "killed", **ALONE | {"num_folds": 3})]) == 2


def test_repeats_are_other_folds_with_other_scores_and_their_masks_are_voted_into_one(
    tiny_model, sums, tmp_path, monkeypatch
) -> None:
    scores, folds, calls = [], [], []
    plain = crossfit.run_train

    def note(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt  # in the middle of a repeat, with the scores of the one before kept
        result = plain(*arguments, **named)
        checkpoint = crossfit.newest_complete_checkpoint(arguments[1].output_dir)
        scores.append(load_file(checkpoint / "adapter_model.safetensors"))
        folds.append(set(named["splits"][0]["prompt"]))
        return result

    monkeypatch.setattr(crossfit, "run_train", note)
    told = ["crossfit", *flags(tiny_model, sums, tmp_path / "run", num_folds=2, num_repeats=3, score_reach=3.0)]
    with pytest.raises(KeyboardInterrupt):
        main(told)
    assert main(told) == 0
    assert len(scores) == 6
    # A repeat has another seed than the repeats of the seeds beside this one.
    assert len({call[1].seed // 1000 for call in calls}) == 3
    assert len({frozenset(fold) for fold in folds}) == 6
    assert names(tmp_path / "run") == RESULT
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, packed in found.items():
        first, second, third = (scores[last][name.replace("maskft_mask", "maskft_scores")] >= 0 for last in (1, 3, 5))
        assert not torch.equal(first, second)
        votes = first.int() + second.int() + third.int()
        assert torch.equal(unpack_mask(packed, first.shape[1]), votes >= 2)


def test_the_mask_is_put_over_an_average_of_fine_tunings_of_other_seeds(
    tiny_model, sums, tmp_path, monkeypatch
) -> None:
    made: dict[str, dict[str, torch.Tensor]] = {}
    seeds: list[int] = []
    plain = crossfit.run_sft

    def note(*arguments: object, **named: object) -> object:
        folder = Path(arguments[1].output_dir)
        is_killed = folder.name == "fine-tuning-1" and len(seeds) == 1
        if folder.name.startswith("fine-tuning"):
            seeds.append(arguments[1].seed)
        if is_killed:
            raise KeyboardInterrupt
        result = plain(*arguments, **named)
        made[folder.name] = load_file(folder / "model.safetensors")
        return result

    monkeypatch.setattr(crossfit, "run_sft", note)
    told = ["crossfit", *flags(tiny_model, sums, tmp_path / "run", num_folds=2, num_fine_tunings=2, score_reach=3.0)]
    with pytest.raises(KeyboardInterrupt):
        main(told)
    assert main(told) == 0
    # The first fine-tuning was not made again.
    assert len(seeds) == 3
    assert seeds[1] == seeds[2] != seeds[0]
    assert names(tmp_path / "run") == RESULT
    average = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(*(made[f"fine-tuning-{i}"][name] for i in range(2))) for name in average)
    for name, weight in average.items():
        torch.testing.assert_close(weight, (made["fine-tuning-0"][name] + made["fine-tuning-1"][name]) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    model = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")  # which checks the fingerprint
    assert 0 < find_group(model, "default").kept_share() < 1


def test_a_model_that_is_fine_tuned_already_is_taken(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    assert main(["sft", *flags(tiny_model, sums, tmp_path / "fft")[:-2]]) == 0
    tuned = flags(tiny_model, sums, tmp_path / "run", num_folds=2, fine_tuned_model_name_or_path=tmp_path / "fft")
    assert main(["crossfit", *tuned]) == 0
    assert names(tmp_path / "run") == ["adapter", "inputs.json", "settings.json"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["reference_model_name_or_path"]) == (
        str(tmp_path / "fft"),
        str(tiny_model),
    )


def test_the_model_itself_is_no_fine_tuning_of_it(tiny_model, sums, tmp_path, capsys) -> None:
    shutil.copytree(tiny_model, tmp_path / "same")
    for tuned in (tiny_model, tmp_path / "same"):
        told = flags(tiny_model, sums, tmp_path / "run", fine_tuned_model_name_or_path=tuned)
        assert main(["crossfit", *told]) == 2
        assert "has the same weights as" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()


def test_without_a_gain_no_adapter_is_written_and_it_is_told_once(tiny_model, sums, tmp_path, caplog, capsys) -> None:
    output = tmp_path / "run"
    told = flags(tiny_model, sums, output, num_folds=2, num_fine_tunings=2, require_gain=True, score_reach=1e-9)
    assert main(["crossfit", *told]) == 3
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
    assert not (output / "adapter" / "adapter_model.safetensors").exists()
    assert report_of(output)["verdict"]["has_gain"] is False
    assert main(["crossfit", *told]) == 3


@pytest.mark.parametrize("engine", [[], ["--fsdp"]])
def test_several_processes_fit_the_mask_of_one(engine, start_ranks, alone, tiny_model, sums, tmp_path) -> None:
    several = tmp_path / "several"
    told = ["crossfit", *flags(tiny_model, sums, several, **BY_TWO)]
    for rank in start_ranks(*[[*engine, *told]] * 2):
        assert rank.wait() == 0, rank.said()
    assert names(several) == RESULT
    num_differing, num_bits = num_differing_bits(several / "adapter", alone / "adapter")
    # Sums of gradients are rounded in another order.
    assert num_differing <= 0.005 * num_bits
    shares = [report_of(run)["mask"]["kept_share"] for run in (alone, several)]
    assert 0 < shares[0] < 0.99
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)
    # Told what is wrong by the first process alone, all of them end.
    for rank in start_ranks(*[[*engine, *told, "--score_reach", "1"]] * 2):
        assert rank.wait() == 2
        assert "holds a cross-fitting with other settings" in rank.said()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_fine_tunings": 0}, "at least 1"),
        ({"num_fine_tunings": 2, "fine_tuned_model_name_or_path": "fft"}, "nothing is left to average"),
        ({"num_folds": 1}, "must be at least 2"),
        ({"num_repeats": 0}, "at least 1"),
        ({"score_reach": 0}, "above 0"),
        ({"score_num_train_epochs": 0}, "1"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskftError, match=message):
        CrossFitArguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": {"reference": "zero"}}, "leave --reference"),
        ({"mask": {"preset": "paper"}}, "starts from the preset 'recommended', and `preset` is 'paper'"),
        ({"training": {"low_memory": True}}, "fine-tunes too; leave it out"),
        ({"training": {"per_device_train_batch_size": 64}}, "would make 1 step on a fold of 1[789] rows in batches"),
        ({"data": {"overwrite_output_dir": True}}, "leave --overwrite_output_dir out"),
        ({"data": {"validation_split_percentage": 1}}, "needs 2 different problems, and the validation rows hold 1"),
        (
            {"data": {"validation_split_percentage": 20}, "require_gain": True},
            "needs 20 different problems, and the validation rows hold 12",
        ),
        ({"data": {"eval_dataset_name": "mixed.jsonl"}}, "3 of 63 validation rows have the prompt of a training row"),
        ({"deepspeed": True}, "not under DeepSpeed"),
    ],
)
def test_what_cannot_be_cross_fitted_is_refused_first(
    changes, message, tiny_model, sums, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [held_out(sums).read_text(), *sums.read_text().splitlines(keepends=True)[:3]]
    (tmp_path / "mixed.jsonl").write_text("".join(lines))
    settings = TrainingSettings(output_dir=str(tmp_path / "run"), **changes.get("training", {}))
    if "deepspeed" in changes:
        settings.deepspeed_plugin = object()
    told, mask = data(tiny_model, sums, **changes.get("data", {})), MaskArguments(**changes.get("mask", {}))
    with pytest.raises(MaskftError, match=message):
        run_crossfit(told, settings, mask, CrossFitArguments(), require_gain=changes.get("require_gain", False))
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_model_without_weights_is_refused_first(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    told = flags(tiny_model, sums, tmp_path / "run", fine_tuned_model_name_or_path=tmp_path / "empty")
    assert main(["crossfit", *told]) == 2
    assert not (tmp_path / "run").exists()


def test_what_a_folder_was_begun_with_must_be_the_same(tiny_model, sums, tmp_path, capsys) -> None:
    model, rows, output = tmp_path / "model", tmp_path / "sums.jsonl", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    shutil.copy(sums, rows)
    told = ["crossfit", *flags(model, rows, output, num_folds=2)]
    assert main(told) == 0
    weights = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights.lm_head.weight.data += 1
    weights.save_pretrained(model)
    capsys.readouterr()
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
    # A folder that an earlier version began notes nothing, and goes on.
    (output / "inputs.json").unlink()
    assert main(told) == 0
    assert (output / "inputs.json").exists()
