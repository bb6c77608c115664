import json
import shutil

import pytest
import runs
from peft import PeftModel
from runs import every
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.errors import MaskftError
from maskft.evaluation.tasks import TaskSettings, load_tasks
from maskft.training.arguments import metric_name
from maskft.training.task_eval import load_eval_tasks, score_task

GSM8K = "gsm8k"


@pytest.fixture
def settings(tmp_path):
    """Four problems of GSM8K at every fourth step."""
    rows = [{"question": f"How many are {i} and 2?", "answer": f"#### {i + 2}"} for i in range(8)]
    for split in ("train", "test"):
        path = tmp_path / "tasks" / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = every(4) | {"eval_tasks_limit": 4, "eval_tasks": GSM8K, "eval_data_dir": str(tmp_path / "tasks")}
    return lambda **changes: given | changes


def test_tasks_are_scored_on_the_mask_as_it_is_saved(train, settings, tiny_model, sums, tmp_path) -> None:
    nll = f"nll:{sums}"
    given = settings(eval_tasks=f"{nll},{GSM8K}", metric_for_best_model=metric_name(nll))
    report = train(tmp_path / "run", **given)
    scored = [entry for entry in report["log_history"] if metric_name(nll) in entry]
    assert [entry["step"] for entry in scored] == [4, 8, 12, 16]
    assert all(0 <= entry[metric_name(GSM8K)] <= 1 for entry in scored)
    # The best checkpoint is chosen by the task, and what is saved scores what was logged.
    best = min(scored, key=lambda entry: entry[metric_name(nll)])
    assert report["best"] == {"metric": metric_name(nll), "value": best[metric_name(nll)], "step": best["step"]}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run")
    (task,) = load_tasks(nll, TaskSettings(limit=4))
    score = score_task(loaded, AutoTokenizer.from_pretrained(tiny_model), task, 8)
    assert score == pytest.approx(best[metric_name(nll)], abs=1e-6)


def test_a_task_of_a_yaml_file_chooses_the_checkpoint_by_the_name_in_it(train, settings, tmp_path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"q": f"{i}+1=", "choices": [str(i + 1), "x"]}) + "\n" for i in range(4)))
    task = tmp_path / "a-file.yaml"
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\ntest_split: test\n"
    task.write_text(
        f"task: 'sums_of_mine'  # its name\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc, aggregation: mean, "
        "higher_is_better: true}]\n"
    )
    report = train(tmp_path / "run", **settings(eval_tasks=str(task), metric_for_best_model="eval_sums_of_mine"))
    scores = [entry["eval_sums_of_mine"] for entry in report["log_history"] if "eval_sums_of_mine" in entry]
    assert report["best"]["metric"] == "eval_sums_of_mine"
    assert report["best"]["value"] == max(scores)


def test_early_stopping_watches_a_task_and_counts_on_from_a_checkpoint(train, settings, tmp_path) -> None:
    metric = metric_name(GSM8K)
    given = settings(metric_for_best_model=metric, early_stopping_patience=2, save_total_limit=0)
    whole = train(tmp_path / "whole", **given)
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    resumed = train(tmp_path / "killed", **given, resume_from_checkpoint="auto")
    for report in (whole, resumed):
        # A random model solves none of the sums, so that the first evaluation stays the best.
        assert [entry["step"] for entry in report["log_history"] if metric in entry] == [4, 8, 12]
        assert report["best"]["value"] == 0
        assert report["settings"]["greater_is_better"] is True


@pytest.mark.parametrize("metric", [metric_name(GSM8K), metric_name(GSM8K).removeprefix("eval_")])
def test_the_checkpoint_of_the_highest_accuracy_is_kept(metric, train, settings, tmp_path, monkeypatch) -> None:
    scores = iter([0.1, 0.9, 0.5, 0.5])
    monkeypatch.setattr("maskft.training.task_eval.score_task", lambda *given: next(scores))
    report = train(tmp_path / "run", **settings(metric_for_best_model=metric))
    assert report["best"] == {"metric": metric_name(GSM8K), "value": 0.9, "step": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": "nll:"}, "`nll:` needs a data set"),
        ({"eval_tasks": "humaneval"}, "only maskft eval with --allow_code_execution"),
        ({"eval_tasks": "nll:missing.jsonl"}, "no data file or folder missing.jsonl"),
        ({"eval_tasks": "nll:a/b.jsonl,nll:a_b.jsonl"}, "would both be scored as eval_nll_a_b_jsonl"),
    ],
)
def test_bad_tasks_are_refused_before_training(changes, message, settings, tiny_model, tmp_path) -> None:
    with pytest.raises(MaskftError, match=message):
        load_eval_tasks(runs.settings(tmp_path, **settings(**changes)), AutoTokenizer.from_pretrained(tiny_model))


def test_a_perplexity_does_not_choose_the_worst_checkpoint(settings, tiny_model, tmp_path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "12+3=15"}\n' * 2)
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}}}\ntest_split: test\n"
    asked = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    (tmp_path / "texts.yaml").write_text(f"task: texts\n{data}{asked}metric_list: [{{metric: word_perplexity}}]\n")
    given = settings(eval_tasks=f"{tmp_path}/texts.yaml", metric_for_best_model="eval_texts")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(MaskftError, match="texts's word_perplexity lower is better; give --greater_is_better False"):
        load_eval_tasks(runs.settings(tmp_path, **given), tokenizer)
    assert load_eval_tasks(runs.settings(tmp_path, **given, greater_is_better=False), tokenizer)


def test_without_tasks_nothing_is_loaded(tiny_model, tmp_path) -> None:
    assert load_eval_tasks(runs.settings(tmp_path), AutoTokenizer.from_pretrained(tiny_model)) == []
