"""The effect study's runs: plain fine-tuning, its controls, and recipes of mask learning, on equal budgets.

    python studies/effect/compare.py --config studies/effect/maths.yaml --output_dir runs/maths

A plain loop in which every idea is a switch, so that only what helps has to enter the package. What lies below the
lowest masked layer is computed once for each row, since it never changes; on a CPU that decides what can be tried at
all. Each seed and run gives one JSON file; what is finished is not run again. Runs choose their checkpoint on
validation; the test rows are scored only where a run asks for it, and then a second time at the temperature that the
validation rows choose (Guo et al., arXiv 1706.04599), since a model that is merely less sure of itself has a lower
loss too.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, find_group
from maskft.data.tokens import tokenise_row
from maskft.masks import majority_mask, pack_mask, unpack_mask
from maskft.scoring.temperature import INVERSE_TEMPERATURES, losses_at
from maskft.tuner import AdapterMasks
from maskft_lab.demo.model import fetch_demo_model
from maskft_lab.study.config import parse_study
from maskft_lab.study.controls import control_masks
from maskft_lab.study.methods import load_domain, matched_rank

Rows = list[dict[str, Any]]
Below = dict[Any, list[Tensor]]
"""What enters the lowest masked layer, by run started from, layer and split, one tensor (length, width) a row."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OVER_ONE_MASK = ("carried", "random", "shuffled", "magnitude")
"""Kinds of runs whose mask is of the same weights, with the same first scores, as that of the run `of`."""

WITHOUT_TRAINING = ("base", "scaled", "soup", "start", "vote", *OVER_ONE_MASK)

DEFAULTS: dict[str, Any] = {
    # base, fft, fft_continued, lora, scaled, soup, mft, carried, start, vote, random, shuffled, magnitude
    "kind": "mft",
    "test": False,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "batch_size": 8,
    "warmup": 0.05,
    "weight_decay": 0.0,
    "optimizer": "adam",  # or momentum: a score moves by the size of its gradient, in units of all gradients' first RMS
    "num_evaluations": 2,
    # of a mask
    "layers": [4, 5, 6, 7],  # null: all
    "selection": "threshold",
    "density": 0.9,
    "init_scores": "keep_all",
    "init_std": 0.02,
    "ramp": 0.0,  # share of the steps in which the density comes down from 1, as a cubic (arXiv 1710.01878)
    "steadiness": 0.0,  # a weight may leave only where |mean g| is at least this share of the root mean square of g
    "max_flips": 0.0,  # largest share of the weights that may flip in one step
    "penalty": 0.0,  # nats per token that a weight left out has to bring
    "kl": 0.0,  # weight of the KL divergence from the unmasked model
    "label_smoothing": 0.0,
    "dropout": 0.0,  # of attention weights, while training
    "vote_checkpoints": False,  # a mask is what most of those at the evaluations say, and not the best of them
    "tempered": False,  # the loss is taken at the temperature that the rows to learn on choose at the start
    "dft": False,  # each token's loss times its probability: the gradient is that of the probability (arXiv 2508.05629)
    "reference": "zero",  # or pretrained: what is left out is the change that fine-tuning made to the weight
    "of": None,  # the mask that is carried over or that a control is matched to; masks that vote; models of a soup
    "folds": 0,  # the training rows in so many parts, dealt in turn
    "fold": 0,  # a mask trains on this part, and an FFT on all the others
    "scores_of": None,  # the run whose scores a mask goes on with
    "scale": 0.9,  # share of fine-tuning's change that is kept of every weight (WiSE-FT, arXiv 2109.01903)
    "start": "fft",  # name of the run that it starts from
    "way": 1.0,  # share of the way from the first scores to the learned ones at which a mask is carried over
    "save": False,  # whether a mask is kept as an adapter, for `maskft eval`, and a soup as a model
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", help="Names of runs.")
    parser.add_argument(
        "--again", action="store_true", help="Score finished runs again whose model can be had without training."
    )
    given = parser.parse_args()
    content = yaml.safe_load(given.config.read_text())
    base, rows = base_and_rows(content, str(given.config))
    for seed in given.seeds or content["seeds"]:
        folder = given.output_dir / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        below: Below = {}
        for name, own in content["runs"].items():
            path = folder / f"{name}.json"
            settings = {
                key: _number(value)
                for key, value in (DEFAULTS | content.get("defaults", {}) | {"name": name} | (own or {})).items()
            }
            kind, can_load = settings["kind"], (folder / f"{name}-model").exists()
            is_again = path.exists() and given.again and (kind in WITHOUT_TRAINING or can_load)
            if (path.exists() and not is_again) or (given.only and name not in given.only):
                continue
            if kind in OVER_ONE_MASK:
                carried = json.loads((folder / f"{settings['of']}.json").read_text())["settings"]
                settings |= {key: carried[key] for key in ("layers", "reference", "init_scores", "init_std")}
            started = time.perf_counter()
            run = Run(settings, base, folder, rows, seed, below)
            if is_again:
                result = json.loads(path.read_text())
                run.build(can_load=can_load)
                result |= run.scores()
            else:
                result = run.build() | run.scores()
                result |= {"seed": seed, "settings": settings, "seconds": round(time.perf_counter() - started, 1)}
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, separators=(",", ":")) + "\n")
            temporary.rename(path)
            print(_line(result, folder), flush=True)


def base_and_rows(content: dict[str, Any], where: str) -> tuple[str, dict[str, Rows]]:
    """The model before fine-tuning, and the encoded rows of each split, of a configuration read from `where`."""
    base = content.get("base_model") or str(fetch_demo_model())
    study = {"name": "effect", "seeds": [1], "models": {"m": base}, "methods": {"base": None}}
    splits = load_domain(parse_study(study | {"domains": {"d": content["domain"]}}, where).domains[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = ("train", "validation", "test")
    return base, {name: [tokenise_row(row, tokenizer, 256) for row in getattr(splits, name)] for name in names}


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4, which has no point, as text.
    return float(value) if isinstance(value, str) and value[0].isdigit() else value


def _line(result: dict[str, Any], folder: Path) -> str:
    name = result["settings"]["name"]
    line = f"seed {result['seed']} {name:24s} validation {result['validation']['nll']:.4f}"
    start = folder / f"{result['settings']['start']}.json"
    if start.exists() and name != "fft":
        line += f" ({result['validation']['nll'] - json.loads(start.read_text())['validation']['nll']:+.4f})"
    for point in result.get("evaluations", []):
        line += f" {point['step']}:{point['nll']:.4f}"
    if "left_out" in result:
        line += f" out {100 * result['left_out']:.3f} %"
    if result.get("train"):
        line += f" train {result['train'][0]:.3f}-{result['train'][-1]:.3f}"
    return f"{line} {result['seconds']:.0f} s"


class Scored(NamedTuple):
    """A split's rows under a model.

    Attributes:
        sums: NLL in nats, (inverse temperatures, rows).
        num_tokens: that count, (rows,).
        right: whether each of them is the likeliest one, so that greedy decoding writes just this row, (rows,).
    """

    sums: np.ndarray
    num_tokens: np.ndarray
    right: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """NLL per token, (inverse temperatures,)."""
        return np.asarray(self.sums.sum(1) / self.num_tokens.sum())

    @property
    def best_inverse_temperature(self) -> float:
        """Of rows that were scored at all of `INVERSE_TEMPERATURES`."""
        return INVERSE_TEMPERATURES[int(self.means.argmin())]

    def rounded_sums(self, index: int) -> list[float]:
        return [round(float(v), 4) for v in self.sums[index]]

    def to_dict(self, index: int = 0) -> dict[str, Any]:
        return {
            "nll": float(self.means[index]),
            "sums": self.rounded_sums(index),
            "num_tokens": self.num_tokens.tolist(),
            "right": self.right.tolist(),
        }


class Run:
    """One run: a model is loaded, trained where its kind trains, and scored."""

    def __init__(
        self, s: dict[str, Any], base: str, folder: Path, rows: dict[str, Rows], seed: int, below: Below
    ) -> None:
        self.s, self.base, self.folder, self.rows, self.seed, self.below = s, base, folder, rows, seed, below
        self.best: Scored | None = None  # of the validation rows, where training has scored them
        self.inverse_temperature = 1.0  # of the loss
        torch.manual_seed(seed)

    def build(self, *, can_load: bool = False) -> dict[str, Any]:
        """Make the run's model, by training where its kind trains and it cannot be loaded; returns what is to tell."""
        kind, own = self.s["kind"], self.folder / f"{self.s['name']}-model"
        start = self.base if kind in ("base", "fft") else str(self.folder / f"{self.s['start']}-model")
        # Where sequences are padded, the eager attention is the faster one on a CPU.
        attention = "eager" if DEVICE == "cpu" else "sdpa"
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            own if can_load else start,
            dtype=torch.float32,
            attn_implementation=attention,
            attention_dropout=self.s["dropout"],
        ).to(DEVICE)
        if can_load:
            return {}
        result: dict[str, Any] = {}
        if kind in ("fft", "fft_continued"):
            result = self.train(list(self.model.parameters()), self.model.state_dict, self.model.load_state_dict)
        elif kind == "lora":
            rank = matched_rank(self.model, {"layers_to_transform": self.s["layers"]})
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, lora)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            result = self.train(
                trained,
                lambda: get_peft_model_state_dict(self.model),
                lambda state: set_peft_model_state_dict(self.model, state),
            ) | {"rank": rank, "num_trained": sum(p.numel() for p in trained)}
        elif kind == "scaled":
            before = parameters(AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32))
            for name, weight in parameters(self.model).items():
                weight.lerp_(before[name].to(DEVICE), 1 - self.s["scale"])
        elif kind == "soup":
            others = [self.folder / f"{name}-model" for name in self.s["of"]]
            self.average([other for other in others if other.resolve() != Path(start).resolve()])
        elif kind != "base":
            result = self.mask()
            if self.s["save"]:
                self.model.save_pretrained(self.folder / f"{self.s['name']}-adapter")
        if kind == "fft" or (kind == "soup" and self.s["save"]):
            self.model.save_pretrained(own)
            AutoTokenizer.from_pretrained(self.base).save_pretrained(own)
        return result

    def scores(self) -> dict[str, Any]:
        """NLL of the validation rows and, where it is asked for, of the test rows at two temperatures."""
        if not self.s["test"]:
            return {"validation": (self.best or self.score(self.rows["validation"])).to_dict()}
        validation = self.score(self.rows["validation"], INVERSE_TEMPERATURES)
        best = validation.best_inverse_temperature
        test = self.score(self.rows["test"], [1.0, best])
        return {
            "validation": validation.to_dict(INVERSE_TEMPERATURES.index(1.0)),
            "test": test.to_dict(),
            "tempered": {"inverse_temperature": best, "nll": float(test.means[1]), "sums": test.rounded_sums(1)},
        }

    @torch.no_grad()
    def average(self, others: list[Path]) -> None:
        """Average the model's weights with those of other models (arXiv 2203.05482)."""
        weights = parameters(self.model)
        for place, other in enumerate(others, start=2):
            model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
            for name, weight in parameters(model).items():
                weights[name].lerp_(weight.to(DEVICE), 1 / place)

    @torch.no_grad()
    def cut(self) -> list[int] | None:
        """Leave out what lies below the lowest masked layer; rows bring what enters it. Returns the new places."""
        s = self.s
        layers: list[int] | None = s["layers"]
        lowest = min(layers or [0])
        inner = self.model.model
        # The reference's modules go by their names in the whole model.
        if not layers or lowest == 0 or s["reference"] == "pretrained" or self.model.config.model_type != "llama":
            return layers
        kept = inner.layers
        inner.layers, inner.norm, norm = kept[:lowest], nn.Identity(), inner.norm
        self.model.config.num_hidden_layers = lowest
        for split in ("train", "validation", *(("test",) if self.s["test"] else ())):
            key = (self.s["start"], lowest, split)
            if key not in self.below:
                self.below[key] = []
                for start in range(0, len(self.rows[split]), 32):
                    block = self.rows[split][start : start + 32]
                    hidden = self.hidden(block)
                    self.below[key] += [h[: len(r["input_ids"])].clone() for h, r in zip(hidden, block, strict=True)]
            rows = zip(self.rows[split], self.below[key], strict=True)
            self.rows = self.rows | {split: [row | {"below": below} for row, below in rows]}
        inner.layers, inner.norm = kept[lowest:], norm
        self.model.config.num_hidden_layers = len(inner.layers)
        return [layer - lowest for layer in layers]

    def mask(self) -> dict[str, Any]:
        s = self.s
        layers = self.cut()
        config = MaskConfig(
            layers_to_transform=layers,
            reference=s["reference"],
            reference_model_name_or_path=self.base if s["reference"] == "pretrained" else None,
            selection=s["selection"],
            density=s["density"],
            init_scores="magnitude" if s["init_scores"] == "wanda" else s["init_scores"],
            init_std=s["init_std"],
            seed=self.seed,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(self.model, config)
        group = find_group(self.model, "default")
        result = {}
        if s["kind"] == "mft":
            if s["init_scores"] == "wanda":
                self.start_from_inputs(group)
            if s["scores_of"]:
                self.go_on_from(group, torch.load(self.folder / f"{s['scores_of']}.scores"))
            result = self.train(
                list(scores(group).values()),
                lambda: {name: mask.clone() for name, mask in group.masks().items()},
                lambda masks: set_masks(group, masks),
                group,
            )
            torch.save(group._packed(), self.folder / f"{s['name']}.pt")
            if s["folds"]:
                torch.save(scores(group), self.folder / f"{s['name']}.scores")
        elif s["kind"] == "carried" and s["way"] < 1:
            learned, first = torch.load(self.folder / f"{s['of']}.scores"), scores(group)
            self.go_on_from(group, {name: first[name].lerp(last, s["way"]) for name, last in learned.items()})
        elif s["kind"] == "carried":
            set_masks(group, torch.load(self.folder / f"{s['of']}.pt"))
        elif s["kind"] == "start":
            pass  # the masks of the first scores: random ones where these are drawn
        elif s["kind"] == "vote":
            masks = [torch.load(self.folder / f"{other}.pt") for other in s["of"]]
            sizes = {name: layer.in_features for name, layer in group.layers.items()}
            set_masks(group, {name: majority_mask([m[name] for m in masks], size) for name, size in sizes.items()})
            torch.save(group._packed(), self.folder / f"{s['name']}.pt")
        else:
            learned = torch.load(self.folder / f"{s['of']}.pt")
            dense = {name: unpack_mask(m, group.layers[name].in_features) for name, m in learned.items()}
            weights = {name: layer.change("default") for name, layer in group.layers.items()}
            chosen = control_masks(s["kind"], dense, weights, self.seed)
            set_masks(group, {name: pack_mask(mask) for name, mask in chosen.items()})
        return result | {"left_out": 1 - share_kept(group), "num_weights": group.num_weights()}

    def train(
        self,
        trained: list[nn.Parameter],
        keep: Callable[[], dict[str, Tensor]],
        restore: Callable[[dict[str, Tensor]], Any],
        group: AdapterMasks | None = None,
    ) -> dict[str, Any]:
        """Train, and go back to the best checkpoint on validation."""
        s = self.s
        rows = self.rows["train"]
        if s["folds"]:
            rows = [row for i, row in enumerate(rows) if (i % s["folds"] == s["fold"]) == (group is not None)]
        if s["tempered"]:
            self.inverse_temperature = self.score(rows, INVERSE_TEMPERATURES).best_inverse_temperature
        optimizer: torch.optim.Optimizer
        if s["optimizer"] == "momentum":
            optimizer = torch.optim.SGD(trained, lr=s["learning_rate"], momentum=0.9, dampening=0.9)
        else:
            optimizer = torch.optim.AdamW(trained, lr=s["learning_rate"], weight_decay=s["weight_decay"], fused=True)
        unit = 0.0
        num_steps = math.ceil(len(rows) / s["batch_size"]) * round(s["num_train_epochs"])
        num_warmup = max(1, round(s["warmup"] * num_steps))
        evaluate_at = {round(num_steps * (i + 1) / s["num_evaluations"]) for i in range(int(s["num_evaluations"]))}
        losses: list[Tensor] = []  # so that a GPU is not waited for in each step
        flips: list[int] = []
        evaluations: list[dict[str, Any]] = []
        best: dict[str, Tensor] = {}
        passed: list[dict[str, Tensor]] = []
        self.model.train()
        generator = torch.Generator().manual_seed(self.seed)
        for step, batch in enumerate(batches(rows, s["batch_size"], num_steps, generator), start=1):
            rate = min(step / num_warmup, (num_steps - step + 1) / max(1, num_steps - num_warmup))
            for settings in optimizer.param_groups:
                settings["lr"] = s["learning_rate"] * rate
            if group is not None and s["ramp"]:
                done = min(1.0, step / (s["ramp"] * num_steps))
                group.config.density = s["density"] + (1 - s["density"]) * (1 - done) ** 3
            loss = self.loss(batch)
            loss.backward()
            losses.append(loss.detach())
            before = None
            if group is not None and (s["steadiness"] or s["max_flips"]):
                before = [parameter.detach().clone() for parameter in trained]
            gradients: list[Any] = [parameter.grad for parameter in trained]
            if s["optimizer"] == "momentum":
                if not unit:
                    squares = sum(float(g.square().sum()) for g in gradients)
                    unit = math.sqrt(squares / sum(g.numel() for g in gradients))
                torch._foreach_div_(gradients, unit)
            if group is not None and s["penalty"]:
                torch._foreach_sub_(gradients, s["penalty"])
            optimizer.step()
            if group is not None:
                if before is not None:
                    hold_back(trained, before, optimizer, s["steadiness"], s["max_flips"])
                    group.refresh()
                flips.append(group.take_flips())
            optimizer.zero_grad()
            if step in evaluate_at:
                found = self.score(self.rows["validation"])
                point = {"step": step, "nll": float(found.means[0])}
                if group is not None:
                    point["left_out"] = 1 - group.kept_share()
                if self.best is None or found.means[0] < self.best.means[0]:
                    self.best = found
                    best = {name: value.clone() for name, value in keep().items()}
                evaluations.append(point)
                if s["vote_checkpoints"]:
                    passed.append(keep())
        if group is not None and passed:
            sizes = {name: layer.in_features for name, layer in group.layers.items()}
            best = {name: majority_mask([masks[name] for masks in passed], size) for name, size in sizes.items()}
            self.best = None
        restore(best)
        parts = np.array_split(torch.stack(losses).tolist(), min(8, len(losses)))
        return {
            "evaluations": evaluations,
            "train": [round(float(np.mean(part)), 4) for part in parts],
            "num_flips": [int(sum(part)) for part in np.array_split(flips, 8)] if flips else None,
            "num_steps": num_steps,
            "inverse_temperature": self.inverse_temperature,
        }

    @torch.no_grad()
    def score(self, rows: Rows, inverse_temperatures: Sequence[float] = (1.0,)) -> Scored:
        """Score rows at evenly spaced inverse temperatures, by default at 1."""
        self.model.eval()
        sums, num_tokens = np.zeros((len(inverse_temperatures), len(rows))), np.zeros(len(rows), dtype=np.int64)
        right = np.zeros(len(rows), dtype=np.int64)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        # So that the logits of a large vocabulary fit into memory.
        size = max(4, min(32, 1_600_000 // self.model.config.vocab_size))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            logits, targets, at = self.scored([rows[i] for i in places])
            each = torch.zeros((len(inverse_temperatures), *at.shape), dtype=torch.float64, device=DEVICE)
            each[:, at] = losses_at(logits, targets, inverse_temperatures)
            sums[:, places] = each.sum(-1).cpu().numpy()
            num_tokens[places] = at.sum(1).cpu().numpy()
            is_wrong = torch.zeros(at.shape, dtype=torch.bool, device=DEVICE)
            is_wrong[at] = logits.argmax(-1) != targets
            right[places] = (~is_wrong.any(1)).cpu().numpy()
        self.model.train()
        return Scored(sums, num_tokens, right)

    def hidden(self, rows: Rows) -> Tensor:
        """What leaves the last layer, (rows, length, width)."""
        longest = max(len(row["input_ids"]) for row in rows)
        attention = padded([[1] * len(row["input_ids"]) for row in rows], longest, 0)
        inputs: dict[str, Any] = {"attention_mask": attention, "use_cache": False}
        if "below" in rows[0]:
            below = [F.pad(row["below"], (0, 0, 0, longest - len(row["below"]))) for row in rows]
            inputs["inputs_embeds"] = torch.stack(below)
        else:
            inputs["input_ids"] = padded([row["input_ids"] for row in rows], longest, 0)
        with autocast():
            hidden: Tensor = self.plain().model(**inputs).last_hidden_state
        return hidden

    def plain(self) -> Any:
        """The language model inside what PEFT put around it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def scored(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and targets of the tokens that count, and where they are (rows, length - 1)."""
        targets = padded([row["labels"] for row in rows], max(len(row["labels"]) for row in rows), -100)[:, 1:]
        at = targets != -100
        hidden = self.hidden(rows)
        with autocast():
            logits: Tensor = self.plain().lm_head(hidden[:, :-1][at]).float()
        return logits, targets[at], at

    def loss(self, batch: Rows) -> Tensor:
        ours, targets, _ = self.scored(batch)
        ours = ours * self.inverse_temperature
        each = F.cross_entropy(ours, targets, label_smoothing=self.s["label_smoothing"], reduction="none")
        loss = (each * (-each.detach()).exp() if self.s["dft"] else each).mean()
        if self.s["kl"]:
            with torch.no_grad(), self.model.disable_adapter():
                theirs = self.scored(batch)[0].log_softmax(-1)
            divergence = F.kl_div(ours.log_softmax(-1), theirs, log_target=True, reduction="batchmean")
            loss = loss + self.s["kl"] * divergence
        return loss

    @torch.no_grad()
    def go_on_from(self, group: AdapterMasks, learned: dict[str, Tensor]) -> None:
        for name, values in scores(group).items():
            values.copy_(learned[name])
        group.refresh()

    @torch.no_grad()
    def start_from_inputs(self, group: AdapterMasks) -> None:
        """Scores as Wanda ranks (arXiv 2306.11695): |W| times the input's norm, to a root mean square of init_std."""
        squares = {name: torch.zeros(layer.in_features, device=DEVICE) for name, layer in group.layers.items()}
        hooks = []
        for name, layer in group.layers.items():

            def add(module: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                squares[name] += inputs[0].float().flatten(0, -2).square().sum(0)

            hooks.append(layer.register_forward_pre_hook(add))
        with self.model.disable_adapter():
            self.hidden(self.rows["train"][:32])
        for hook in hooks:
            hook.remove()
        for name, layer in group.layers.items():
            ranked = layer.oriented_weight().abs() * squares[name].sqrt()
            layer.maskft_scores["default"].copy_(ranked * (self.s["init_std"] / ranked.square().mean().sqrt()))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Those without gradients, each once; a state dict names tied ones twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def padded(values: list[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([v + [filler] * (length - len(v)) for v in values], device=DEVICE)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16)


def batches(rows: Rows, size: int, num_steps: int, generator: torch.Generator) -> Iterator[Rows]:
    """Shuffled batches, rows of like length together within windows of four batches."""
    done = 0
    while True:
        order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
        order = [
            i
            for start in range(0, len(order), 4 * size)
            for i in sorted(order[start : start + 4 * size], key=lambda i: len(rows[i]["input_ids"]))
        ]
        for start in range(0, len(order), size):
            yield [rows[i] for i in order[start : start + size]]
            done += 1
            if done == num_steps:
                return


@torch.no_grad()
def hold_back(
    scores: list[nn.Parameter], before: list[Tensor], optimizer: Any, steadiness: float, max_flips: float
) -> None:
    """Put scores that would cross the threshold 0 without leave back to the side where they were."""
    crossing = [(new >= 0) != (old >= 0) for new, old in zip(scores, before, strict=True)]
    held = [torch.zeros_like(cross) for cross in crossing]
    if steadiness:
        for i, parameter in enumerate(scores):
            state = optimizer.state[parameter]
            step = float(state["step"])
            first = state["exp_avg"].abs() / (1 - 0.9**step)
            second = (state["exp_avg_sq"] / (1 - 0.999**step)).sqrt()
            held[i] |= crossing[i] & (first < steadiness * second)
    if max_flips:
        limit = int(max_flips * sum(p.numel() for p in scores))
        sizes = [torch.where(c & ~h, p.abs(), -1) for p, c, h in zip(scores, crossing, held, strict=True)]
        found = torch.cat([size[size >= 0] for size in sizes])
        if len(found) > limit:
            border = found.sort(descending=True).values[limit]
            for i, size in enumerate(sizes):
                held[i] |= (size >= 0) & (size <= border)
    for parameter, hold in zip(scores, held, strict=True):
        parameter[hold] = torch.where(parameter[hold] >= 0, -1e-9, 0.0)


def scores(group: AdapterMasks) -> dict[str, nn.Parameter]:
    return {name: layer.maskft_scores["default"] for name, layer in group.layers.items()}


def set_masks(group: AdapterMasks, masks: dict[str, Tensor]) -> None:
    for name, layer in group.layers.items():
        layer.set_mask("default", masks[name])


def share_kept(group: AdapterMasks) -> float:
    kept = sum(int(unpack_mask(m, group.layers[name].in_features).sum()) for name, m in group._packed().items())
    return kept / group.num_weights()


if __name__ == "__main__":
    main()
