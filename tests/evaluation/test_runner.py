import io
import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, cli
from maskft.data.rows import tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.evaluation import models as models_module
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.language_model import KeptAnswers
from maskft.evaluation.local_data import ensure_punkt, served
from maskft.evaluation.models import check_models, parse_models
from maskft.evaluation.runner import run_eval
from maskft.evaluation.samples import read_samples, sample_folder
from maskft.evaluation.tasks import TaskSettings, load_tasks
from maskft.scoring.nll import token_nll
from maskft.storage.json_text import plain

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two masks and a LoRA over the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "mask": MaskConfig(density=0.5, seed=1, task_type="CAUSAL_LM"),
        "other": MaskConfig(density=0.9, seed=2, task_type="CAUSAL_LM", layers_to_transform=[1]),
        "lora": LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        torch.manual_seed(3)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def arguments(output_dir: Path, models, tasks: str, **changes) -> EvalArguments:
    names = ",".join(map(str, models)) if isinstance(models, list) else str(models)
    values = {"limit": 6, "batch_size": 4, "max_new_tokens": 8}
    return EvalArguments(output_dir=str(output_dir), models=names, tasks=tasks, **(values | changes))


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "_load_base", lambda *_: pytest.fail("weights were loaded"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json*")) if path.is_file()
    }


def copied(tiny_model: Path, folder: Path, *, template: str | None = None, **config) -> Path:
    """The tiny model with another configuration or a chat template."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.config.update(config)
    tokenizer.chat_template = template
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def write_rows(tmp_path: Path, rows: list[tuple[str, str]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows))
    return path


def test_adapters_are_switched_on_one_base_and_score_as_if_loaded_alone(
    tiny_model, adapters, sums, tmp_path, monkeypatch
) -> None:
    loads = []
    load = models_module._load_base
    monkeypatch.setattr(models_module, "_load_base", lambda *args: loads.append(args) or load(*args))
    names = {name: f"{tiny_model}+{path}" for name, path in adapters.items()}
    results = run_eval(arguments(tmp_path / "out", [tiny_model, *names.values()], f"nll:{sums}", limit=None))
    assert len(loads) == 1
    scores = {row["model"]: row["score"] for row in results["scores"]}
    assert len(set(scores.values())) == 4

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    encoded = tokenise_rows(Dataset.from_list(rows), RowTokeniser(tokenizer))
    for name, path in {None: None, **adapters}.items():
        alone = AutoModelForCausalLM.from_pretrained(tiny_model)
        alone = alone if path is None else PeftModel.from_pretrained(alone, path)
        assert scores[names.get(name, str(tiny_model))] == pytest.approx(token_nll(alone, encoded).mean, abs=1e-6)
    # Every two models are compared, with the difference of their scores.
    assert len(results["comparisons"]) == 6
    for row in results["comparisons"]:
        assert row["difference"] == pytest.approx(scores[row["to"]] - scores[row["from"]])
        assert row["p"] <= row["p_holm"]
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(sums.read_text().splitlines(keepends=True)[::-1]))
    (again,) = run_eval(arguments(tmp_path / "again", tiny_model, f"nll:{shuffled}", limit=None))["scores"]
    same = ("score", "low", "high", "n", "num_samples", "detectable_difference")
    assert [again[key] for key in same] == [results["scores"][0][key] for key in same]


def test_answers_protocol_and_tables(tiny_model, adapters, sums_task, tmp_path) -> None:
    masked = f"{tiny_model}+{adapters['mask']}"
    out = io.StringIO()
    results = run_eval(arguments(tmp_path, [tiny_model, masked], sums_task), Console(file=out, width=250))
    for row in results["scores"]:
        protocol = row["protocol"]
        assert (protocol["num_fewshot"], protocol["dtype"], protocol["n"]) == (0, "float32", 6)
        assert protocol["generation_kwargs"]["max_gen_toks"] == 8
        assert protocol["chat_template"] is None
        assert {"torch", "transformers", "lm_eval"} <= set(protocol["versions"])
    samples = read_samples(sample_folder(tmp_path, masked, "sums"))
    assert len(samples) == 6
    text = " ".join(out.getvalue().split())
    assert "0 shots, no chat template, greedy, at most 8 new tokens, float32, n = 6" in text
    assert "p (Holm)" in text
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("sampling", [{}, {"num_samples": 2, "temperature": 0.8}])
def test_the_same_items_give_the_same_bytes_however_a_run_was_cut(
    sampling, tiny_model, sums_task, tmp_path, monkeypatch
) -> None:
    def run(name: str, **changes) -> dict[str, bytes]:
        run_eval(arguments(tmp_path / name, tiny_model, sums_task, **(sampling | changes)))
        return files(tmp_path / name)

    first = run("a")
    answers = [row["resps"] for row in read_samples(sample_folder(tmp_path / "a", str(tiny_model), "sums"))]
    assert len(answers) == 12 if sampling else 6
    assert answers[:6] != answers[6:]
    # Cut in its second batch: the answers of the first are kept, and a line that was cut short is not.
    generate, num_asked = HFLM._model_generate, []

    def cut(self, context, **given):
        num_asked.append(len(context))
        if len(num_asked) == 2:
            raise KeyboardInterrupt
        return generate(self, context, **given)

    monkeypatch.setattr(HFLM, "_model_generate", cut)
    with pytest.raises(KeyboardInterrupt):
        run("b")
    kept = sample_folder(tmp_path / "b", str(tiny_model), "sums") / "answers.jsonl"
    if not sampling:
        kept.write_text(kept.read_text() + '["half')
    assert run("b") == first
    assert sum(num_asked) == (6 + 12 if sampling else 6 + 2)
    # Nothing is left to do, so nothing is loaded; and the scores come from the files alone.
    no_weights(monkeypatch)
    assert run("b") == first
    (tmp_path / "b" / "results.json").unlink()
    run_eval(EvalArguments(output_dir=str(tmp_path / "b"), rescore=True))
    assert files(tmp_path / "b") == first
    with pytest.raises(MaskftError, match=r"another protocol.*'max_gen_toks': 8.* is now .*'max_gen_toks': 9"):
        run("b", max_new_tokens=9)


def test_what_ends_before_its_samples_are_written_lacks_nothing_and_binds_nobody(
    tiny_model, sums_task, tmp_path, monkeypatch
) -> None:
    """lm-eval's figures come first; another protocol is refused where there are answers, and only there."""
    folder = sample_folder(tmp_path, str(tiny_model), "sums")
    with monkeypatch.context() as patch:
        patch.setattr("maskft.evaluation.runner.write_samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_eval(arguments(tmp_path, tiny_model, sums_task))
    assert {path.name for path in folder.iterdir()} == {"protocol.json", "answers.jsonl", "lm_eval.json"}
    with pytest.raises(MaskftError, match="batch_size was 4 and is now 2"):
        run_eval(arguments(tmp_path, tiny_model, sums_task, batch_size=2))
    (folder / "answers.jsonl").unlink()
    assert run_eval(arguments(tmp_path, tiny_model, sums_task, batch_size=2))["scores"]


def test_one_base_is_in_memory_at_a_time(tiny_model, adapters, sums, tmp_path, monkeypatch) -> None:
    load, loaded = models_module._load_base, []

    def load_alone(*args: str) -> torch.nn.Module:
        assert not any(before() for before in loaded)
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models_module, "_load_base", load_alone)
    second = copied(tiny_model, tmp_path / "second")
    names = [f"{tiny_model}+{adapters['mask']}", tiny_model, second]
    run_eval(arguments(tmp_path / "out", names, f"nll:{sums}"))
    assert len(loaded) == 2


def test_ctrl_c_keeps_what_is_answered(tiny_model, sums, tmp_path, monkeypatch, capsys) -> None:
    plain_add, calls = KeptAnswers.add_partial, []

    def interrupted(self: KeptAnswers, *answer: object) -> None:
        plain_add(self, *answer)
        calls.append(answer)
        if len(calls) == 16:
            os.kill(os.getpid(), signal.SIGINT)

    given = ["eval", "--models", str(tiny_model), "--tasks", f"nll:{sums}", "--output_dir"]
    assert cli.main([*given, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "add_partial", interrupted)
        assert cli.main([*given, str(tmp_path / "cut")]) == 130
    words = capsys.readouterr().err.splitlines()[-1]
    assert words == f"maskft eval: stopped by Ctrl-C; kept in {tmp_path / 'cut'}: 16 answers; the same command goes on."
    assert cli.main([*given, str(tmp_path / "cut")]) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_scores_and_signs_keep_their_order_when_scored_again(tiny_model, adapters, sums, sums_task, tmp_path) -> None:
    masked = [f"{tiny_model}+{adapters[name]}" for name in ("other", "mask")]
    first = run_eval(arguments(tmp_path, [*masked, tiny_model], f"{sums_task},nll:{sums}"))
    assert [row["model"] for row in first["scores"]] != sorted(row["model"] for row in first["scores"])
    again = EvalArguments(output_dir=str(tmp_path), rescore=True)
    assert run_eval(again) == run_eval(again) == first
    # What the results do not name follows.
    run_eval(arguments(tmp_path, tiny_model, f"nll:{sums}"))
    assert run_eval(again)["scores"][0]["task"] == f"nll:{sums}"
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(MaskftError, match=r"results\.json: not valid JSON .*remove it, and that is by name"):
        run_eval(again)


def test_rows_longer_than_the_context_are_told(tiny_model, tmp_path, caplog) -> None:
    short = copied(tiny_model, tmp_path / "short", max_position_embeddings=8)
    prompts = ["ab", "cdef", "ghijklmnop", "qrstuvwxyzab"]  # the last two leave no token to score
    task = f"nll:{write_rows(tmp_path, [(prompt, '1234') for prompt in prompts])}"
    results = run_eval(arguments(tmp_path / "out", [short, tiny_model], task))
    assert f"{task}: 3 of 4 rows are longer than the model's context of 8 tokens and lost their end." in caplog.text
    samples = read_samples(sample_folder(tmp_path / "out", str(short), task))
    assert [row["doc"]["prompt"] for row in samples] == prompts
    assert [row["nll"]["count"] for row in samples] == [5, 4, 0, 0]
    assert [row["nll"].get("is_cut") for row in samples] == [None, True, True, True]
    assert [row["n"] for row in results["scores"]] == [2, 4]
    (comparison,) = results["comparisons"]
    assert "another tokenizer or context" in comparison["not_compared"]
    json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("abcd", "12"), ("abcdabcd", "12")], "no token that .* could score: all 2 prompts fill its context of 4"),
        ([("a", "12")], "rows.jsonl has 1 problem to score, and an interval needs at least 2"),
        ([("a", "12"), ("a", "13")], "rows.jsonl has 1 problem to score"),
        ([("a", "12"), ("abcd", "1")], "rows.jsonl has 1 problem to score"),
    ],
)
def test_rows_without_two_scored_problems_are_refused_before_weights_are_loaded(
    rows, message, tiny_model, sums_task, tmp_path, monkeypatch
) -> None:
    short = copied(tiny_model, tmp_path / "short", max_position_embeddings=4)
    no_weights(monkeypatch)
    tasks = f"{sums_task},nll:{write_rows(tmp_path, rows)}"
    with pytest.raises(MaskftError, match=message):
        run_eval(arguments(tmp_path / "out", short, tasks, max_new_tokens=2))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_refused(tiny_model, sums, tmp_path) -> None:
    broken = copied(tiny_model, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(MaskftError, match="a loss that is no finite number, with weights in float32"):
        run_eval(arguments(tmp_path / "out", broken, f"nll:{sums}"))


def test_groups_and_several_tasks_run_end_to_end(tiny_model, data_dir, tmp_path) -> None:
    given = arguments(tmp_path, tiny_model, "ifeval,minerva_math", data_dir=str(data_dir), limit=None, num_fewshot=1)
    with pytest.raises(MaskftError, match="minerva_math_counting_and_prob has 1 problem to score"):
        run_eval(given)
    for path in data_dir.rglob("math/*/test.jsonl"):
        path.write_text(2 * path.read_text())
    found = {(row["task"], row["metric"]): row for row in run_eval(given)["scores"]}
    assert found["ifeval", "strict_acc_mean,none"]["n"] == 2
    assert found["minerva_math", "exact_match,none"]["n"] == 16
    assert found["minerva_math_algebra", "exact_match,none"]["is_part"]


@pytest.mark.parametrize("chat", [False, True])
def test_samples_and_scores_are_lm_evals_own(chat, tiny_model, data_dir, tmp_path, monkeypatch) -> None:
    """Prompts, answers and scores, every field of every record; `served` only puts lm-eval's files in place."""
    tasks = {name: name for name in ("gsm8k", "ifeval", "arc_easy", "mmlu_astronomy")}
    tasks[str(EXAMPLES / "capitals.yaml")] = "capitals"
    monkeypatch.chdir(EXAMPLES.parent)
    model = copied(tiny_model, tmp_path / "chat", template=TEMPLATE) if chat else tiny_model
    settings = {"num_fewshot": 2, "limit": 6, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
    results = run_eval(arguments(tmp_path, model, ",".join(tasks), data_dir=str(data_dir), **settings))
    assert all(bool(row["protocol"]["chat_template"]) == chat for row in results["scores"])
    scores = {(row["task"], row["metric"]): row["score"] for row in results["scores"]}
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # takes 9 s
    ensure_punkt()
    folders = [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in ("gsm8k", "ifeval", "arc", "mmlu")]
    given = {"task_manager": TaskManager(include_path=folders, include_defaults=False), "bootstrap_iters": 0}
    theirs = HFLM(pretrained=str(model), batch_size=4, device="cpu")
    for path, task in tasks.items():
        with served(task, data_dir):
            run = lm_eval.simple_evaluate(theirs, tasks=[path], gen_kwargs="max_gen_toks=8", **given, **settings)
        samples = read_samples(sample_folder(tmp_path, str(model), task))
        assert samples == plain(run["samples"][task])
        assert len({row["doc_id"] for row in samples}) == (2 if task == "ifeval" else 6)
        for metric, value in run["results"][task].items():
            assert "stderr" in metric or "," not in metric or scores[task, metric] == pytest.approx(value)


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_shots_without_effect_are_told(num_fewshot, sums, data_dir, caplog) -> None:
    names = f"ifeval,nll:{sums},gsm8k"
    load_tasks(names, TaskSettings(data_dir=data_dir, num_fewshot=num_fewshot, limit=4))
    for name in names.split(","):
        told = f"{name} is asked with 0 worked examples: --num_fewshot 3 has no effect on it." in caplog.text
        assert told == (num_fewshot == 3 and name != "gsm8k")


@pytest.fixture(scope="module")
def named(tiny_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, and copies of the tiny one that are each without something, by the word that stands for them."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        word: folder / word.lower() for word in ("NO_WEIGHTS", "CUT", "NO_TOKENIZER", "NOT_CAUSAL", "SMALL", "OTHER")
    }
    for path in found.values():
        shutil.copytree(tiny_model, path)
    (found["NO_WEIGHTS"] / "model.safetensors").unlink()
    (found["CUT"] / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-1000])
    for path in found["NO_TOKENIZER"].glob("tokenizer*"):
        path.unlink()
    (found["NOT_CAUSAL"] / "config.json").write_text('{"model_type": "t5"}')
    for word, num_layers in (("SMALL", 1), ("OTHER", 3)):  # of other weights
        config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=num_layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[word])
    return found | {"MODEL": tiny_model, "MASK": adapters["mask"]}


@pytest.mark.parametrize("rescore", [False, True])
def test_a_file_in_the_place_of_the_output_is_refused_at_the_start(rescore, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("maskft.evaluation.runner.parse_models", pytest.fail)
    with pytest.raises(MaskftError, match=r"cannot be made: .*/file is a file; give another --output_dir"):
        run_eval(arguments(tmp_path / "file" / "below", "m", "t", rescore=rescore))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "gsm8"}, r"no task 'gsm8' \(nearest: gsm8k.*; correct its name"),
        ({"tasks": "alpaca_eval"}, r"no task 'alpaca_eval'.*; write answers with examples/alpaca_eval\.py"),
        ({"tasks": "humaneval", "data_dir": "."}, "--allow_code_execution"),
        ({"tasks": "gsm8k", "data_dir": "."}, r"gsm8k needs the file gsm8k/train\.jsonl, which is missing; docs"),
        ({"tasks": "nll:missing.jsonl"}, "no data file or folder missing.jsonl"),
        ({"tasks": "nll:"}, "`nll:` needs a data set"),
        ({"apply_chat_template": True}, "has no chat template for --apply_chat_template"),
        ({"models": "missing/model/folder"}, "No model can be read from 'missing/model/folder'"),
        ({"models": "MODEL,MODEL"}, "twice"),
        ({"models": "MODEL,"}, "--models holds ''"),
        ({"models": "MODEL+missing"}, r"missing holds no adapter_config\.json"),
        ({"models": "MASK"}, "is an adapter, not a model"),
        ({"models": "SMALL+MASK"}, "was made for another base"),
        ({"models": "MODEL,NO_WEIGHTS"}, "no_weights .*no weights"),
        ({"models": "MODEL,CUT"}, r"cut/model\.safetensors .*cut short"),
        ({"models": "MODEL,NO_TOKENIZER"}, "No tokenizer can be read from .*no_tokenizer"),
        ({"models": "MODEL,NOT_CAUSAL"}, "not_causal' holds a model of the type 't5', which .* causal language model"),
        ({"max_new_tokens": None, "gen_kwargs": "max_tokens=1k"}, "--gen_kwargs .* cannot be used: .*'1k'"),
        ({"max_new_tokens": None, "gen_kwargs": "max_tokens=5000"}, "may have 5000 tokens, but the context"),
        ({"max_new_tokens": 5000}, "may have 5000 tokens, but the context of .* lower it with --max_new_tokens"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(
    changes, message, named, sums_task, tmp_path, monkeypatch
) -> None:
    no_weights(monkeypatch)
    values = {"models": "MODEL", "tasks": sums_task} | changes
    for word, path in named.items():
        values["models"] = values["models"].replace(word, str(path))
    with pytest.raises(MaskftError, match=message):
        run_eval(arguments(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_of_the_same_shape_is_refused_by_its_fingerprint(named, sums_task, tmp_path) -> None:
    model = f"{named['OTHER']}+{named['MASK']}"
    with pytest.raises(MaskftError, match="fingerprint"):
        run_eval(arguments(tmp_path / "out", model, sums_task))
    assert run_eval(arguments(tmp_path / "forced", model, sums_task, force=True))["scores"]


GIVEN = "--output_dir o --models m --tasks t"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--output_dir is missing"),
        ("--output_dir o", "--models is missing"),
        (f"{GIVEN} --limit 1", "`limit` must be at least 2 items or a share between 0 and 1, got 1"),
        (f"{GIVEN} --num_samples 2", "without --temperature"),
        (f"{GIVEN} --temperature nan", "`temperature` must be a finite number, got nan"),
        (f"{GIVEN} --num_fewshot -1", "`num_fewshot` must be at least 0 or null, got -1"),
        (f"{GIVEN} --dtype int4", "`dtype` must be 'auto', "),
        (f"{GIVEN} --data_dir nowhere", "--data_dir is no folder"),
        ("--models f2 g2 --tasks t", "'g2' belongs to no flag; separate the values of --models by commas"),
        ("fft", "'fft' belongs to no flag; name the model with --models."),
        ("--output_dir o --models m --tsks t", "Unknown flag --tsks (nearest: tasks"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, capsys) -> None:
    assert cli.main(["eval", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskft eval: error: ")
    assert message in error


def test_an_adapter_is_scored_with_the_chat_template_saved_with_it(tiny_model, adapters, tmp_path, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "x"
    monkeypatch.chdir(tmp_path)
    own = shutil.copytree(
        next(iter(adapters.values())), tmp_path / "None"
    )  # the base has no adapter, whatever lies here
    tokenizer.save_pretrained(own)
    specs = parse_models(f"{tiny_model},{tiny_model}+{own}")
    assert [each.chat_template for each in check_models(specs).values()] == [None, "x"]
    before, config = specs[1].hashes(), own / "adapter_config.json"
    config.write_text(config.read_text() + " ")  # where a LoRA's scale lies, and a mask's reference
    assert [name for name, value in specs[1].hashes().items() if value != before[name]] == ["adapter"]


@pytest.mark.parametrize("line", ["5", "[1]", '["a"]', "[[], 1]", '{"a": 1}', "[" * 5000, "x"])
def test_a_file_of_answers_that_holds_something_else_is_refused(tmp_path, line) -> None:
    (tmp_path / "answers.jsonl").write_text(f'["a", 1]\n{line}\n')
    with pytest.raises(MaskftError, match="line 2"):
        KeptAnswers(tmp_path / "answers.jsonl")
