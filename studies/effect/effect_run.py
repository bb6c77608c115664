"""One run of the effect study: a model is loaded, trained where its kind trains, and scored (see `compare.py`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig, find_group
from maskft.masks import majority_mask, pack_mask, unpack_mask
from maskft.scoring.temperature import INVERSE_TEMPERATURES, losses_at
from maskft.training.averaging import average_models
from maskft.tuner import AdapterMasks
from maskft_lab.device import DEVICE
from maskft_lab.study.controls import control_masks
from maskft_lab.study.methods import matched_rank

Rows = list[dict[str, Any]]
Below = dict[Any, list[Tensor]]
"""What enters the lowest masked layer, by run started from, layer and split, one tensor (length, width) a row."""
WARMUP = 0.05  # share of the steps in which the learning rate rises


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
            self.scale_change()
        elif kind == "soup":
            others = [self.folder / f"{name}-model" for name in self.s["of"]]
            others = [other for other in others if other.resolve() != Path(start).resolve()]
            self.model.load_state_dict(average_models([Path(start), *others]).state_dict())
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
    def scale_change(self) -> None:
        """Keep a share of every weight's change (WiSE-FT, arXiv 2109.01903)."""
        before = dict(AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).named_parameters())
        for name, weight in self.model.named_parameters():
            weight.lerp_(before[name].to(DEVICE), 1 - self.s["scale"])

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
            torch.save(group.masks(), self.folder / f"{s['name']}.pt")
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
            set_masks(group, majority(group, [torch.load(self.folder / f"{other}.pt") for other in s["of"]]))
            torch.save(group.masks(), self.folder / f"{s['name']}.pt")
        else:
            learned = torch.load(self.folder / f"{s['of']}.pt")
            dense = {name: unpack_mask(m, group.layers[name].in_features) for name, m in learned.items()}
            weights = {name: layer.change("default") for name, layer in group.layers.items()}
            chosen = control_masks(s["kind"], dense, weights, self.seed)
            set_masks(group, {name: pack_mask(mask) for name, mask in chosen.items()})
        return result | {"left_out": 1 - group.kept_share(), "num_weights": group.num_weights()}

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
        step = Step(s, trained, group)
        num_steps = math.ceil(len(rows) / s["batch_size"]) * round(s["num_train_epochs"])
        evaluate_at = {round(num_steps * (i + 1) / s["num_evaluations"]) for i in range(int(s["num_evaluations"]))}
        losses: list[Tensor] = []  # so that a GPU is not waited for in each step
        flips: list[int] = []
        evaluations: list[dict[str, Any]] = []
        kept: list[tuple[float, dict[str, Tensor]]] = []
        self.model.train()
        generator = torch.Generator().manual_seed(self.seed)
        for number, batch in enumerate(batches(rows, s["batch_size"], num_steps, generator), start=1):
            step.prepare(number, num_steps)
            loss = self.loss(batch)
            loss.backward()
            losses.append(loss.detach())
            step.take()
            if group is not None:
                flips.append(group.take_flips())
            if number in evaluate_at:
                result = self.score(self.rows["validation"])
                if self.best is None or result.means[0] < self.best.means[0]:
                    self.best = result
                kept.append((float(result.means[0]), {name: value.clone() for name, value in keep().items()}))
                left_out = {} if group is None else {"left_out": 1 - group.kept_share()}
                evaluations.append({"step": number, "nll": kept[-1][0]} | left_out)
                if not s["vote_checkpoints"]:
                    kept = [min(kept, key=lambda pair: pair[0])]
        if group is not None and s["vote_checkpoints"]:
            restore(majority(group, [masks for _, masks in kept]))
            self.best = None
        else:
            restore(kept[0][1])
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


class Step:
    """The optimizer, and what a recipe does to gradients and scores around its step.

    Args:
        s: settings of the run.
        trained: the weights, or the scores of the masks `group`.
    """

    def __init__(self, s: dict[str, Any], trained: list[nn.Parameter], group: AdapterMasks | None) -> None:
        self.s, self.trained, self.group = s, trained, group
        self.unit = 0.0  # root mean square of the first gradients, in which momentum counts
        self.optimizer: torch.optim.Optimizer
        if s["optimizer"] == "momentum":
            self.optimizer = torch.optim.SGD(trained, lr=s["learning_rate"], momentum=0.9, dampening=0.9)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=s["learning_rate"], weight_decay=0.0, fused=True)

    def prepare(self, number: int, num_steps: int) -> None:
        """Set the learning rate, and the density of a ramp, of step `number`, counted from 1."""
        s, num_warmup = self.s, max(1, round(WARMUP * num_steps))
        rate = min(number / num_warmup, (num_steps - number + 1) / max(1, num_steps - num_warmup))
        for settings in self.optimizer.param_groups:
            settings["lr"] = s["learning_rate"] * rate
        if self.group is not None and s["ramp"]:
            done = min(1.0, number / (s["ramp"] * num_steps))
            self.group.config.density = s["density"] + (1 - s["density"]) * (1 - done) ** 3

    def take(self) -> None:
        """One step from the gradients that are there, which are gone afterwards."""
        s, group = self.s, self.group
        before = None
        if group is not None and (s["steadiness"] or s["max_flips"]):
            before = [parameter.detach().clone() for parameter in self.trained]
        gradients: list[Any] = [parameter.grad for parameter in self.trained]
        if s["optimizer"] == "momentum":
            if not self.unit:
                squares = sum(float(g.square().sum()) for g in gradients)
                self.unit = math.sqrt(squares / sum(g.numel() for g in gradients))
            torch._foreach_div_(gradients, self.unit)
        if group is not None and s["penalty"]:
            torch._foreach_sub_(gradients, s["penalty"])
        self.optimizer.step()
        if group is not None and before is not None:
            hold_back(self.trained, before, self.optimizer, s["steadiness"], s["max_flips"])
            group.refresh()
        self.optimizer.zero_grad()


def majority(group: AdapterMasks, masks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What most of several packed masks keep, by module."""
    sizes = {name: layer.in_features for name, layer in group.layers.items()}
    return {name: majority_mask([each[name] for each in masks], size) for name, size in sizes.items()}


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
