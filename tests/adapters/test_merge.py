import json
import os
import re
from html import escape

import pytest
import torch
from architectures import by_hand, differing
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapters import load, logits, make_model, save_base_and_adapter
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from maskft import MaskConfig
from maskft.adapters import merge
from maskft.adapters.merge import merge_checkpoint
from maskft.adapters.read import read_adapter
from maskft.errors import MaskftError
from maskft.terminal import printable


def save_both(folder, kind="llama", dtype=torch.float32, max_shard_size="5GB"):
    model = make_model(kind, num_layers=2)
    return save_base_and_adapter(folder, model, MaskConfig(density=0.7), dtype, max_shard_size)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_folder_equals_adapter(tmp_path, kind, max_shard_size, dtype) -> None:
    base, adapter = save_both(tmp_path, kind, dtype, max_shard_size)
    merge_checkpoint(adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    with_adapter = PeftModel.from_pretrained(load(base), adapter)
    expected = logits(with_adapter)
    assert merged.dtype == dtype
    assert torch.equal(logits(merged), expected)
    assert not torch.equal(logits(load(base)), expected)
    unloaded = with_adapter.merge_and_unload()
    assert torch.equal(logits(unloaded), expected)
    assert not differing(merged.state_dict(), unloaded.state_dict())
    files = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == sorted([*files, "README.md"])
    weights = [name for name in files if name.endswith(".safetensors")]
    assert (len(weights) > 1) == (max_shard_size == "3KB")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| masked tensors | {14 if kind == 'llama' else 8} |" in card
    assert re.search(r"\| kept share of their weights \| (69\.[5-9]|70\.[0-4])\d*% \([\d,]+ of [\d,]+\) \|", card)


def test_files_beside_the_weights(tmp_path) -> None:
    base, adapter = save_both(tmp_path)
    copied = {"tokenizer.json": "{}", "chat_template.jinja": "x", "additional_chat_templates/rag.jinja": "y"}
    left_out = ["pytorch_model.bin", "optimizer.pt", "consolidated.safetensors", "model.gguf", ".cache/lock"]
    left_out += ["checkpoint-3/config.json", "pytorch_model.bin.index.json", "trainer_state.json"]
    left_out += ["report.json", "report.html"]
    for name in [*copied, *left_out, "README.md"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(copied.get(name, "not copied"))
    merge_checkpoint(adapter, tmp_path / "merged")
    for name, text in copied.items():
        assert (tmp_path / "merged" / name).read_text() == text
    for name in left_out:
        assert not (tmp_path / "merged" / name).exists(), name
    card = (tmp_path / "merged" / "README.md").read_text()
    fingerprint = json.loads((adapter / "adapter_config.json").read_text())["base_fingerprint"]
    assert fingerprint in card
    assert "| selection | `topk`, density 0.7 |" in card
    assert "| weights left out | are 0 |" in card
    assert "not copied" not in card
    data = ModelCard(card).data
    assert (data.base_model, data.pipeline_tag, data.library_name) == (None, "text-generation", "transformers")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_the_card_says_where_left_out_weights_went(tmp_path) -> None:
    for name, seed in (("base", 0), ("reference", 1)):
        make_model("llama", seed, num_layers=2).save_pretrained(tmp_path / name)
    config = MaskConfig.preset("recommended", reference_model_name_or_path=str(tmp_path / "reference"))
    model = get_peft_model(load(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    moved = (tmp_path / "reference").rename(tmp_path / "moved")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", reference_model_name_or_path=moved)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| selection | `threshold` |" in card
    assert "density" not in card
    assert f"| weights left out | have their values in `{moved}` |" in card


def test_mask_learned_in_bfloat16_fits_a_float32_file(tmp_path) -> None:
    base, adapter = save_both(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    get_peft_model(model, MaskConfig()).save_pretrained(adapter)
    merge_checkpoint(adapter, tmp_path / "merged")
    original, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    assert all(torch.equal(t, original[n]) or bool(((t == original[n]) | (t == 0)).all()) for n, t in merged.items())


def test_other_base_is_refused_unless_forced(tmp_path) -> None:
    _, adapter = save_both(tmp_path)
    other = tmp_path / "other"
    make_model("llama", seed=1, num_layers=2).save_pretrained(other)
    expected = json.loads((adapter / "adapter_config.json").read_text())["base_fingerprint"]
    before = sorted(tmp_path.rglob("*"))
    found = r"fingerprint float32:xxh3_128:[0-9a-f]{32}"
    with pytest.raises(MaskftError, match=rf"{found}, the adapter expects {expected}"):
        merge_checkpoint(adapter, tmp_path / "merged", model_name_or_path=other)
    assert sorted(tmp_path.rglob("*")) == before
    merge_checkpoint(adapter, tmp_path / "merged", model_name_or_path=other, force=True)
    config = read_adapter(adapter).config
    config.ignore_fingerprint = True
    forced = PeftModel.from_pretrained(load(other), adapter, config=config)
    assert torch.equal(logits(load(tmp_path / "merged")), logits(forced))


def quantize(base) -> None:
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(config))


def rename(old: str, new: str):
    return lambda base: (base / old).rename(base / new)


@pytest.mark.parametrize(
    ("harm", "given", "message"),
    [
        (rename("model.safetensors", "pytorch_model.bin"), {}, r"pytorch_model\.bin, a pickle, which can run code"),
        (quantize, {}, "base is quantized; give the folder of the unquantized model"),
        (
            None,
            {"model_name_or_path": "gpt2", "force": True},
            r"no weight of its own for the mask of `model\.layers\.0",
        ),
        (None, {"model_name_or_path": "someone/model"}, "'someone/model' is not a folder here; download it"),
        (None, {"output_dir": "base"}, "for the merged model is not empty"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, monkeypatch, harm, given, message) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter = save_both(tmp_path)
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    if harm is not None:
        harm(base)
    with pytest.raises(MaskftError, match=message):
        merge_checkpoint(adapter, **{"output_dir": "merged"} | given)
    assert not (tmp_path / "merged").exists()


def test_missing_and_cut_shards_are_refused(tmp_path) -> None:
    base, adapter = save_both(tmp_path, "llama", max_shard_size="3KB")
    shard = min(base.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(MaskftError, match=f"{shard.name} is damaged or was cut short"):
        merge_checkpoint(adapter, tmp_path / "merged")
    shard.unlink()
    with pytest.raises(MaskftError, match=f"lacks {shard.name}, a part of its weights"):
        merge_checkpoint(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_whatever_has_no_mask_stays_byte_for_byte(tmp_path) -> None:
    base, adapter = save_both(tmp_path, "llama", torch.bfloat16)
    merge_checkpoint(adapter, tmp_path / "merged")
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (base, tmp_path / "merged"))
    header = 8 + int.from_bytes(before[:8], "little")
    assert len(before) == len(after)
    assert before[:header] == after[:header]
    assert not differing(load_file(tmp_path / "merged" / "model.safetensors"), by_hand(load(base), adapter))


@pytest.mark.parametrize("has_reference", [False, True])
def test_tensors_of_several_chunks(tmp_path, monkeypatch, has_reference) -> None:
    reference = tmp_path / "reference"
    make_model("llama", seed=1, num_layers=2).bfloat16().save_pretrained(reference)
    settings = {"reference": "pretrained", "reference_model_name_or_path": str(reference)} if has_reference else {}
    config = MaskConfig(density=0.7, **settings)
    _, adapter, model = save_base_and_adapter(tmp_path, make_model("llama", num_layers=2), config)
    merge_checkpoint(adapter, tmp_path / "whole")
    monkeypatch.setattr(merge, "_CHUNK_BYTES", 150)  # three rows of twelve float32
    merge_checkpoint(adapter, tmp_path / "chunks")
    whole, chunks = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "chunks"))
    assert whole == chunks
    assert torch.equal(logits(load(tmp_path / "chunks")), logits(model))


def test_a_base_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch) -> None:
    base, adapter = save_both(tmp_path)
    file, read = base / "model.safetensors", merge.read_rows
    monkeypatch.setattr(merge, "read_rows", lambda *args: os.truncate(file, 2000) or read(*args))
    with pytest.raises(MaskftError, match=r"model.safetensors is damaged or was cut short"):
        merge_checkpoint(adapter, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("base", "adapter")]


def test_the_chat_template_and_end_token_of_the_adapter_are_taken(tmp_path) -> None:
    base, adapter = save_both(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "<stop>": 1, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(adapter)
    merge_checkpoint(adapter, tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages }}", "<stop>"
    tokenizer.save_pretrained(adapter)
    merge_checkpoint(adapter, tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.chat_template, merged.eos_token) == ("{{ messages }}", "<stop>")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [1, 2]


@pytest.mark.parametrize(
    "name",
    ["a`b", "a|b", "x\n---\nlicense: mit\n---\n# Injected", "a: b", "<script>", "\u202ea\x1b[2J", "``|`", "[a](b)"],
)
def test_an_adapters_base_name_stays_a_name_in_the_card(tmp_path, name) -> None:
    base, folder, _ = save_base_and_adapter(tmp_path, make_model(), MaskConfig())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    merge_checkpoint(folder, tmp_path / "merged", model_name_or_path=base)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    # One cell with the whole name, as code, whatever ticks, bars and lines it has.
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    shown = " ".join(printable(name).split())
    assert f"<td>base model</td>\n<td><code>{escape(shown, quote=False)}</code></td>" in html
    assert html.count("<h1>") == 1
