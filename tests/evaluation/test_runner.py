import io
import json
import shutil
from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, cli
from maskft.data.tokens import tokenise_row
from maskft.errors import MaskftError
from maskft.evaluation import models as models_module
from maskft.evaluation.arguments import EvalArguments
from maskft.evaluation.local_data import served
from maskft.evaluation.runner import run_eval
from maskft.evaluation.samples import read_samples, sample_folder
from maskft.evaluation.task import TaskSettings
from maskft.evaluation.tasks import load_tasks
from maskft.scoring.nll import token_nll
from maskft.storage.json_text import plain

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CHAIN_SUM = "reasoning_gym:chain_sum"
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
    def refuse(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models_module, "_load_base", refuse)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json*"))}


def test_adapters_are_switched_on_one_base_and_score_as_if_loaded_alone(
    tiny_model, adapters, sums, tmp_path, monkeypatch
) -> None:
    loads = []
    load = models_module._load_base
    monkeypatch.setattr(models_module, "_load_base", lambda *args: loads.append(args) or load(*args))
    names = {name: f"{tiny_model}+{path}" for name, path in adapters.items()}
    task = f"nll:{sums}"
    given = arguments(tmp_path / "out", [tiny_model, *names.values()], task, limit=None)
    results = run_eval(given)
    assert len(loads) == 1
    scores = {row["model"]: row["score"] for row in results["scores"]}
    assert len(set(scores.values())) == 4

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    encoded = Dataset.from_list([tokenise_row(row, tokenizer) for row in rows])
    for name, path in adapters.items():
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), path)
        assert scores[names[name]] == pytest.approx(token_nll(alone, encoded).mean, abs=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert scores[str(tiny_model)] == pytest.approx(token_nll(plain, encoded).mean, abs=1e-6)
    # Every two models are compared, with the difference of their scores.
    assert len(results["comparisons"]) == 6
    for row in results["comparisons"]:
        assert row["difference"] == pytest.approx(scores[row["to"]] - scores[row["from"]])
        assert row["p"] <= row["p_holm"]


def test_answers_protocol_and_tables(tiny_model, adapters, tmp_path) -> None:
    masked = f"{tiny_model}+{adapters['mask']}"
    out = io.StringIO()
    given = arguments(tmp_path, [tiny_model, masked], CHAIN_SUM)
    results = run_eval(given, Console(file=out, width=250))
    for row in results["scores"]:
        protocol = row["protocol"]
        assert (protocol["num_fewshot"], protocol["dtype"], protocol["n"]) == (0, "float32", 6)
        assert protocol["generation_kwargs"]["max_gen_toks"] == 8
        assert protocol["chat_template"] is None
        assert {"torch", "transformers", "reasoning_gym"} <= set(protocol["versions"])
    samples = read_samples(sample_folder(tmp_path, masked, CHAIN_SUM))
    assert len(samples) == 6
    assert {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"} <= set(samples[0])
    text = " ".join(out.getvalue().split())
    assert "0 shots, no chat template, greedy, at most 8 new tokens, float32, n = 6" in text
    assert "p (Holm)" in text
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("sampling", [{}, {"num_samples": 2, "temperature": 0.8}])
def test_the_same_items_give_the_same_bytes_however_a_run_was_cut(sampling, tiny_model, tmp_path, monkeypatch) -> None:
    def run(name: str, **changes) -> dict[str, bytes]:
        run_eval(arguments(tmp_path / name, tiny_model, CHAIN_SUM, **(sampling | changes)))
        return files(tmp_path / name)

    first = run("a")
    answers = [row["resps"] for row in read_samples(sample_folder(tmp_path / "a", str(tiny_model), CHAIN_SUM))]
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
    kept = sample_folder(tmp_path / "b", str(tiny_model), CHAIN_SUM) / "answers.jsonl"
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


def test_scores_and_signs_keep_their_order_when_scored_again(tiny_model, adapters, sums, tmp_path) -> None:
    masked = [f"{tiny_model}+{adapters[name]}" for name in ("other", "mask")]
    tasks = [f"nll:{sums}", CHAIN_SUM]
    first = run_eval(arguments(tmp_path, [*masked, tiny_model], ",".join(tasks[::-1])))
    assert [row["model"] for row in first["scores"]] != sorted(row["model"] for row in first["scores"])
    again = EvalArguments(output_dir=str(tmp_path), rescore=True)
    assert run_eval(again) == first
    assert run_eval(again) == first
    # What the results do not name follows.
    run_eval(arguments(tmp_path, tiny_model, tasks[0]))
    assert run_eval(again)["scores"][0]["task"] == tasks[0]
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(MaskftError, match=r"results\.json, which has the order of the models, cannot be read"):
        run_eval(again)


def test_shuffled_items_score_the_same(tiny_model, sums, tmp_path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[::-1]))
    scores = []
    for path in (sums, shuffled):
        (row,) = run_eval(arguments(tmp_path / path.stem, tiny_model, f"nll:{path}", limit=None))["scores"]
        scores.append({key: value for key, value in row.items() if key not in ("task", "protocol")})
    assert scores[0] == scores[1]


def with_context(tiny_model: Path, folder: Path, context: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.max_position_embeddings = context
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_rows_longer_than_the_context_are_told(tiny_model, tmp_path, caplog) -> None:
    short = with_context(tiny_model, tmp_path / "short", 8)
    prompts = ["ab", "cdef", "ghijklmnop", "qrstuvwxyzab"]  # the last two leave no token to score
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": "1234"}) + "\n" for prompt in prompts))
    task = f"nll:{path}"
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
        (
            [("abcd", "12"), ("abcdabcd", "12")],
            "no token that .* could score: all 2 prompts fill its context of 4",
        ),
        ([("a", "12")], "rows.jsonl has 1 problem to score, and an interval needs at least 2"),
        ([("a", "12"), ("a", "13")], "rows.jsonl has 1 problem to score"),
        ([("a", "12"), ("abcd", "1")], "rows.jsonl has 1 problem to score"),
    ],
)
def test_rows_without_two_scored_problems_are_refused_before_weights_are_loaded(
    rows, message, tiny_model, tmp_path, monkeypatch
) -> None:
    short = with_context(tiny_model, tmp_path / "short", 4)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in rows))
    no_weights(monkeypatch)
    with pytest.raises(MaskftError, match=message):
        run_eval(arguments(tmp_path / "out", short, f"{CHAIN_SUM},nll:{path}", max_new_tokens=2))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_refused(tiny_model, sums, tmp_path) -> None:
    broken = with_context(tiny_model, tmp_path / "broken", 64)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(MaskftError, match="a loss that is no finite number, with weights in float32"):
        run_eval(arguments(tmp_path / "out", broken, f"nll:{sums}"))


def test_the_chat_template_is_used_where_asked_for(tiny_model, tmp_path) -> None:
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    results = run_eval(arguments(tmp_path / "out", folder, CHAIN_SUM, apply_chat_template=True))
    assert results["scores"][0]["protocol"]["chat_template"]
    samples = read_samples(sample_folder(tmp_path / "out", str(folder), CHAIN_SUM))
    assert all(sample["arguments"][0][0].endswith("=?") for sample in samples)


def test_groups_and_several_tasks_run_end_to_end(tiny_model, data_dir, tmp_path) -> None:
    tasks = "ifeval,minerva_math"
    given = arguments(tmp_path, tiny_model, tasks, data_dir=str(data_dir), limit=None, num_fewshot=1)
    with pytest.raises(MaskftError, match="minerva_math_counting_and_prob has 1 problem to score"):
        run_eval(given)
    for path in data_dir.rglob("math/*/test.jsonl"):
        path.write_text(2 * path.read_text())
    found = {(row["task"], row["metric"]): row for row in run_eval(given)["scores"]}
    assert found["ifeval", "strict_acc_mean,none"]["n"] == 2
    assert found["minerva_math", "exact_match,none"]["n"] == 16
    assert found["minerva_math_algebra", "exact_match,none"]["is_part"]


def test_samples_and_scores_are_those_of_lm_evals_own_command(tiny_model, data_dir, tmp_path, monkeypatch) -> None:
    tasks = {"gsm8k": "gsm8k", str(EXAMPLES / "capitals.yaml"): "capitals"}
    monkeypatch.chdir(EXAMPLES.parent)
    given = arguments(tmp_path, tiny_model, ",".join(tasks), data_dir=str(data_dir), num_fewshot=2)
    scores = {(row["task"], row["metric"]): row["score"] for row in run_eval(given)["scores"]}
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # takes 9 s
    with served("gsm8k", data_dir):
        theirs = lm_eval.evaluator.simple_evaluate(
            HFLM(pretrained=str(tiny_model), batch_size=4, device="cpu"),
            tasks=list(tasks),
            num_fewshot=2,
            limit=6,
            gen_kwargs="max_gen_toks=8",
            bootstrap_iters=0,
            task_manager=TaskManager(
                include_path=Path(lm_eval.__file__).parent / "tasks" / "gsm8k", include_defaults=False
            ),
        )
    for task in tasks.values():
        samples = read_samples(sample_folder(tmp_path, str(tiny_model), task))
        assert samples == plain(theirs["samples"][task])
        for metric, value in theirs["results"][task].items():
            assert "stderr" in metric or "," not in metric or scores[task, metric] == pytest.approx(value)
    assert len(samples) == 6


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_shots_without_effect_are_told(num_fewshot, sums, data_dir, caplog) -> None:
    names = f"ifeval,{CHAIN_SUM},nll:{sums},gsm8k"
    load_tasks(names, TaskSettings(data_dir=data_dir, num_fewshot=num_fewshot, limit=4))
    for name in names.split(","):
        told = f"{name} is asked with 0 worked examples: --num_fewshot 3 has no effect on it." in caplog.text
        assert told == (num_fewshot == 3 and name != "gsm8k")


def broken_models(tiny_model: Path, folder: Path) -> dict[str, Path]:
    """Copies of the tiny model, each without something, by the word that stands for them."""
    found = {word: folder / word.lower() for word in ("NO_WEIGHTS", "CUT", "NO_TOKENIZER", "NOT_CAUSAL")}
    for path in found.values():
        shutil.copytree(tiny_model, path)
    (found["NO_WEIGHTS"] / "model.safetensors").unlink()
    weights = found["CUT"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for path in found["NO_TOKENIZER"].glob("tokenizer*"):
        path.unlink()
    (found["NOT_CAUSAL"] / "config.json").write_text('{"model_type": "t5"}')
    return found


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
@pytest.mark.parametrize("rescore", [False, True])
def test_a_file_in_the_place_of_the_output_is_refused_at_the_start(
    place, rescore, tiny_model, tmp_path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("maskft.evaluation.runner.parse_models", pytest.fail)
    with pytest.raises(MaskftError, match=r"cannot be made: .*/file is a file; give another --output_dir"):
        run_eval(arguments(tmp_path / place, tiny_model, CHAIN_SUM, rescore=rescore))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "gsm8"}, r"no task 'gsm8' \(nearest: gsm8k.*; correct its name"),
        ({"tasks": "reasoning_gym:chain_som"}, r"no task 'chain_som' \(nearest: chain_sum"),
        ({"tasks": "humaneval", "data_dir": "."}, "--allow_code_execution"),
        ({"tasks": "gsm8k", "data_dir": "."}, r"gsm8k needs the file gsm8k/train\.jsonl, which is missing; docs"),
        ({"tasks": "nll:missing.jsonl"}, "no data file or folder missing.jsonl"),
        ({"tasks": "nll:"}, "`nll:` needs a data set"),
        ({"tasks": "alpaca_eval"}, r"write answers with examples/alpaca_eval\.py"),
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
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(
    changes, message, tiny_model, adapters, tmp_path, monkeypatch
) -> None:
    no_weights(monkeypatch)
    small = tmp_path / "small"
    if "SMALL" in changes.get("models", ""):
        config = AutoModelForCausalLM.from_pretrained(tiny_model).config
        config.num_hidden_layers = 1
        AutoModelForCausalLM.from_config(config).save_pretrained(small)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(small)
    values = {"models": str(tiny_model), "tasks": CHAIN_SUM} | changes
    words = broken_models(tiny_model, tmp_path) | {"MODEL": tiny_model, "MASK": adapters["mask"], "SMALL": small}
    for word, path in words.items():
        values["models"] = values["models"].replace(word, str(path))
    with pytest.raises(MaskftError, match=message):
        run_eval(arguments(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_of_the_same_shape_is_refused_by_its_fingerprint(tiny_model, adapters, tmp_path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_model).config).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    model = f"{other}+{adapters['mask']}"
    with pytest.raises(MaskftError, match="fingerprint"):
        run_eval(arguments(tmp_path / "out", model, CHAIN_SUM))
    assert run_eval(arguments(tmp_path / "forced", model, CHAIN_SUM, force=True))["scores"]


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
