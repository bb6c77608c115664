"""The rivals of a training step: the same model, layers, batch and dtype, trained in different ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from maskft import MaskConfig
from maskft.masks import num_kept
from maskft.tuner import MaskLayer, check_targets

# Layers of Llama's kind with random weights. The small vocabulary of 8b-shaped leaves the layers to be seen.
_LAYERS_OF_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "8b": {"vocab_size": 128256, "num_hidden_layers": 32, "tie_word_embeddings": False} | _LAYERS_OF_8B,
    "8b-shaped": {"vocab_size": 8192, "num_hidden_layers": 8} | _LAYERS_OF_8B,
    "tiny-shaped": {"vocab_size": 512, "num_hidden_layers": 8} | _TINY,
}
NAMES = ("partial", "maskft", "published", "lora", "full")
DENSITY = 0.9
_LR = 1e-4


class _Subnet(torch.autograd.Function):
    """The published algorithm's mask: all scores sorted in each forward, a dense mask of the scores' dtype."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor, density: float) -> Tensor:
        order = sizes.flatten().sort().indices
        mask = torch.ones_like(sizes)
        mask.view(-1)[order[: sizes.numel() - num_kept(sizes.numel(), density)]] = 0
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return grads[0], None


class PublishedLinear(nn.Module):
    """A masked linear layer as published (arXiv 2503.22764, section 3): nothing is cached between forwards."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.scores = nn.Parameter(torch.randn_like(self.weight) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = _Subnet.apply(self.scores.abs(), DENSITY)
        return F.linear(x, self.weight * mask, self.bias)


def load(model: str, dtype: torch.dtype, device: str) -> Any:
    """A folder's model, or one of `SHAPES` with random weights."""
    torch.manual_seed(0)
    if model not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[model]), dtype=dtype)


def vocabulary(model: str) -> int:
    """Size of the model's vocabulary."""
    return int(SHAPES[model]["vocab_size"] if model in SHAPES else AutoConfig.from_pretrained(Path(model)).vocab_size)


def prepare(name: str, model: Any, layers: list[int]) -> tuple[Any, list[nn.Parameter]]:
    """The model as a rival trains it, and what it trains."""
    # Ranked by magnitude, since billions of random scores take a minute to draw.
    config = MaskConfig(layers_to_transform=layers, density=DENSITY, init_scores="magnitude", task_type="CAUSAL_LM")
    targets = check_targets(config, model)
    model.requires_grad_(name == "full")
    if name == "maskft":
        model = get_peft_model(model, config)
    elif name == "partial":
        for target in targets:
            model.get_submodule(target).weight.requires_grad_()
    elif name == "published":
        for target in targets:
            parent, _, child = target.rpartition(".")
            setattr(model.get_submodule(parent), child, PublishedLinear(model.get_submodule(target)))
    elif name == "lora":
        lora = LoraConfig(
            r=64, lora_alpha=64, target_modules=config.target_modules, layers_to_transform=layers, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def kept_for_backward(model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """The loss of token ids, and the bytes that autograd keeps for its backward beside weights, masks and scores."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    known = list(model.parameters())
    for layer in (module for module in model.modules() if isinstance(module, MaskLayer)):
        known += [m.values for m in layer._masked_weights.values()] + list(dict(layer.maskft_mask.items()).values())
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    return loss, sum(size for address, size in kept.items() if address not in not_counted)


def training_step(model: Any, trained: list[nn.Parameter], batches: list[Tensor]) -> Callable[[], None]:
    """One optimizer step over micro-batches of token ids, as a trainer does it."""
    optimizer = torch.optim.AdamW(trained, lr=_LR, weight_decay=0.0, fused=True)

    def step() -> None:
        for ids in batches:
            (model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
