"""How far the first steps of DPO take a policy from its start: masks of weights, of changes, and with a cap on flips.

    python benchmarks/preference_steps.py --output_file preferences.jsonl

A small model is fine-tuned on sums for 8 steps, and prefers the right of two answers for 3 more. KL is that of the
answers' tokens of 32 other sums, in nats; flips are a share of the masked weights.
"""

import argparse
import random
import tempfile
from typing import Any

import torch
from harness import about, write_rows
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, find_group
from maskft_lab.demo_model import fetch_demo_model

BATCH, BETA = 8, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", help="JSON lines to append to.")
    given = parser.parse_args()
    base = str(fetch_demo_model())
    drawn, tokenizer = random.Random(given.seed), AutoTokenizer.from_pretrained(base)
    pairs = [(drawn.randint(10, 999), drawn.randint(10, 999)) for _ in range(96)]
    rows = [(f"What is {a}+{b}?", f" {a + b}", f" {a + b + drawn.choice([-1, 1, 10])}") for a, b in pairs]
    tuned = _fine_tuned(base, [_tokens(tokenizer, rows[i : i + BATCH], 1) for i in range(0, 64, BATCH)])
    steps = [[_tokens(tokenizer, rows[i : i + BATCH], answer) for answer in (1, 2)] for i in range(0, 3 * BATCH, BATCH)]
    free = {"selection": "threshold", "init_scores": "uniform"}
    masks = {
        "of weights": MaskConfig(**free),
        "of the change": MaskConfig(**free, reference="pretrained", reference_model_name_or_path=base),
        "preferences": MaskConfig.preset("preferences", reference_model_name_or_path=base),
    }
    kinds = [(name, mask, rate) for name, mask in masks.items() for rate in given.learning_rates]
    held_out = _tokens(tokenizer, rows[64:], 1)
    results = [{"mask": n, "learning_rate": r} | _learn(tuned, mask, r, steps, held_out) for n, mask, r in kinds]
    config = {"benchmark": "preference_steps", "seed": given.seed, "model": "SmolLM2-135M-Instruct"}
    write_rows([row | about(**config) for row in results], given.output_file)


def _tokens(tokenizer: Any, rows: list[tuple[str, str, str]], answer: int) -> tuple[Any, Tensor]:
    """The inputs of some rows with one of their answers, and which tokens are predicted answers: (rows, tokens - 1)."""
    inputs = tokenizer([r[0] + r[answer] + tokenizer.eos_token for r in rows], return_tensors="pt", padding=True)
    is_answer = inputs.attention_mask.clone()
    for i, row in enumerate(rows):
        is_answer[i, : len(tokenizer(row[0]).input_ids)] = 0
    return inputs, is_answer[:, 1:].bool()


def _log_probs(model: Any, inputs: Any, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's answer: (rows,); and of every token at each place of an answer: (places, vocabulary)."""
    logs = model(**inputs).logits[:, :-1].log_softmax(-1)
    of_tokens = logs.gather(2, inputs.input_ids[:, 1:].unsqueeze(2)).squeeze(2)
    return (of_tokens * is_answer).sum(1), logs[is_answer]


def _fine_tuned(base: str, batches: list[Any]) -> str:
    model, folder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tempfile.mkdtemp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for batch in batches:
        _log_probs(model, *batch)[0].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def _learn(tuned: str, mask: MaskConfig, rate: float, steps: list[Any], held_out: Any) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32), mask)
    group, scores = find_group(model, "default"), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(scores, lr=rate, weight_decay=0)
    with torch.no_grad():
        start = _log_probs(model, *held_out)[1]
    result: dict[str, list[float]] = {"kl": [], "flips": []}
    for pair in steps:
        with torch.no_grad(), model.disable_adapter():
            before = [_log_probs(model, *batch)[0] for batch in pair]
        chosen, rejected = (_log_probs(model, *batch)[0] - old for batch, old in zip(pair, before, strict=True))
        F.logsigmoid(BETA * (chosen - rejected)).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            now = _log_probs(model, *held_out)[1]
        result["kl"].append(round(float((start.exp() * (start - now)).sum(-1).mean()), 6))
        result["flips"].append(round(group.take_flips() / group.num_weights(), 6))
    return result


if __name__ == "__main__":
    main()
