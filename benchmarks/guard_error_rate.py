"""How often `--require_gain` lets a mask pass that helps nobody, and how often it finds a gain.

Random masks over a fine-tuned model, each scored once, give real per-problem changes of the loss. Each question is put
to the guard's test and to each of the two that it is made of:

- `as they are`: how many of the random masks pass;
- `null`: their changes with the mean taken out and problems drawn anew: masks that change the loss as real ones do, and
  help nobody in the mean. Intervals are over masks, since the draws of one mask share its changes;
- `best of k`: the best of k such masks on one half of the problems, judged on the other half, as `--require_gain` does,
  and, for comparison, judged on the half that chose it;
- `gain of s standard errors`: nulls moved down by so much;
- `law`: changes of mean 0 drawn from known laws, which is all that is asked without a model.

    python benchmarks/guard_error_rate.py --model_name_or_path FFT --dataset_name validation.jsonl \
        --layers_to_transform 26 27 28 29 --output_file error_rate.json

`--scores FILE.npz` keeps the scores, the slow part, and goes on from them.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import about
from peft import get_peft_model
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig
from maskft.data.rows import data_hash, load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.masks import num_kept, pack_mask
from maskft.scoring.nll import token_nll
from maskft.scoring.statistics import wilson
from maskft.scoring.verdict import bootstrap_t_test, level_for, sign_flips
from maskft.tuner import find_group

Array = np.ndarray[Any, Any]

# Of the two p-values that the guard takes the larger of.
TESTS: dict[str, Callable[[Array], Array]] = {
    "guard": lambda p: p.max(-1),
    "sign flips alone": lambda p: p[..., 0],
    "bootstrap-t alone": lambda p: p[..., 1],
}
# Changes of mean 0 drawn from known laws; tails to the right are problems that a mask makes much worse.
LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "exponential, tail to the right": lambda draw, shape: draw.exponential(size=shape) - 1,
    "lognormal, tail to the right": lambda draw, shape: draw.lognormal(size=shape) - np.exp(0.5),
    "lognormal, tail to the left": lambda draw, shape: np.exp(0.5) - draw.lognormal(size=shape),
    "symmetric, Student's t of 3": lambda draw, shape: draw.standard_t(3, shape),
}
SHIFTS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--dataset_name")
    parser.add_argument("--layers_to_transform", type=int, nargs="+")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.999, 0.99, 0.97, 0.9])
    parser.add_argument("--num_masks", type=int, default=50, help="random masks of each density")
    parser.add_argument("--num_problems", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--num_draws", type=int, default=3, help="null samples drawn of each mask")
    parser.add_argument("--num_checkpoints", type=int, default=5)
    parser.add_argument("--num_law", type=int, default=400, help="samples drawn from each law")
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--output_file", required=True)
    given = parser.parse_args()

    rows, result = of_masks(given) if given.model_name_or_path else ([], {})
    for n in given.num_problems:
        for law, sample in LAWS.items():
            rows += asked(f"law: {law}", sample(np.random.default_rng(3), (given.num_law, n))[:, None])

    print(f"{'masks':48} {'test':18} {'n':>4}   share passed")
    for found in rows:
        interval = f"{found['estimate']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
        print(f"{found['masks']:48} {found['test']:18} {found['n']:4}   {interval}")
    result |= {"rows": rows, **about(**{k: v for k, v in vars(given).items() if k not in ("output_file", "scores")})}
    Path(given.output_file).write_text(json.dumps(result, indent=1) + "\n")


def of_masks(given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the tests say of random masks over a model, and what these are like."""
    scores = Scores(given)
    changes, num_tokens = scores.changes, scores.num_tokens
    # Per token, so that a problem drawn twice weighs as it does in the estimate.
    centred = changes - changes.sum(1, keepdims=True) / num_tokens.sum() * num_tokens
    rows = asked("as they are", changes[:, None])
    for n in given.num_problems:
        rows += asked("null", drawn(centred, n, given.num_draws, np.random.default_rng(n)))
    n = changes.shape[1] // 2
    errors = centred.std(1, ddof=1) / np.sqrt(n)
    samples = drawn(centred, n, given.num_draws, np.random.default_rng(1))
    for shift in SHIFTS:
        rows += asked(f"gain of {shift} standard errors", samples - shift * errors[:, None, None])
    rows += chosen(centred, given)
    described = [describe(density, changes[scores.densities == density], num_tokens) for density in given.densities]
    return rows, {"num_masks": len(changes), "data_sha256": scores.sha256, "changes": described}


def drawn(changes: Array, n: int, num_draws: int, draw: np.random.Generator) -> Array:
    """Samples of `n` problems with replacement, (num_masks, num_draws, n)."""
    places = draw.integers(0, changes.shape[1], (len(changes), num_draws, n))
    return np.take_along_axis(changes[:, None], places, -1)


def asked(masks: str, samples: Array) -> list[dict[str, Any]]:
    """What each test says to samples of shape (num_masks, num_samples of each, n)."""
    p = np.apply_along_axis(lambda sample: np.array([sign_flips(sample), bootstrap_t_test(sample)]), -1, samples)
    n = samples.shape[-1]
    return [row(masks, test, n, larger(p) <= level_for(n)) for test, larger in TESTS.items()]


def row(masks: str, test: str, n: int, passed: Array) -> dict[str, Any]:
    """The share of samples that pass; with several a mask, the interval is Student's over the masks' shares."""
    shares = passed.mean(1)
    if passed.shape[1] == 1:
        found = asdict(wilson(int(passed.sum()), len(passed)))
    else:
        width = stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares)
        found = {
            "estimate": shares.mean(),
            "low": max(0.0, shares.mean() - width),
            "high": min(1.0, shares.mean() + width),
        }
    return {"masks": masks, "test": test, "num_samples": passed.size} | found | {"n": n, "level": level_for(n)}


def chosen(centred: Array, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The best of several null masks, judged on rows that did not choose it and on those that did."""
    draw = np.random.default_rng(2)
    n = centred.shape[1] // 2
    apart, together = [], []
    for _ in range(len(centred) * given.num_draws):
        several = draw.choice(len(centred), given.num_checkpoints, replace=False)
        first, second = (draw.integers(0, centred.shape[1], n) for _ in range(2))
        best = min(several, key=lambda i: centred[i, first].sum())
        apart.append(centred[best, second])
        together.append(centred[best, first])
    name = f"best of {given.num_checkpoints}, judged on"
    return [
        found
        for half, samples in (("the other half", apart), ("the half that chose it", together))
        for found in asked(f"{name} {half}", np.stack(samples)[:, None])
    ]


def describe(density: float, changes: Array, num_tokens: Array) -> dict[str, Any]:
    """The changes of the masks of one density: their size, and how far from normal they are."""
    return {
        "density": density,
        "mean_per_token": float(changes.sum() / num_tokens.sum() / len(changes)),
        "median_std": float(np.median(changes.std(1))),
        "skewness_quartiles": [round(float(q), 2) for q in np.quantile(stats.skew(changes, axis=1), (0.25, 0.5, 0.75))],
        "kurtosis_quartiles": [
            round(float(q), 1) for q in np.quantile(stats.kurtosis(changes, axis=1), (0.25, 0.5, 0.75))
        ],
    }


# --- scores ----------------------------------------------------------------------------------------------


class Scores:
    """Change of each problem's NLL sum under each random mask (num_masks, n)."""

    def __init__(self, given: argparse.Namespace) -> None:
        rows = load_rows(given.dataset_name)
        self.sha256 = data_hash(rows)
        held = dict(np.load(given.scores)) if given.scores and given.scores.exists() else {}
        wanted = [(density, seed) for density in given.densities for seed in range(given.num_masks)]
        if "plain" not in held or any(f"{d} {s}" not in held for d, s in wanted):
            held = self.score(given, rows, wanted, held)
        self.num_tokens = held["num_tokens"]
        self.changes = np.stack([held[f"{d} {s}"] for d, s in wanted]) - held["plain"]
        self.densities = np.array([density for density, _ in wanted])

    def score(
        self, given: argparse.Namespace, rows: Any, wanted: list[tuple[float, int]], held: dict[str, Array]
    ) -> dict[str, Array]:
        tokenised = tokenise_rows(rows, RowTokeniser(AutoTokenizer.from_pretrained(given.model_name_or_path)))
        plain = token_nll(load(given), tokenised)
        held["num_tokens"] = plain.num_tokens
        model = get_peft_model(
            load(given),
            MaskConfig(layers_to_transform=given.layers_to_transform, task_type="CAUSAL_LM", inference_mode=True),
        )
        group = find_group(model, "default")
        above = Above(model.base_model.model, tokenised, min(given.layers_to_transform or [0]))
        with model.disable_adapter():
            held["plain"] = above.nll_sums()
        # A sum over the vocabulary in another order: float32 leaves 1e-4 of a nat a token.
        np.testing.assert_allclose(held["plain"], plain.sums, rtol=5e-3, atol=2e-3)
        for density, seed in wanted:
            if f"{density} {seed}" in held:
                continue
            generator = torch.Generator().manual_seed(seed)
            for layer in group.layers.values():
                mask = random_mask((layer.out_features, layer.in_features), density, generator)
                layer.set_mask("default", pack_mask(mask))
            model.merge_adapter()
            held[f"{density} {seed}"] = above.nll_sums()
            model.unmerge_adapter()
            if given.scores:
                np.savez(given.scores, **held)
        return held


def random_mask(shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """A boolean mask of `shape` that keeps exactly `num_kept` weights, drawn uniformly without replacement."""
    num_weights = shape[0] * shape[1]
    mask = torch.zeros(num_weights, dtype=torch.bool)
    mask[torch.randperm(num_weights, generator=generator)[: num_kept(num_weights, density)]] = True
    return mask.view(shape)


def load(given: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype=torch.float32)


class Above:
    """Scores a model whose layers below the first masked one have run once: no mask changes what they give."""

    def __init__(self, model: Any, tokenised: Any, first: int) -> None:
        self.model, self.first, self.num_rows = model, first, len(tokenised)
        self.layers = model.model.layers
        order = sorted(range(len(tokenised)), key=lambda i: len(tokenised[i]["input_ids"]))
        self.batches = [
            self._below([tokenised[i] for i in order[k : k + 50]], order[k : k + 50]) for k in range(0, len(order), 50)
        ]

    @torch.no_grad()
    def _below(self, rows: list[dict[str, Any]], places: list[int]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        decoder = self.model.model
        ids, labels, attention = (
            pad_sequence([torch.tensor(part) for part in parts], batch_first=True, padding_value=value)
            for parts, value in (
                ([row["input_ids"] for row in rows], 0),
                ([row["labels"] for row in rows], -100),
                ([[1] * len(row["input_ids"]) for row in rows], 0),
            )
        )
        norm, decoder.norm, decoder.layers = decoder.norm, nn.Identity(), self.layers[: self.first]
        hidden = decoder(ids, attention_mask=attention, use_cache=False).last_hidden_state
        decoder.norm, decoder.layers = norm, self.layers
        return hidden, attention, labels, places

    @torch.no_grad()
    def nll_sums(self) -> Array:
        """As :func:`maskft.scoring.nll.token_nll` has them; only scored places go through the head."""
        sums = np.zeros(self.num_rows)
        decoder = self.model.model
        decoder.layers = self.layers[self.first :]
        for hidden, attention, labels, places in self.batches:
            states = decoder(inputs_embeds=hidden, attention_mask=attention, use_cache=False).last_hidden_state
            rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            logits = self.model.lm_head(states[rows, columns])
            losses = cross_entropy(logits, labels[rows, columns + 1], reduction="none").double()
            sums[places] = torch.zeros(len(places), dtype=torch.float64).index_add(0, rows, losses).numpy()
        decoder.layers = self.layers
        return sums


if __name__ == "__main__":
    main()
