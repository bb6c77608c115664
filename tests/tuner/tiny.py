"""Tiny random models, and what every test of the tuner asks of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig, MaskftError, find_group
from maskft.masks import select
from maskft.tuner import MaskLayer

X = torch.arange(2, 20).view(2, 9)
SIZES = {"vocab_size": 64, "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def llama(seed: int = 0, num_layers: int = 3, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = SIZES | TOKENS | {"num_key_value_heads": 1, "num_hidden_layers": num_layers} | sizes
    return LlamaForCausalLM(LlamaConfig(**settings))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its weights are stored transposed."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def masked(**settings: Any) -> PeftModel:
    """Masks on two layers of three."""
    return get_peft_model(llama(), MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2], **settings))


def load(folder: Path, base: Any = None, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(llama() if base is None else base, folder, **options)


def layers_of(model: Any, adapter_name: str = "default") -> dict[str, MaskLayer]:
    return find_group(model, adapter_name).layers


def chosen(layer: MaskLayer, adapter_name: str = "default", density: float = 0.9) -> Tensor:
    """The mask that `select` makes of a layer's scores."""
    (mask,) = select([layer.maskft_scores[adapter_name].detach()], selection="topk", density=density)
    return mask


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
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.flatten()
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for name, tensor in model.state_dict().items()
        if "maskft_" not in name
    }


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, and under each the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(sentence: str) -> Any:
    """An error of ours whose sentence has this, a regular expression."""
    return pytest.raises(MaskftError, match=sentence)


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change what a file of tensors holds."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


class Quantized(torch.Tensor):
    """As torchao's: it says it is of float32, and what it holds is something else."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None

    @staticmethod
    def __tensor_unflatten__(*_: object) -> torch.Tensor:
        raise NotImplementedError
