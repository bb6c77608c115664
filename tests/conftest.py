"""What every test runs under: no model hub, one thread for small models, and Triton's interpreter without a GPU."""

import gc
import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import server  # noqa: F401  # before any test starts a process, which starts the server

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Leave what is imported out of what Accelerate and statsmodels collect each time: it takes them half a second."""
    gc.collect()
    gc.freeze()


def write_tiny_model(folder: Path) -> Path:
    """A random Llama of three layers with one token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sums of two digits as prompt and completion."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    draw = random.Random(0)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(60)]
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in pairs))
    return path


@pytest.fixture
def undrawn_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their curves, which take a fifth of a second a run, for tests that do not read them."""
    monkeypatch.setattr("maskft.report.html._draw", lambda curve: "<svg></svg>")
