"""lm-eval's tasks over local files; what its own functions say is the reference."""

import json
import random
from pathlib import Path

import evaluate
import nltk
import pytest
import torch
from punkt.data import english

from maskft.errors import MaskftError
from maskft.evaluation import code_tasks
from maskft.evaluation.local_data import ensure_punkt
from maskft.evaluation.sandboxed import NOT_PLAIN
from maskft.evaluation.tasks import EvalTask, TaskSettings, load_tasks


def load(name, data_dir=None, **changes) -> EvalTask:
    (task,) = load_tasks(str(name), TaskSettings(data_dir=data_dir, **changes))
    return task


def prompts(task: EvalTask) -> list[str]:
    """As lm-eval builds them."""
    with task.seeded():
        task.task.build_all_requests(limit=len(task.docs))
    return [instance.args[0] for instance in task.task.instances]


def test_gsm8k_is_lm_evals_definition(data_dir) -> None:
    task = load("gsm8k", data_dir, num_fewshot=3)
    assert len(task.docs) == 8
    assert task.task.config.num_fewshot == prompts(task)[0].count("Question: ") - 1 == 3
    assert prompts(task)[0].endswith("Question: A farmer has 1 cows and buys 2 more. How many cows?\nAnswer:")
    strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
    assert task.judge(task.docs[0], "1 + 2 is\n#### 3") == {strict: 1.0, flexible: 1.0}
    assert task.judge(task.docs[0], "So there are 3.") == {strict: 0.0, flexible: 1.0}
    assert task.judge(task.docs[5], "#### 1,234")[strict] == 1.0
    assert task.generation["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_settings_go_over_those_of_the_task(data_dir) -> None:
    task = load("gsm8k_cot", data_dir, limit=0.5, gen_kwargs={"max_gen_toks": 7})
    assert task.task.config.num_fewshot == 8
    assert len(task.docs) == len(prompts(task)) == 4
    assert task.generation["max_gen_toks"] == 7
    assert task.generation["until"]


@pytest.mark.parametrize("seed", [None, 5])
def test_worked_examples_are_drawn_by_the_seed_and_randomness_goes_on(seed, data_dir) -> None:
    task = load("gsm8k", data_dir, num_fewshot=2, seed=seed)
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = prompts(task)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert prompts(task) == first != prompts(load("gsm8k", data_dir, num_fewshot=2, seed=6))


def test_ifeval_counts_instructions_and_is_the_same_each_time(data_dir) -> None:
    task = load("ifeval", data_dir)
    assert task.generation["max_gen_toks"] == 1280
    first = task.judge(task.docs[0], "One sentence. Another, with a comma.")
    assert first["inst_level_strict_acc,none"] == [False, True]
    assert first["prompt_level_strict_acc,none"] is False
    assert task.judge(task.docs[0], "One. Two.")["prompt_level_strict_acc,none"] is True
    verdicts = [task.judge(task.docs[1], "HALLO WELT OK") for _ in range(20)]
    assert all(verdict == verdicts[0] for verdict in verdicts)


def test_the_sentence_model_is_written_once_in_nltks_format(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    ensure_punkt(tmp_path)
    tokenizer = nltk.data.load("nltk:tokenizers/punkt/english.pickle")
    assert tokenizer._params.abbrev_types == set(english.ABBREV_TYPES)
    assert tokenizer._params.collocations == {tuple(pair) for pair in english.COLLOCATIONS}
    assert tokenizer._params.sent_starters == set(english.SENT_STARTERS)
    assert dict(tokenizer._params.ortho_context) == dict(english.ORTHO_CONTEXT)
    assert len(tokenizer.tokenize("Dr. Smith went to Washington, D.C. on Jan. 5. He was tired! Was he?")) == 3
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*")}
    ensure_punkt(tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*")}


def test_all_subjects_make_one_group(data_dir) -> None:
    tasks = load_tasks("minerva_math", TaskSettings(data_dir=data_dir))
    assert [len(task.docs) for task in tasks] == [2, 1, 1, 1, 1, 1, 1]
    whole = {"num_tasks": 7, "metrics": {"exact_match": True, "math_verify": True}}
    assert all(task.groups == {"minerva_math": whole} for task in tasks)
    assert {task.task.config.num_fewshot for task in tasks} == {4}
    for answer in (2, 3):
        said = f"Final Answer: The final answer is ${answer}$. I hope it is correct."
        assert tasks[3].judge(tasks[3].docs[0], said)["exact_match,none"] == (answer == 2)


@pytest.fixture
def programs(monkeypatch) -> list[str]:
    """The programs handed to the sandbox, their tests after them; it says that those with `return a + b` pass."""
    seen: list[str] = []

    def run(program: str, tests: str) -> str:
        seen.append(f"{program}\n{tests}")
        return "" if "return a + b" in program else "failed"

    monkeypatch.setattr(code_tasks, "run_untrusted", run)
    monkeypatch.setattr(code_tasks, "find_isolation", lambda: None)
    return seen


def test_code_goes_to_the_sandbox_and_nowhere_else(data_dir, programs) -> None:
    task = load("mbpp", data_dir, allow_code_execution=True)
    doc, _ = task.docs  # MBPP's test split is task ids 11 to 510
    assert "[BEGIN]" in prompts(task)[0]
    programs.clear()
    assert task.judge(doc, "```python\ndef f(a, b):\n    return a + b\n```") == {"pass_at_1,none": 1.0}
    assert task.judge(doc, "```python\ndef f(a, b):\n    return a - b\n```") == {"pass_at_1,none": 0.0}
    assert [program.endswith("assert f(1, 2) == 3") for program in programs] == [True, True]


def test_several_answers_to_a_problem_are_judged_together(programs) -> None:
    with code_tasks.sandboxed_code("t", True):
        checker = evaluate.load("code_eval")
    right, wrong = "return a + b", "return a - b"
    scores, _ = checker.compute(references=["", ""], predictions=[[right, wrong, wrong], [wrong] * 3], k=[1, 2])
    assert scores == {"pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx(1 / 3)}
    assert len(programs) == 6


def test_programs_that_cannot_be_asked_are_told_once_with_their_number(monkeypatch, caplog) -> None:
    monkeypatch.setattr(code_tasks, "run_untrusted", lambda program, _: NOT_PLAIN + program)
    with code_tasks.sandboxed_code("mbpp", True):
        scores, _ = evaluate.load("code_eval").compute(references=[""], predictions=[["f gives A", "f gives A", "g"]])
        assert scores == {"pass@1": 0}
        assert not caplog.messages
    said = "mbpp: 3 programs failed because their tests need more of them than plain values: f gives A (2); g (1)"
    assert caplog.messages == [said]
    with code_tasks.sandboxed_code("mbpp", True):
        pass
    assert caplog.messages == [said]


def ifeval(**changes) -> bytes:
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return json.dumps(row | changes).encode()


ROW = b'{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("math500/other", b"", r"math500/test\.jsonl, which is missing"),
        ("gsm8k/test.jsonl", ROW + b'{"question"', "line 2: not valid JSON"),
        ("gsm8k/test.jsonl.gz", b"{}\n", r"test\.jsonl\.gz cannot be read"),
        ("gsm8k/test.jsonl", ROW + b"{}\n", r"test\.jsonl, row 2, has no 'question'; gsm8k needs question, answer"),
        ("gsm8k/train.jsonl", b'{"question": "a", "answer": null}\n', r"train\.jsonl, row 1, has no 'answer'"),
        ("gsm8k/test.jsonl", b'{"question": 1, "answer": "1"}\n' + ROW, "be used"),
        ("mbpp/mbpp.jsonl", b'{"task_id": 2, "text": "", "code": "", "test_list": [""]}\n', "MBPP's test split"),
        ("ifeval/input_data.jsonl", ifeval(instruction_id_list=["no:such"]), "with key 7 cannot .*'no:such'"),
        ("ifeval/input_data.jsonl", ifeval(kwargs=[]), "with key 7 cannot be checked .IndexError"),
        ("ifeval/input_data.jsonl", ifeval(kwargs=[{"num": 3}]), "with key 7 cannot be checked .TypeError"),
    ],
)
def test_local_rows_that_cannot_be_used_are_named(name, content, message, data_dir, programs) -> None:
    path = data_dir / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.with_suffix("").unlink()
    path.write_bytes(content)
    task = name.partition("/")[0].replace("math500", "minerva_math500")
    with pytest.raises(MaskftError, match=message) as found:
        load(task, data_dir, allow_code_execution=True)
    assert "hub" not in str(found.value)


@pytest.mark.parametrize(("num_fewshot", "num_rows"), [(9, 8), (None, 4)])
def test_more_shots_than_rows_are_refused(num_fewshot, num_rows, data_dir) -> None:
    path = data_dir / "gsm8k" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_rows]))
    message = rf"gsm8k is to be asked with {num_fewshot or 5} worked examples, but has {num_rows}"
    with pytest.raises(MaskftError, match=message):
        load("gsm8k", data_dir, num_fewshot=num_fewshot)
    assert load("gsm8k", data_dir, num_fewshot=num_rows).task.config.num_fewshot == num_rows
    with pytest.raises(MaskftError, match="gsm8k_cot is to be asked with 9 worked examples, but has 8"):
        load("gsm8k_cot", data_dir, num_fewshot=9)  # those of its definition
    assert load("ifeval", data_dir, num_fewshot=5).task.config.num_fewshot == 0


def test_data_sets_without_a_layout_of_their_own_lie_under_their_names(data_dir) -> None:
    assert load("arc_easy", data_dir).docs[0]["question"] == "What is 1 and 2?"
    with pytest.raises(MaskftError, match=r"arc_challenge needs the file .*ai2_arc/ARC-Challenge/train\.jsonl"):
        load("arc_challenge", data_dir)


OWN_TASK = """{task: own, dataset_path: json, dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}, test_split: test,
doc_to_text: "{{prompt}}:", doc_to_target: "{{test}}", """
CHOICE = 'output_type: multiple_choice, doc_to_choice: ["Rome", "Paris"]}'
CODE = """output_type: generate_until, generation_kwargs: {until: []}, unsafe_code: MARK,
metric_list: [{metric: !function checks.METRIC, aggregation: mean, higher_is_better: true}]}"""
SANDBOXED = """
import evaluate
code_eval = evaluate.load("code_eval")
def in_sandbox(references, predictions):
    return code_eval.compute(references=references, predictions=[predictions])[0]["pass@1"]
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_a_task_of_ones_own_needs_no_data_dir_and_keeps_its_files_beside_one(by_name, data_dir, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Italy", "test": 0}\n{"prompt": "France", "test": 1}\n')
    path = tmp_path / "own.yaml"
    path.write_text((OWN_TASK + CHOICE).replace("FOLDER", str(tmp_path)))
    for folder in (None, data_dir):
        task = load("own" if by_name else path, folder, include_path=str(tmp_path) if by_name else None)
        assert (task.name, len(task.docs), task.generation) == ("own", 2, None)
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace("}}:", "}}?"))
    with pytest.raises(MaskftError, match="two tasks own that differ"):
        load_tasks(f"{path},{other}", TaskSettings())


@pytest.mark.parametrize("metric", ["in_sandbox", "by_itself"])
def test_code_of_a_task_of_ones_own_is_run_in_the_sandbox_or_not_at_all(
    metric, tmp_path, programs, monkeypatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "f", "test": "assert f()"}\n' * 2)
    is_ours = metric == "in_sandbox"
    by_itself = "def by_itself(references, predictions):\n    return exec(predictions[0])\n"
    (tmp_path / "checks.py").write_text(SANDBOXED if is_ours else by_itself)
    path = tmp_path / "own_code.yaml"
    text = (OWN_TASK + CODE).replace("FOLDER", str(tmp_path)).replace("METRIC", metric)
    path.write_text(text.replace("MARK", str(not is_ours).lower()))
    for _ in range(2):  # a checker that was imported before is refused like a new one
        with pytest.raises(MaskftError, match="runs the code that the model writes"):
            load(path)
        if not is_ours:
            with pytest.raises(MaskftError, match="own runs code in a way of its own"):
                load(path, allow_code_execution=True)
            continue
        task = load(path, allow_code_execution=True)
        assert task.judge(task.docs[0], "def f(): return a + b") == {"in_sandbox,none": 1.0}
        assert programs.pop() == "def f(): return a + b\nassert f()"
        monkeypatch.setattr(code_tasks, "find_isolation", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # before a model answers
            load(path, allow_code_execution=True)
        monkeypatch.setattr(code_tasks, "find_isolation", lambda: None)
