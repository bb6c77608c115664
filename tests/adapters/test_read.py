import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig
from maskft.adapters.read import check_saved, read_adapter
from maskft.errors import MaskftError
from maskft.tuner import find_group

# PEFT asks Transformers in a way that Transformers has given another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def make_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter whose base model lies beside it."""
    make_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, MaskConfig(density=0.6)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file)


def test_reads_what_was_saved(folder: Path) -> None:
    adapter = read_adapter(folder)
    assert adapter.path == folder
    assert adapter.config.density == 0.6
    assert adapter.config.base_model_name_or_path == str(folder.parent / "base")
    assert not adapter.has_scores
    assert len(adapter.masks) == 7
    assert adapter.masks["model.layers.0.mlp.gate_proj"].shape == (20, 2)
    assert all(mask.dtype == torch.uint8 for mask in adapter.masks.values())


def test_reads_shapes_of_scores(tmp_path: Path) -> None:
    get_peft_model(make_llama(), MaskConfig(save_scores=True)).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.has_scores
    assert adapter.score_shapes["model.layers.0.mlp.gate_proj"] == (20, 12)
    assert set(adapter.score_shapes) == set(adapter.masks)


def test_a_saved_adapter_is_read_back(tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), MaskConfig(density=0.6, save_scores=True))
    model.save_pretrained(tmp_path)
    masks = find_group(model, "default").masks()
    check_saved(tmp_path, masks)

    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(MaskftError, match=rf"does not hold what is in memory \(1 of 7 masks, the first is `{name}`\)"):
        check_saved(tmp_path, masks | {name: masks[name] ^ 1})
    fewer = {other: mask for other, mask in masks.items() if other != name}
    with pytest.raises(MaskftError, match=rf"1 of 6 masks, the first is `{name}`"):
        check_saved(tmp_path, fewer)
    # As a checkpoint that has the rows of the first of two processes alone.
    scores = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{name}.maskft_scores"]
    scores[10:] = 0
    change_tensors(tmp_path, **{f"base_model.model.{name}.maskft_scores": scores})
    with pytest.raises(
        MaskftError, match=rf"1 of 7 masks, the first is `{name}`\): .* parts of split scores are missing"
    ):
        check_saved(tmp_path, masks)


def test_peft_loads_it_for_inference(folder: Path) -> None:
    model, other = (AutoModelForCausalLM.from_pretrained(folder.parent / "base") for _ in range(2))
    masked = get_peft_model(other, MaskConfig(density=0.6))
    loaded = PeftModel.from_pretrained(model, folder)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, masked.eval()(tokens).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_another_base_is_refused_unless_told(folder: Path) -> None:
    with pytest.raises(MaskftError, match="not the one this mask was learned on"):
        PeftModel.from_pretrained(make_llama(seed=1), folder)
    config = read_adapter(folder).config
    config.ignore_fingerprint = True
    PeftModel.from_pretrained(make_llama(seed=1), folder, config=config)
    assert read_adapter(folder).config.ignore_fingerprint is False


def test_missing_folder_and_files(folder: Path) -> None:
    with pytest.raises(MaskftError, match="absent is not a folder here"):
        read_adapter(folder / "absent")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MaskftError, match=r"has no adapter_model\.safetensors; save or download"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(MaskftError, match=r"has no adapter_config\.json, so it is not an adapter"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "masks.pt"])
def test_pickle_is_refused_unread(folder: Path, name: str) -> None:
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(MaskftError, match=f"but {name}, a pickle, which can run code"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "must hold a JSON object, but it holds a list")],
)
def test_config_that_is_no_config(folder: Path, text: str, message: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(MaskftError, match=message):
        read_adapter(folder)


def test_unknown_setting_and_bad_value(folder: Path) -> None:
    change_config(folder, density=2)
    with pytest.raises(MaskftError, match=r"`density` must be in \(0, 1\], got 2"):
        read_adapter(folder)
    change_config(folder, densty=0.5)
    with pytest.raises(MaskftError, match="Unknown mask setting 'densty'"):
        read_adapter(folder)


def test_other_method_is_named(tmp_path: Path) -> None:
    get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(MaskftError, match="peft_type 'LORA', not 'MASKFT'"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_cut_file(folder: Path, num_bytes: int) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(MaskftError, match="is damaged or cut short"):
        read_adapter(folder)


def test_one_flipped_bit_is_found(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MaskftError, match="is damaged: its masks have the digest"):
        read_adapter(folder)


def test_tensors_that_are_no_masks(folder: Path) -> None:
    change_tensors(folder, **{"base_model.model.x.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(MaskftError, match=r"'base_model\.model\.x\.lora_A\.weight', which is neither a mask"):
        read_adapter(folder)


@pytest.mark.parametrize("tensor", [torch.zeros(20, 2), torch.zeros(40, dtype=torch.uint8)])
def test_mask_of_wrong_kind(folder: Path, tensor: torch.Tensor) -> None:
    change_tensors(folder, **{"base_model.model.model.layers.0.mlp.gate_proj.maskft_mask": tensor})
    with pytest.raises(MaskftError, match="must be uint8 with 2 dimensions"):
        read_adapter(folder)
