import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskft.errors import MaskftError
from maskft_lab.study.config import Domain, parse_study
from maskft_lab.study.methods import load_domain, matched_rank, perform
from maskft_lab.study.plan import RESULT, Run, plan_runs
from maskft_lab.study.run import run_study
from maskft_lab.study.summary import COLUMNS, caption, summarise, table_of

SETTINGS = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "eval_steps": 2, "learning_rate": 1e-2}
METHODS = ("base", "fft", "fft_continued", "lora", "random", "magnitude", "shuffled", "mft")


@pytest.fixture
def content(tiny_model: Path, sums: Path, tmp_path: Path) -> dict[str, Any]:
    pairs = [(a, 10 + a * 7 % 90) for a in range(20, 80)]
    rows = [{"prompt": f"{a}-{b}=", "completion": str(a - b)} for a, b in pairs]
    test = write_rows(tmp_path / "differences.jsonl", rows)
    domain = {"dataset_name": str(sums), "test_dataset_name": test, "validation_split_percentage": 30}
    return {
        **{"name": "tiny", "seeds": [1], "models": {"tiny": str(tiny_model)}, "domains": {"sums": domain}},
        "defaults": SETTINGS | {"max_length": 64, "logging_steps": 1},
        "methods": dict.fromkeys(METHODS),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(content: dict[str, Any]) -> list[str]:
    return Path(content["domains"]["sums"]["test_dataset_name"]).read_text().splitlines()


def planned(content: dict[str, Any], folder: Path) -> list[Run]:
    return plan_runs(parse_study(content, "study"), folder)


def carried_out(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results of a study's runs, by method."""
    results = {}
    for run in planned(content, folder):
        results[run.method.name] = perform(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / RESULT).write_text(json.dumps(results[run.method.name]))
    return results


def start(content: dict[str, Any], tmp_path: Path, folder: str = "runs", **settings: Any) -> Any:
    """Write a study's file and start it as the command does."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    return run_study(tmp_path / "s.yaml", tmp_path / folder, **{"console": Console(quiet=True)} | settings)


def test_each_method_does_what_its_name_says(content: dict[str, Any], tmp_path: Path) -> None:
    results = carried_out(content, tmp_path)
    assert set(results) == set(METHODS)
    tests = {name: result["test"] for name, result in results.items()}
    nll = {name: sum(test["nll_sums"]) for name, test in tests.items()}
    assert nll["fft_continued"] < nll["fft"] < nll["base"]
    assert len(set(nll.values())) == len(nll)
    tempered = {name: test for name, test in tests.items() if test["temperature"] != 1}
    assert tempered
    assert all(sum(t["nll_sums_at_temperature"]) != pytest.approx(nll[name]) for name, t in tempered.items())
    # Controls leave out as many weights as the learned mask; LoRA trains about as many values.
    shares = {name: results[name]["kept_share"] for name in ("mft", "random", "magnitude", "shuffled")}
    assert len(set(shares.values())) == 1
    assert results["lora"]["num_trained"] == pytest.approx(results["mft"]["num_trained"], rel=0.1)
    # Every trained method has the same checkpoints, and the one that validation chose is what was scored.
    for name in ("fft", "fft_continued", "lora", "mft"):
        steps = [point["step"] for point in results[name]["points"]]
        assert steps in ([0, 2, 4, 5], [0, 2, 4, 6])
        assert_the_best_was_scored(results[name])
    first = {name: results[name]["points"][0]["nll_sums"] for name in ("mft", "fft_continued")}
    assert first["mft"] != tests["fft"]["nll_sums"]
    assert first["fft_continued"] == pytest.approx(tests["fft"]["nll_sums"], abs=1e-3)
    folder = tmp_path / "tiny" / "sums" / "seed1" / "mft" / "adapter"
    assert all(tensor.dtype == torch.uint8 for tensor in load_file(folder / "adapter_model.safetensors").values())


def assert_the_best_was_scored(result: dict[str, Any]) -> None:
    best = min(result["points"][1:], key=lambda point: point["validation_loss"])
    assert best["step"] == result["best_step"]
    assert result["test"]["nll_sums"] == pytest.approx(best["nll_sums"], abs=1e-3)


def test_a_cross_fitted_mask_is_put_over_the_best_fft(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = {
        "fft": None,
        "crossfit": {"num_folds": 2, "layers_to_transform": [1], "temperature_scaling": True},
        "shuffled": {"of": "crossfit"},
    }
    results = {}
    for run in planned(content, tmp_path):
        # The folds are fine-tuned as the model was.
        expected = {"fft": content["defaults"], "crossfit": content["defaults"] | {"temperature_scaling": True}}
        assert run.method.training == expected.get(run.method.name, {})
        results[run.method.name] = perform(run)
        if run.method.name == "crossfit":
            assert [path.name for path in run.folder.iterdir()] == ["adapter"]
            report = json.loads((run.folder / "adapter" / "report.json").read_text())
            assert report["model_name_or_path"] == str(run.needs[0] / "model")
            assert perform(run)["test"] == results["crossfit"]["test"]
    nll = {name: sum(result["test"]["nll_sums"]) for name, result in results.items()}
    assert len(set(nll.values())) == 3
    assert 0 < results["shuffled"]["kept_share"] == results["crossfit"]["kept_share"] < 1


def test_each_epoch_has_a_checkpoint_where_no_steps_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    del content["defaults"]["eval_steps"]
    content["methods"] = {"fft": {"num_train_epochs": 6, "learning_rate": 0.05, "lr_scheduler_type": "constant"}}
    result = carried_out(content, tmp_path)["fft"]
    assert len(result["points"]) == 1 + 6
    assert_the_best_was_scored(result)
    assert result["best_step"] < result["num_steps"]


def test_early_stopping_stops(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = {"fft": {"early_stopping_patience": 1, "learning_rate": 0.3, "num_train_epochs": 3}}
    result = carried_out(content, tmp_path)["fft"]
    assert result["points"][-1]["step"] < result["num_steps"]


def test_lora_takes_layers_and_all_are_scored_on_the_same_tokens(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = {"base": None, "fft": None, "lora": {"r": 2, "layers_to_transform": [1]}}
    content["defaults"]["max_length"] = 8  # cuts some rows
    results = carried_out(content, tmp_path)
    counts = [result["test"]["num_tokens"] for result in results.values()]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) < sum(len(json.loads(line)["completion"]) + 1 for line in rows_of(content))
    # q, k, v, o, gate, up and down of one layer.
    assert results["lora"]["num_trained"] == 2 * (2 * 64 + 2 * 48 + 3 * 72)


def test_the_turns_of_a_conversation_count_as_one_problem(content: dict[str, Any], tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        turns = [("user", f"{i}+{n}=") if n % 2 == 0 else ("assistant", str(n)) for n in range(6)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    model = shutil.copytree(content["models"]["tiny"], tmp_path / "model")
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    content["domains"]["sums"]["test_dataset_name"] = write_rows(tmp_path / "test.jsonl", rows)
    content |= {"models": {"tiny": str(model)}, "methods": {"base": None, "fft": None}}
    result = carried_out(content, tmp_path / "runs")["fft"]
    assert len(set(result["test"]["problems"])) == 4
    assert len(result["test"]["problems"]) == 12
    (panel,) = summarise(parse_study(content, "study"), planned(content, tmp_path / "runs"))["panels"]
    assert panel["rows"][0]["nll_difference"]["n"] == panel["n"] == 4
    assert caption(panel).startswith("n = 4 problems with 12 test items; ")
    assert "p (Holm) over problems" in caption(panel)
    assert caption(panel | {"n": 12}).startswith("n = 12 test items; ")


def test_a_p_value_that_more_draws_could_lower_is_a_bound() -> None:
    nll = {"estimate": 1.0, "low": 0.0, "high": 2.0, "n": 9}
    row = {"method": "mft", "seeds": [1], "best_steps": [2], "test_nll": nll, "kept_share": None}
    p_values = {"nll_p": 0.0004, "nll_p_is_least": True, "accuracy_p": 0.0004, "accuracy_p_is_least": False}
    table = table_of([row | p_values], COLUMNS)
    assert table.header == ["method", "seeds", "best step", "test NLL", "p", "p"]  # those with texts alone
    assert table.rows[0][4:] == ["<= 0.0004", "0.0004"]


def test_the_rank_of_lora_matches_the_mask(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # 3 layers: q, o 32x32; k, v 16x32; gate, up, down 40x32; a rank costs in + out of each.
    weights, per_rank = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32, 2 * 64 + 2 * 48 + 3 * 72
    assert matched_rank(model, {}) == round(weights / per_rank)
    assert matched_rank(model, {"layers_to_transform": [0]}) == round(weights / per_rank / 3)


@pytest.mark.usefixtures("quick_workers")
def test_a_killed_study_ends_with_the_same_table(content: dict[str, Any], tmp_path: Path) -> None:
    content["methods"] = {"fft": None, "mft": None, "random": None}
    straight = start(content, tmp_path, "straight", jobs=2)

    command = [sys.executable, "-m", "maskft", "study", "--config", tmp_path / "s.yaml"]
    command += ["--output_dir", tmp_path / "killed"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    # Once its first run is at work; how far it gets until the kill is left to chance.
    log = tmp_path / "killed" / "tiny" / "sums" / "seed1" / "fft" / "points"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    time.sleep(random.uniform(0, 2))
    process.kill()
    process.wait()
    assert start(content, tmp_path, "killed", jobs=1) == straight
    assert (tmp_path / "killed" / "table.md").read_text() == (tmp_path / "straight" / "table.md").read_text()

    # A third start has nothing to do, and settings that have changed are refused.
    result = tmp_path / "killed" / "tiny" / "sums" / "seed1" / "mft" / RESULT
    before = result.stat().st_mtime_ns
    assert start(content, tmp_path, "killed") == straight
    assert result.stat().st_mtime_ns == before
    content["defaults"] = SETTINGS | {"learning_rate": 1e-3}
    with pytest.raises(MaskftError, match="holds a run with other settings"):
        start(content, tmp_path, "killed")


@pytest.mark.usefixtures("quick_workers")
def test_a_failed_run_is_shown_and_stops_only_what_needs_it(content: dict[str, Any], tmp_path: Path) -> None:
    # Found only when it trains.
    content["methods"] = {"base": None, "fft": None, "lora": {"r": 2, "learning_rate": 1e30}}
    console = Console(record=True, width=300, file=io.StringIO())
    with pytest.raises(MaskftError, match="1 of 3 runs failed: tiny/sums/seed1/lora"):
        start(content, tmp_path, jobs=2, console=console)
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert [row["method"] for row in summary["panels"][0]["rows"]] == ["base", "fft"]
    (failure,) = summary["failed"]
    assert failure["run"] == "tiny/sums/seed1/lora"
    assert "TrainingDivergedError" in failure["error"]
    assert "tiny/sums/seed1/lora: failed" in console.export_text()
    assert "Runs that failed" in (tmp_path / "runs" / "report.html").read_text()


def test_a_run_that_was_ended_from_outside_is_shown(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["methods"] = {"base": None}
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: (p := begin(*given, **named)).kill() or p)
    with pytest.raises(MaskftError, match="1 of 1 runs failed"):
        start(content, tmp_path)
    (failure,) = json.loads((tmp_path / "runs" / "summary.json").read_text())["failed"]
    assert "ended by signal 9" in failure["error"]


def test_rows_or_weights_that_changed_between_two_starts_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    test, lines = tmp_path / "test.jsonl", rows_of(content)
    test.write_text("\n".join(lines[:9]))
    model = shutil.copytree(content["models"]["tiny"], tmp_path / "model")
    content["domains"]["sums"]["test_dataset_name"] = str(test)
    content |= {"models": {"tiny": str(model)}, "methods": {"base": None}}
    assert start(content, tmp_path) is not None
    assert start(content, tmp_path) is not None
    test.write_text("\n".join(lines[1:10]))
    with pytest.raises(MaskftError, match="seed1/base was begun with other test rows than there are now"):
        start(content, tmp_path)
    with pytest.raises(MaskftError, match="was begun with other test rows"):  # where they change after the start
        perform(planned(content, tmp_path / "runs")[0])
    test.write_text("\n".join(lines[:9]))
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.lm_head.weight.data += 1
    weights.save_pretrained(model)
    content["methods"] = {"base": None, "fft": None}
    with pytest.raises(MaskftError, match=f"seed1/base was begun with other weights of {model} than there are now"):
        start(content, tmp_path)


@pytest.mark.parametrize(("num_steps", "epochs"), [(3, 2), (-1, 0.5)])
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(
    num_steps: int, epochs: float, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["methods"] = {"fft": {"max_steps": num_steps, "num_train_epochs": epochs, "eval_steps": 1}}
    (straight,), (killed,) = (planned(content, tmp_path / name) for name in ("straight", "killed"))
    expected = perform(straight)
    with monkeypatch.context() as patch:
        patch.setattr("maskft_lab.study.methods._Worker.score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            perform(killed)
    shutil.rmtree(killed.folder / "model")
    found = perform(killed)
    assert found["test"] == expected["test"]
    assert [point["step"] for point in found["points"]] == [point["step"] for point in expected["points"]]


@pytest.mark.parametrize(
    ("split", "name", "message"),
    [
        ("test", "train", "domain 'sums': 42 of 60 test rows have the prompt of a train row"),
        ("eval", "test", "'sums': 60 of 60 test rows have the prompt of a validation row, so that they prove nothing"),
        ("eval", "train", "60 of 60 validation rows have the prompt of a train row"),
        ("eval", "chat", "messages need a chat template"),
    ],
)
def test_rows_that_prove_nothing_are_refused(
    split: str, name: str, message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": "!"}]
    chat = write_rows(tmp_path / "chat.jsonl", [dict(zip(("prompt", "completion"), turns, strict=True))])
    files = content["domains"]["sums"]
    places = {"train": files["dataset_name"], "test": files["test_dataset_name"], "chat": chat}
    files[f"{split}_dataset_name"] = places[name]
    with pytest.raises(MaskftError, match=message):
        start(content, tmp_path, dry_run=True)


def test_the_accuracy_of_no_right_answer_has_an_interval(content: dict[str, Any], tmp_path: Path) -> None:
    content |= {"methods": {"base": None}}
    (run,) = planned(content, tmp_path / "runs")
    run.folder.mkdir(parents=True)
    test = {"nll_sums": [1.0] * 300, "num_tokens": [1] * 300, "correct": [0] * 300}
    (run.folder / RESULT).write_text(json.dumps({"test": test}))
    accuracy = summarise(run.study, [run])["panels"][0]["rows"][0]["accuracy"]
    assert accuracy["low"] == 0 < accuracy["high"] == pytest.approx(0.0126, abs=1e-3)


def test_the_plan_is_printed_and_nothing_written_in_a_dry_run(content: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=120)
    with console.capture() as shown:
        assert start(content, tmp_path, dry_run=True, console=console) is None
    assert "8 of 8 runs to do" in shown.get()
    assert "tiny/sums/seed1/shuffled" in shown.get()
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_found_before_the_first_run(content: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(content["models"]["tiny"], tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    for change, message in (
        ({"models": {"tiny": str(tmp_path / "nowhere")}}, "No model can be read from"),
        ({"methods": {"fft": None, "mft": {"layers_to_transform": [9]}}}, "names layer 9"),
        ({"methods": {"fft": None, "lora": {"r": 2, "layers_to_transform": [9]}}}, "'lora'.*names layer 9"),
        ({"methods": {"fft": None, "lora": {"r": 2, "target_modules": ["missing"]}}}, "'lora'.*missing"),
        ({"methods": {"fft": None, "crossfit": {"num_folds": 99}}}, "cannot be dealt into 99 folds"),
        ({"models": {"tiny": str(tmp_path / "empty")}}, "no weights"),
    ):
        with pytest.raises(MaskftError, match=message):
            start(content | change, tmp_path)
        assert not (tmp_path / "runs").exists()
    with pytest.raises(MaskftError, match="`jobs` must be at least 1"):
        start(content, tmp_path, jobs=0)


def test_generated_rows_have_their_checker() -> None:
    sizes = {"num_train": 4, "num_validation": 3, "num_test": 2, "num_terms": [2, 3]}
    splits, is_right = load_domain(Domain("d", generated=sizes))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "validation": 3, "test": 2}
    assert is_right is not None
    assert is_right(1, splits["test"][1]["completion"][0]["content"])
    assert not is_right(1, "no number")


def test_the_answers_of_a_file_are_scored_by_the_checker_it_names(content: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+1=", "completion": f"#### {a + 1}"} for a in range(3)]
    test = write_rows(tmp_path / "test.jsonl", rows)
    domain = content["domains"]["sums"] | {"test_dataset_name": test, "checker": "gsm8k", "max_new_tokens": 4}
    result = carried_out(content | {"domains": {"sums": domain}, "methods": {"base": None}}, tmp_path / "runs")["base"]
    # An untrained model writes no number after ####; that right answers score is test_checkers.py's.
    assert result["test"]["correct"] == [0, 0, 0]
    assert len(result["answers"]) == 3
