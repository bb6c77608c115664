"""Models that cannot be started from, each refused in one sentence before anything is loaded."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, OPTConfig

from maskft import MaskConfig
from maskft.adapters import model_files
from maskft.adapters.model_files import Limits, check_weights, load_model, model_limits, read_tokenizer, weights_hash
from maskft.errors import MaskftError
from maskft.training.prepare import check_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def lose_a_part(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.index.json").write_text("[]")


def add_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


NOT_CAUSAL = "a model of the type 'vit', which Transformers cannot read as a causal language model"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lose_tokenizer, "No tokenizer can be read from"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
        (lambda folder: os.truncate(folder / WEIGHTS, 20_000), "model.safetensors is damaged or was cut short"),
        (lose_a_part, "lacks model-2.safetensors"),
        (break_the_index, "index.json"),
        (add_an_adapter, "holds an adapter .* beside a model's weights"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), NOT_CAUSAL),
    ],
)
def test_a_model_that_is_not_whole_is_refused(harm, told, folder) -> None:
    assert check_model(str(folder), None) > 0
    harm(folder)
    with pytest.raises(MaskftError, match=told):
        check_model(str(folder), None)


def test_weights_of_other_shapes_are_refused(folder) -> None:
    change_config(folder, hidden_size=64)
    with pytest.raises(MaskftError, match=r"have other shapes than its config.json says"):
        load_model(str(folder), "float32")


HEAD, UP, EMBEDDINGS = "lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "is_tied", "told"),
    [
        (lambda held: held | {"model.extra.weight": held[EMBEDDINGS].clone()}, True, None),
        (lambda held: held | {HEAD: held[EMBEDDINGS].clone()}, True, None),
        (lambda held: {k: v for k, v in held.items() if k != HEAD}, True, None),
        (lambda held: {k: v for k, v in held.items() if k != HEAD}, False, f"lack {HEAD}, which"),
        (lambda held: {k: v for k, v in held.items() if k != UP}, True, f"lack {UP}, which would be filled at random"),
        (lambda held: {f"other.{k}": v for k, v in held.items()}, True, r"lack .* and \d\d more"),
    ],
)
def test_weights_that_are_missing_are_named(folder, change, is_tied, told) -> None:
    change_config(folder, tie_word_embeddings=is_tied)
    held = change({HEAD: None} | load_file(folder / WEIGHTS))
    save_file({k: v for k, v in held.items() if v is not None}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MaskftError, match=told) if told else nullcontext():
        load_model(str(folder), "float32")


def test_a_folder_is_hashed_once_while_it_stays(tiny_model, folder, monkeypatch) -> None:
    model_files._hash_files.cache_clear()  # of the other folder too, which other tests read
    before = weights_hash(str(folder))
    opened, read = [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *args, **named: opened.append(path.name) or read(path, *args, **named)
    )
    assert weights_hash(str(folder)) == before == weights_hash(str(tiny_model))
    assert opened == ["model.safetensors"], "that of the other folder"
    change_config(folder, hidden_size=64)
    assert weights_hash(str(folder)) == before != weights_hash(str(folder), "config.json")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_hash(str(folder)) != before
    assert check_weights("owner/name") == [], "those of a hub model are not looked for"


SMALL = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 50}
OPT = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 1, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=32, **SMALL), Limits(50, 32)),
        (OPTConfig(vocab_size=50, max_position_embeddings=32, **OPT), Limits(50, 32)),
        (LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_attention_heads=1), Limits(50, None)),
    ],
)
def test_the_limits_of_a_model_are_those_of_its_embeddings(config, expected, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    assert model_limits(str(tmp_path)) == expected


def test_another_chat_template_and_end_token_are_taken(folder, tmp_path) -> None:
    tokenizer = read_tokenizer(str(folder))
    (tmp_path / "chat.jinja").write_text("ü{{ messages[0].content }}", encoding="utf-8")
    given = read_tokenizer(str(folder), chat_template_path=str(tmp_path / "chat.jinja"), eos_token="<unk>")
    assert (given.chat_template, given.eos_token) == ("ü{{ messages[0].content }}", "<unk>")
    (tmp_path / "chat.jinja").write_bytes(b"\xff")
    with pytest.raises(MaskftError, match=r"chat\.jinja' cannot be read .*; save it as text in UTF-8"):
        read_tokenizer(str(folder), chat_template_path=str(tmp_path / "chat.jinja"))
    tokenizer.add_special_tokens({"eos_token": "a", "additional_special_tokens": ["<|turn|>"]})
    for template, told in (
        (None, "has no chat template"),
        ("<|turn|>{{ messages }}", r"writes the token '<\|turn\|>'"),
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(MaskftError, match=told):
            read_tokenizer(str(folder), chat_template_path=str(tmp_path / "other"))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "other")
    given = read_tokenizer(str(folder), chat_template_path=str(tmp_path / "other"))
    assert (given.chat_template, given.eos_token) == ("{{ messages }}", "a")
    with pytest.raises(MaskftError, match="`eos_token` '<no>' is no token of"):
        read_tokenizer(str(folder), eos_token="<no>")


def test_weights_in_a_pickle_are_told_of_before_a_mask_is_learned(folder, caplog) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    check_model(str(folder), None)
    assert caplog.text == ""
    check_model(str(folder), MaskConfig(task_type="CAUSAL_LM"))
    assert "pytorch_model.bin has its weights in a pickle, which maskft merge refuses" in caplog.text


def test_a_folder_with_the_ending_of_weights_is_none_of_them(tmp_path, tiny_model) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    before = weights_hash(str(folder))
    (folder / "x.bin").mkdir()
    (folder / "pytorch_model.bin").mkdir()
    assert weights_hash(str(folder)) == before
    assert [file.name for file in check_weights(str(folder))] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(MaskftError, match="holds no weights"):
        check_weights(str(folder))
