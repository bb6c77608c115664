"""A tiny model and an adapter of it, as folders side by side."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig

TOKENS = torch.arange(12).view(2, 6)


def make_model(kind: str = "llama", seed: int = 0, num_layers: int = 1):
    torch.manual_seed(seed)
    if kind == "gpt2":
        # attn.c_proj is square: its shape does not tell that it is stored transposed.
        return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=12, n_layer=num_layers, n_head=2))
    size = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": num_layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**size, **heads))


def load(base: Path):
    return AutoModelForCausalLM.from_pretrained(base)


def save_base_and_adapter(
    folder: Path, model, config: MaskConfig, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
):
    """`folder / "base"`, `folder / "adapter"`, and the model that the adapter was saved from."""
    model.to(dtype).save_pretrained(folder / "base", max_shard_size=max_shard_size)
    masked = get_peft_model(load(folder / "base"), config)
    masked.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", masked


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits
