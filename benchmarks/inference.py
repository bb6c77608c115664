"""Inference with an adapter that is not merged, against its base model; and the switch from one adapter to another.

    python benchmarks/inference.py --layers 4 5 6 7
    python benchmarks/inference.py --model 8b-shaped --layers 4 5 6 7

"prefill" is one forward over --seq_len tokens, "decode" one more token after them with a cache of keys and values, and
a switch is `set_adapter` and the masked weights of all layers made anew.
"""

import argparse
import time
from functools import partial
from typing import Any

import harness
import rivals
import torch
from harness import DEVICE, about, config_of, in_turn, rows_against, write_rows
from peft import get_peft_model

from maskft import MaskConfig, find_group
from maskft.masks import pack_mask
from maskft.tuner import MaskLayer
from maskft_lab.demo_model import fetch_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a model, 8b-shaped or tiny-shaped. Default: the demo's.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5, 6, 7])
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cpu_time", action="store_true", help="Time of one thread on its core: others may use the rest."
    )
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
        harness.now = time.thread_time
    folder = given.model or str(fetch_demo_model())
    model = _with_two_adapters(folder, given)
    layers = list(find_group(model, "first").layers.values())
    ids = torch.randint(rivals.vocabulary(folder), (1, given.seq_len), generator=torch.Generator().manual_seed(0))
    ids = ids.to(DEVICE)
    base = rivals.load(folder, getattr(torch, given.dtype), DEVICE).eval()
    caches = {}
    with torch.no_grad():
        for each in (base, model):
            caches[each] = each(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def prefill(each: Any) -> None:
        each(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def decode(each: Any) -> None:
        each(input_ids=ids[:, :1], past_key_values=caches[each], use_cache=True)
        caches[each].crop(-1)

    names = ["first", "second"]

    @torch.no_grad()
    def switch() -> None:
        names.reverse()
        model.set_adapter(names[0], inference_mode=True)
        for layer in layers:
            layer(layer.weight.new_empty(0, layer.in_features))  # of no rows: only the mask is applied

    rows = []
    for label, run in (("prefill", prefill), ("decode", decode)):
        runs = {f"{label}, base": partial(run, base), f"{label}, adapter": partial(run, model)}
        seconds = in_turn(runs, given.rounds, warm_up=2)
        rows += rows_against(seconds, f"{label}, base")
    rows += rows_against(in_turn({"switch": switch}, given.rounds, warm_up=2), "switch")
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(8 * mask.numel() for layer in layers for mask in dict(layer.maskft_mask.items()).values())
    cached = sum(m.values.nbytes for x in layers for m in x._masked_weights.values())
    memory = {"masked_weights": weights, "bits_a_weight_and_adapter": bits / weights / 2, "cached_mb": cached / 1e6}
    config = config_of(given, "inference", folder)
    for row in rows:
        row["ratio"] = row.pop(next(key for key in row if key.startswith("ratio_to")))
    write_rows([row | memory | about(**config) for row in rows], given.output_file)


def _with_two_adapters(folder: str, given: argparse.Namespace) -> Any:
    """The model with two random masks for inference."""
    model = rivals.load(folder, getattr(torch, given.dtype), DEVICE).eval()
    config = {"layers_to_transform": given.layers, "task_type": "CAUSAL_LM", "inference_mode": True}
    model = get_peft_model(model, MaskConfig(**config), adapter_name="first")
    model.add_adapter("second", MaskConfig(**config))
    torch.manual_seed(0)
    for layer in (module for module in model.modules() if isinstance(module, MaskLayer)):
        for name in ("first", "second"):
            layer.set_mask(name, pack_mask(torch.rand(layer.weight.shape, device=DEVICE) < rivals.DENSITY))
    return model


if __name__ == "__main__":
    main()
