"""The examples do what their first lines say, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, cli

EXAMPLES = Path(__file__).parent.parent / "examples"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"


def test_answers_are_written_as_alpaca_eval_reads_them(tiny_model, tmp_path, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, MaskConfig(density=0.5, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "mask")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"instruction": "ab", "output": "c", "dataset": "d"}, {"instruction": "def"}]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    names = {"model": "model", "adapter": "mask", "instructions": "asked.json", "output_file": "answers.json"}
    flags = [part for flag, name in names.items() for part in (f"--{flag}", str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["alpaca_eval.py", *flags, "--max_new_tokens", "4"])
    runpy.run_path(str(EXAMPLES / "alpaca_eval.py"), run_name="__main__")
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [set(row) for row in answers] == [{"instruction", "output", "generator"}] * 2
    assert [(row["instruction"], row["generator"]) for row in answers] == [("ab", "mask"), ("def", "mask")]
    assert any(row["output"] for row in answers)


def test_a_task_of_ones_own_over_a_local_file_is_scored(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    flags = {"models": tiny_model, "tasks": "examples/capitals.yaml", "output_dir": tmp_path}
    assert cli.main(["eval", *(part for flag, value in flags.items() for part in (f"--{flag}", str(value)))]) == 0
    (score,) = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert (score["task"], score["metric"], score["n"]) == ("capitals", "acc,none", 8)
