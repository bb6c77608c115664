"""The examples do what their first lines say, on a tiny model."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from nbmake.nb_run import NotebookRun
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, cli
from maskft.adapters.merge import merge_checkpoint

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


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model that knows its general rows, as it has to for there to be something to forget, and a copy of it."""
    folder = tmp_path_factory.mktemp("models")
    rows = [
        {"prompt": f"The {c} {a} is", "completion": " here"} for c in ("red", "blue") for a in ("cat", "dog", "hen")
    ]
    general = folder / "general.jsonl"
    general.write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    told = {"model_name_or_path": tiny_model, "dataset_name": general, "output_dir": folder / "base"}
    told |= {"learning_rate": 1e-2, "max_steps": 30, "eval_strategy": "no", "load_best_model_at_end": False}
    assert cli.main(["sft", *(f"--{flag}={value}" for flag, value in told.items())]) == 0
    tuned = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "tuned")
    return {"MODEL": tiny_model, "BASE": folder / "base", "TUNED": folder / "tuned", "GENERAL": general}


@pytest.mark.parametrize(
    ("script", "names", "told"),
    [
        ("quickstart", ["MODEL"], r"Kept \d\d\.\d\d% of the masked weights\. Loss on new rows: .* with it\."),
        ("restore", ["BASE", "GENERAL"], r"\d+ % of what the general rows lost is given back at step \d+"),
        ("dpo", ["TUNED", "BASE"], r"0\.[1-9]\d\d% of the changes are taken back\."),
        ("grpo", ["TUNED", "BASE"], r"0\.[1-9]\d\d% of the changes are taken back\."),
        ("custom_loop", ["MODEL"], r"flips [1-9].*\nThe saved mask gives the same logits: True"),
    ],
)
def test_a_script_does_what_it_says(script, names, told, models, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    arguments = [str(models[name]) for name in names]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments, str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert re.search(told, capsys.readouterr().out)
    if script in ("quickstart", "restore"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    else:
        written = list((tmp_path / "out").rglob("adapter_model.safetensors"))
        assert written


def test_the_notebook_runs(tiny_model, tmp_path, monkeypatch) -> None:
    notebook = Path(shutil.copy(EXAMPLES / "first_mask.ipynb", tmp_path))
    shutil.copy(EXAMPLES / "sums.py", tmp_path)
    monkeypatch.setenv("MODEL", str(tiny_model))
    error = NotebookRun(notebook, default_timeout=120).execute().error
    assert error is None, error
    assert (tmp_path / "first_mask" / "merged" / "model.safetensors").exists()


def as_gguf(folder: Path, path: Path) -> None:
    """A Llama's folder as a GGUF file, with the names and the order of rows that llama.cpp has for them."""
    config, tensors = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    writer, names = gguf.GGUFWriter(path, "llama"), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in tensors.items():
        if num_heads := heads.get(key.split(".")[-2]):  # the two halves of a head, which turn together, alternate
            tensor = tensor.view(num_heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_merged_folder_is_served_as_gguf(tiny_model, tmp_path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), MaskConfig(density=0.5))
    model.save_pretrained(tmp_path / "mask")
    merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    as_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    served = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        served, masked, plain = (each(torch.arange(3, 30).view(1, -1)).logits for each in (served, model.eval(), plain))
    assert torch.equal(served, masked)
    assert not torch.equal(served, plain)
