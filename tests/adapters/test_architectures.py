"""Kinds of models whose files and modules have different names or share tensors; all of them: fuzz/architectures.py."""

import re

import pytest
from architectures import check, differing, make
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maskft import MaskConfig
from maskft.adapters.merge import merge_checkpoint
from maskft.adapters.model_layout import read_layout

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers, for what is unusual about a kind
KINDS = ["gemma3", "gemma3n_text", "gemma4", "mllama", "mixtral", "gpt_neox", "qwen3_5", "bart"]
KINDS += ["bart (seq2seq)", "t5gemma (seq2seq)", "llava (images)", "qwen2_vl (images)"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_merged_and_saved_is_masked_by_the_bits_in_the_file(tmp_path, kind) -> None:
    assert check(kind, tmp_path) == dict.fromkeys(("load", "merge", "save", "file_merge"), "exact")


def test_a_kind_whose_weights_are_parts_of_tensors_is_refused(tmp_path) -> None:
    result = check("hrm_text", tmp_path)
    told = "`model.H_module.layers.0.mlp.gate_proj`: the adapter .* makes that weight of other tensors when"
    assert re.search(told, result.pop("file_merge"))
    assert set(result.values()) == {"exact"}
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("kind", "is_original", "left_out"),
    [("qwen3_5 (images)", True, ""), ("gemma3", False, ""), ("gpt2", True, "transformer.")],
)
def test_files_of_another_class_or_with_other_names(tmp_path, kind: str, is_original: bool, left_out: str) -> None:
    make(kind).save_pretrained(tmp_path / "base", save_original_format=is_original)
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix(left_out): w for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    read = AutoModelForCausalLM.from_pretrained  # of qwen3_5 the part that writes, whose modules are named as if alone
    get_peft_model(read(tmp_path / "base"), MaskConfig(density=0.7)).save_pretrained(tmp_path / "mask")
    merge_checkpoint(tmp_path / "mask", tmp_path / "merged")
    expected = PeftModel.from_pretrained(read(tmp_path / "base"), tmp_path / "mask").merge_and_unload()
    assert not differing(read(tmp_path / "merged").state_dict(), expected.state_dict())
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged")]
    assert files[0].keys() == files[1].keys()
    assert 0 < len(differing(*files)) < len(files[0])


def test_layers_are_found_with_and_without_the_prefix_and_stored_either_way(tmp_path) -> None:
    make("gpt2").save_pretrained(tmp_path)
    found = map(
        read_layout(tmp_path).find, ("transformer.h.0.attn.c_attn", "h.0.attn.c_proj", "lm_head", "h.9.attn.c_proj")
    )
    sizes = [layer and (layer.out_features, layer.in_features, layer.fan_in_fan_out) for layer in found]
    assert sizes == [(48, 16, True), (16, 16, True), (64, 16, False), None]
