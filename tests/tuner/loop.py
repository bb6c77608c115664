"""A tiny model with a mask or LoRA, and a loop over the same rows in any number of processes."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig

NUM_STEPS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"density": 0.8},
    "global_topk": {"selection": "global_topk", "density": 0.8},
    "threshold": {"selection": "threshold", "init_scores": "keep_all", "init_std": 5e-3},
}


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=30,  # 10 and 15 rows a process; 10 rows of k and v: 4, 4 and 2 of three processes
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(dtype)
    if kind == "lora":
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2], **SETTINGS[kind]))


def batches(rank: int, num_processes: int, num_steps: int = NUM_STEPS) -> list[torch.Tensor]:
    """The token ids of each step that are one process's: of 6 rows in all."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(61, (6, 9), generator=generator).chunk(num_processes)[rank] for _ in range(num_steps)]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    # Transformers' own loss is taken in float32.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def mean(loss: torch.Tensor, num_processes: int) -> float:
    """The mean over processes."""
    total = loss.clone()
    if num_processes > 1:
        distributed.all_reduce(total)
    return float(total) / num_processes


def train(model: Any, rank: int, num_processes: int, num_steps: int = NUM_STEPS) -> list[float]:
    """Steps over rows divided over processes; the mean loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    losses = []
    for ids in batches(rank, num_processes, num_steps):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach(), num_processes))
    return losses


def check_file(folder: Path, masks: dict[str, torch.Tensor], group: Any, **tolerances: float) -> None:
    """The masks and scores of every process's part are in an adapter's file."""
    file = load_file(folder / "adapter_model.safetensors")
    assert len(file) == 2 * len(masks)
    for name, mask in masks.items():
        assert torch.equal(file[f"base_model.model.{name}.maskft_mask"], mask)
        scores = group.layers[name].maskft_scores["default"].detach()
        torch.testing.assert_close(file[f"base_model.model.{name}.maskft_scores"], scores, **tolerances)
