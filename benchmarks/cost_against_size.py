"""What a training step costs against the masked share, the lowest masked layer, and the size of the model.

    python benchmarks/cost_against_size.py --output_file rows.jsonl --plot_file cost.png

Random Llamas. "operations" counts the matrix products of one forward and backward: all forward, the gradient of the
activations down to the lowest masked layer, and that of the masked weights. "kept MB" is what autograd keeps from the
forward for the backward, the masked weights aside.
"""

import argparse
import statistics
from typing import Any

import rivals
import torch
from harness import DEVICE, about, now, write_rows
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import find_group

_NUM_LAYERS = 16
_HIDDEN = 512
SWEEPS: dict[str, list[tuple[int, list[int]]]] = {
    "masked layers": [(_HIDDEN, list(range(8, 8 + n))) for n in (1, 2, 4, 8)],
    "lowest masked layer": [(_HIDDEN, list(range(first, first + 4))) for first in (0, 4, 8, 12)],
    "hidden size": [(size, [8, 9, 10, 11]) for size in (128, 256, 512, 1024)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    parser.add_argument("--plot_file", help="Picture to write.")
    given = parser.parse_args()
    rows = []
    for sweep, points in SWEEPS.items():
        for hidden, layers in points:
            value = {"masked layers": len(layers), "lowest masked layer": layers[0], "hidden size": hidden}[sweep]
            row = {"sweep": sweep, "value": value} | _measure(hidden, layers, given.seq_len, given.rounds)
            rows.append(row | about(benchmark="cost_against_size", seq_len=given.seq_len, layers=layers, hidden=hidden))
    write_rows(rows, given.output_file)
    if given.plot_file:
        _draw(rows, given.plot_file)


def _measure(hidden: int, layers: list[int], seq_len: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    model, trained = rivals.prepare("maskft", model, layers)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    group = find_group(model, "default")
    times: dict[str, list[float]] = {"forward": [], "backward": [], "choice": []}
    for i in range(rounds + 2):
        started = now()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = now()
        loss.backward()
        backward = now()
        optimizer.step()
        optimizer.zero_grad()
        stepped = now()
        group.refresh(anew=True)
        chosen = now()
        if i >= 2:
            times["forward"].append(forward - started)
            times["backward"].append(backward - forward)
            times["choice"].append(chosen - stepped)
    num_weights = sum(p.numel() for p in trained)
    per_layer = num_weights / len(layers)
    head = hidden * config.vocab_size
    total = per_layer * _NUM_LAYERS + head
    operations = 2 * seq_len * (total + per_layer * (_NUM_LAYERS - layers[0]) + head + num_weights)
    row: dict[str, Any] = {f"{name}_ms": round(1e3 * statistics.median(v), 2) for name, v in times.items()}
    row |= {"gflop": round(operations / 1e9, 2), "masked_share": round(num_weights / total, 3)}
    return row | {"num_masked": num_weights, "kept_mb": round(rivals.kept_for_backward(model, ids)[1] / 1e6, 1)}


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, sweep in zip(figure.subplots(1, 3), SWEEPS, strict=True):
        points = [row for row in rows if row["sweep"] == sweep]
        x = [row["value"] for row in points]
        for name, marker in (("forward_ms", "o"), ("backward_ms", "s"), ("choice_ms", "^")):
            axes.plot(x, [row[name] for row in points], marker=marker, label=name.replace("_", " "))
        axes.plot(x, [row["kept_mb"] for row in points], marker="x", linestyle="--", label="kept MB")
        axes.set_xlabel(sweep)
        axes.set_xticks(x)
        axes.set_ylim(bottom=0)
        if sweep == "hidden size":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylim(bottom=None)
            axes.set_xticks(x, [str(value) for value in x])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
