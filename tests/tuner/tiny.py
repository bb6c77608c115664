"""Tiny random models, and what every test of the tuner asks of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

X = torch.arange(2, 20).view(2, 9)
SIZES = {"vocab_size": 64, "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def llama(seed: int = 0, num_layers: int = 3, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = SIZES | TOKENS | {"num_key_value_heads": 1, "num_hidden_layers": num_layers} | sizes
    return LlamaForCausalLM(LlamaConfig(**settings))


def step(model: Any, optimizer: Any = None, learning_rate: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=learning_rate, **options)
    model(input_ids=X, labels=X).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=X).logits
    return out


def plain_weights(model: Any) -> dict[str, bytes]:
    """The bytes of every weight and buffer of the base model, by its name there."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if "maskft_" not in name
    }
