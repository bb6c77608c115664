"""Bytes that training a mask takes beyond the frozen model, for each masked weight, by optimizer.

    python benchmarks/memory.py
    python benchmarks/memory.py --model 8b --seq_len 2048 --activation_checkpointing --optimizers adafactor

Each optimizer is stepped as usual, and as under --low_memory: in the backward, with no masked weight kept. On a CPU the
tensors are counted: scores, gradients and optimizer state after a step, masks and masked weights, and what autograd
keeps from the forward for the backward (activations, of masked layers in the middle or the top of the model). On a GPU
the peak of the allocator over two steps is given as well. The loss is Transformers' own, which keeps full logits; that
of TRL, for `maskft train`, takes them in chunks.
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any

import rivals
import torch
from harness import DEVICE, about, config_of, write_rows
from torch.optim import Optimizer

from maskft import find_group, step_in_backward
from maskft.tuner import MaskLayer
from maskft_lab.demo_model import fetch_demo_model


def _adamw8bit(parameters: Any) -> Optimizer:
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(parameters, lr=1e-4)
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "adamw_torch_8bit": _adamw8bit,
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a model, 8b, 8b-shaped or tiny-shaped. Default: the demo's.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--modes", nargs="+", choices=("usual", "low_memory"), default=["usual", "low_memory"])
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    folder = given.model or str(fetch_demo_model())
    shape = (1, given.seq_len)
    ids = torch.randint(rivals.vocabulary(folder), shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = []
    for name in given.optimizers:
        for mode in given.modes:
            config = config_of(given, "memory", folder, "optimizers")
            row = {"name": name, "mode": mode}
            rows.append(row | _measure(folder, given, ids, OPTIMIZERS[name], mode == "low_memory") | about(**config))
    write_rows(rows, given.output_file)


def _measure(
    folder: str, given: argparse.Namespace, ids: torch.Tensor, make: Callable[[Any], Optimizer], low_memory: bool
) -> dict[str, Any]:
    gc.collect()  # what was measured before
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, trained = rivals.prepare("maskft", rivals.load(folder, torch.bfloat16, DEVICE), given.layers)
    if given.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make(trained)
    if low_memory:
        find_group(model, "default").keeps_masked_weights = False
        step_in_backward(optimizer)
    loss, activations = rivals.kept_for_backward(model, ids)
    loss.backward()
    gradients = _num_bytes(p.grad for p in trained if p.grad is not None)
    optimizer.step()
    states = _num_bytes(v for state in optimizer.state.values() for v in state.values())
    masked = [module for module in model.modules() if isinstance(module, MaskLayer)]
    masks = _num_bytes(m for module in masked for m in dict(module.maskft_mask.items()).values())
    cached = _num_bytes(m.values for module in masked for m in module._masked_weights.values())
    num_weights = sum(p.numel() for p in trained)
    parts = {"scores": _num_bytes(trained), "gradients": gradients, "optimizer": states, "masks": masks}
    parts["masked_weights"] = cached
    row: dict[str, Any] = {part: round(size / num_weights, 3) for part, size in parts.items()}
    row["bytes_a_weight"] = round(sum(parts.values()) / num_weights, 3)
    row["activations_mb"] = round(activations / 1e6, 1)
    if DEVICE == "cuda":
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def _num_bytes(tensors: Any) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            # A quantized state is a tensor made of others.
            inner = getattr(tensor, "__tensor_flatten__", None)
            parts = [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


if __name__ == "__main__":
    main()
