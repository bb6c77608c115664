"""How often `--require_gain` lets a mask pass that helps nobody.

Random masks over a real model give real per-problem changes of the loss. Three questions, one row each:

- `as they are`: how many of these masks pass;
- `null`: their changes with the mean taken out, problems drawn anew: masks that change the loss as real ones do, and
  help nobody in the mean;
- `best of k`: the best of k such masks on one half of the problems, judged on the other half, as `--require_gain` does,
  and, for comparison, judged on the half that chose it.

    python benchmarks/guard_error_rate.py --model_name_or_path FFT --dataset_name validation.jsonl \
        --layers_to_transform 4 5 6 7 --density 0.999 --output_file error_rate.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import about
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig
from maskft.evaluation.nll import token_nll
from maskft.evaluation.statistics import wilson
from maskft.masks import pack_mask, random_mask
from maskft.training.data import data_hash, load_rows, tokenise_rows
from maskft.training.guard import LEVEL, gain_p_value
from maskft.tuner import find_group

Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--layers_to_transform", type=int, nargs="+")
    parser.add_argument("--density", type=float, default=0.999)
    parser.add_argument("--num_masks", type=int, default=40)
    parser.add_argument("--num_simulations", type=int, default=2000)
    parser.add_argument("--num_checkpoints", type=int, default=5)
    parser.add_argument("--output_file", required=True)
    given = parser.parse_args()

    base, masked, num_tokens, sha256 = score_random_masks(given)
    changes = masked - base
    n = len(base)
    draw = np.random.default_rng(0)

    def passes(change: Array) -> bool:
        return gain_p_value(change) <= LEVEL

    # Per token, so that a problem drawn twice weighs as it does in the estimate.
    centred = changes - changes.sum(1, keepdims=True) / num_tokens.sum() * num_tokens
    rows = [share("as they are", [passes(change) for change in changes])]
    null = []
    for _ in range(given.num_simulations):
        places = draw.integers(0, n, n)
        null.append(passes(centred[draw.integers(len(centred)), places]))
    rows.append(share("null", null))
    apart, together = [], []
    for _ in range(given.num_simulations):
        chosen = draw.choice(len(centred), given.num_checkpoints, replace=False)
        first, second = (draw.integers(0, n, n // 2) for _ in range(2))
        best = min(chosen, key=lambda i: centred[i, first].sum())
        apart.append(passes(centred[best, second]))
        together.append(passes(centred[best, first]))
    rows.append(share(f"best of {given.num_checkpoints}, judged on the other half", apart))
    rows.append(share(f"best of {given.num_checkpoints}, judged on the half that chose it", together))

    print(f"{'masks':45} passed       of   share")
    for row in rows:
        interval = f"{row['estimate']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        print(f"{row['masks']:45} {row['passed']:6} {row['of']:8}   {interval}")
    result = {
        "level": LEVEL,
        "n": n,
        "mean_change": float(changes.sum() / num_tokens.sum() / len(changes)),
        "data_sha256": sha256,
        "rows": rows,
    } | about(**{key: value for key, value in vars(given).items() if key != "output_file"})
    Path(given.output_file).write_text(json.dumps(result, indent=1) + "\n")


def score_random_masks(given: argparse.Namespace) -> tuple[Array, Array, Array, str]:
    """NLL sums of each problem without a mask (n,) and with each (num_masks, n); token counts; hash of the data."""
    model: Any = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype=torch.float32)
    rows = load_rows(given.dataset_name)
    tokenised = tokenise_rows(rows, AutoTokenizer.from_pretrained(given.model_name_or_path))
    plain = token_nll(model, tokenised)
    config = MaskConfig(
        layers_to_transform=given.layers_to_transform, density=given.density, task_type="CAUSAL_LM", inference_mode=True
    )
    model = get_peft_model(model, config)
    group = find_group(model, "default")
    sums = []
    for seed in range(given.num_masks):
        generator = torch.Generator().manual_seed(seed)
        for layer in group.layers.values():
            mask = random_mask((layer.out_features, layer.in_features), given.density, generator)
            layer.set_mask("default", pack_mask(mask))
        model.merge_adapter()
        sums.append(token_nll(model, tokenised).sums)
        model.unmerge_adapter()
    return plain.sums, np.stack(sums), plain.num_tokens, data_hash(rows)


def share(name: str, passed: list[bool]) -> dict[str, Any]:
    return {"masks": name, "passed": sum(passed), "of": len(passed)} | asdict(wilson(sum(passed), len(passed)))


if __name__ == "__main__":
    main()
