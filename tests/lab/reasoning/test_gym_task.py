"""reasoning-gym's problems as tasks of maskft eval."""

import json

import pytest

from maskft.errors import MaskftError
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.runner import run_eval
from maskft.evaluation.tasks import EvalTask, TaskSettings, load_tasks
from maskft_lab.reasoning.gym_task import gym_task

CHAIN_SUM = "reasoning_gym:chain_sum"


def questions(seed: int, limit: int = 8) -> list[str]:
    task = gym_task(CHAIN_SUM, limit=limit, seed=seed)
    return [doc["question"] for doc in task.eval_docs]


def test_problems_come_from_the_seed_and_differ() -> None:
    assert len(set(questions(0))) == 8
    assert questions(0) == questions(0, 20)[:8]
    assert not set(questions(0)) & set(questions(1))
    assert len(gym_task(CHAIN_SUM).eval_docs) == 200


def test_answers_are_scored_by_reasoning_gyms_own_checker() -> None:
    task = EvalTask(CHAIN_SUM, gym_task(CHAIN_SUM, limit=2), TaskSettings())
    doc = task.docs[0]
    right = json.loads(doc["entry"])["answer"]
    for output, is_right in ((right, True), (f"So <answer>{right}</answer>!", True), (f"{right}1", False)):
        values = task.judge(doc, output)
        assert values["accuracy,none"] is is_right
        assert (values["score,none"] == 1) is is_right


def test_unknown_kinds_and_too_few_problems_are_told(monkeypatch) -> None:
    with pytest.raises(MaskftError, match=r"no task 'chain_som' \(nearest: chain_sum"):
        gym_task("reasoning_gym:chain_som")
    monkeypatch.setattr("maskft_lab.reasoning.gym_task.distinct_entries", lambda *_: [{"question": "?"}])
    with pytest.raises(MaskftError, match="makes only 1 different problems of 200; give a lower --limit"):
        gym_task(CHAIN_SUM)


def test_the_kind_is_registered_and_its_prompts_are_lines(tiny_model, tmp_path) -> None:
    (task,) = load_tasks(CHAIN_SUM, TaskSettings(limit=2, num_fewshot=3))
    with task.seeded():
        task.task.build_all_requests(limit=2)
    assert [request.args[0] for request in task.task.instances] == [f"{doc['question']}\n" for doc in task.docs]
    results = run_eval(
        EvalArguments(
            output_dir=str(tmp_path), models=str(tiny_model), tasks=CHAIN_SUM, limit=4, max_new_tokens=4, seed=3
        )
    )
    assert [row["metric"] for row in results["scores"]] == ["accuracy,none", "score,none"]
    assert "reasoning_gym" in results["scores"][0]["protocol"]["versions"]
