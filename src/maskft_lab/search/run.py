"""`maskft search`: which layers to mask, and how densely, chosen on validation at a small part of a sweep's cost.

Three steps: one pass of gradients ranks the groups of neighbouring layers; short runs of the best of them at each
density, the worse half stopped at each rung (successive halving, by optuna); the winner is trained whole. A short run
is the beginning of the whole one, under the whole one's schedule.
"""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from scipy.stats import kendalltau
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from maskft.data.inputs import hash_inputs
from maskft.errors import MaskftError, TrainingDivergedError
from maskft.report import Page, PageTable, narrow_table, write_html
from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_write_text, disk_errors
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings
from maskft.training.calibration import restore_logits
from maskft.training.callback import total_learning_rate
from maskft.training.resume import newest_complete_checkpoint
from maskft.training.run import build_trainer, check_model, load_splits, load_tokenizer, run_train
from maskft.training.run_folder import claim_folder, other_flags, training_flags
from maskft.tuner import check_targets, find_group
from maskft.tuner.reference import load_reference
from maskft_lab.landscape.run import loss_terms
from maskft_lab.search.saliency import layer_groups, layer_saliency

logger = logging.getLogger(__name__)

TRIALS, RESULT, CONFIG, ADAPTER = "trials.log", "search.json", "config.yaml", "adapter"
_DENSITIES = (0.99, 0.95, 0.9)
_RUNGS = 4
_GRADIENT_BATCH = 8

Candidate = tuple[tuple[int, ...], float | None]
"""Layers, and the density, or None where the selection leaves the share free."""


@dataclass
class SearchArguments:
    """What is searched, and at what cost."""

    densities: list[float] | None = field(
        default=None, metadata={"help": "Densities to try. Default: 0.99 0.95 0.9; none under --selection threshold."}
    )
    layers_per_group: int = field(default=4, metadata={"help": "Neighbouring layers that are masked together."})
    num_candidates: int = field(default=3, metadata={"help": "Groups that go on from the gradients to short runs."})
    short_run_share: float = field(default=0.25, metadata={"help": "Length of a short run, as a share of a whole one."})
    num_gradient_rows: int = field(default=256, metadata={"help": "Training rows of the pass of gradients."})
    full_sweep: bool = field(
        default=False, metadata={"help": "Also train every group at every density whole, to check the search."}
    )

    def __post_init__(self) -> None:
        for name in ("layers_per_group", "num_candidates", "num_gradient_rows"):
            if getattr(self, name) < 1:
                raise MaskftError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.short_run_share <= 1:
            raise MaskftError(f"`short_run_share` must be in (0, 1], got {self.short_run_share}.")


def run_search(
    data: DataArguments, settings: TrainingSettings, mask: MaskArguments, search: SearchArguments, console: Console
) -> dict[str, Any]:
    """Search, train the winner, and write `config.yaml`, `adapter/`, `search.json` and `report.html`.

    Started again in the same folder with the same settings, rows and weights it goes on where it was killed. Only
    training and validation rows are read.

    Returns:
        What `search.json` holds.

    Raises:
        MaskftError: bad settings, data or model; a folder with something else in it; or no candidate that trained.
    """
    output = Path(str(settings.output_dir))
    given = other_flags(data, mask) | training_flags(settings)
    _check(data, settings, mask, search)
    check_model(str(data.model_name_or_path), mask.config(), temperature_scaling=settings.temperature_scaling)
    num_layers = AutoConfig.from_pretrained(data.model_name_or_path).get_text_config().num_hidden_layers
    densities = _densities(mask, search)
    groups = layer_groups(num_layers, search.layers_per_group)
    train_rows, validation_rows = load_splits(data, settings.seed)
    models = filter(None, (data.model_name_or_path, mask.reference_model_name_or_path))
    inputs = hash_inputs({"train": train_rows, "validation": validation_rows}, *models)
    claim_folder(output, {"train": given, "search": dataclasses.asdict(search)}, inputs, "search")
    tokenizer = load_tokenizer(str(data.model_name_or_path), train_rows)
    runner = _Runner(data, given, mask, output, tokenizer, train_rows, validation_rows)
    with disk_errors(f"finish the search in {output}"):
        saliency, gradient_seconds = runner.saliency(search.num_gradient_rows, settings.seed)
        sums = {group: sum(saliency.get(layer, 0.0) for layer in group) for group in groups}
        ranked = sorted(groups, key=lambda group: -sums[group])
        chosen = ranked[: search.num_candidates]
        console.print(f"Gradients rank the layers {', '.join(map(_label, ranked))}.", highlight=False)
        short = runner.trials(
            "short", [(group, density) for group in chosen for density in densities], search.short_run_share, console
        )
        sweep = []
        if search.full_sweep:
            sweep = runner.trials("sweep", [(g, d) for g in groups for d in densities], 1.0, console)
        winner = min((t for t in short if t["state"] == "complete"), key=lambda t: float(t["best"]), default=None)
        if winner is None:
            raise MaskftError(
                "No short run came to its end, the log says why; lower the learning rate and start again."
            )
        config = given | {"layers_to_transform": winner["layers"], "output_dir": str(output / ADAPTER)}
        if winner["density"] is not None:
            config["density"] = winner["density"]
        atomic_write_text(output / CONFIG, yaml.safe_dump(config, sort_keys=False))
        console.print(f"Training layers {winner['label']} whole.", highlight=False)
        final = runner.train_whole(tuple(winner["layers"]), winner["density"], output / ADAPTER)
        result = {
            "groups": [{"layers": list(g), "saliency": sums[g], "rank": ranked.index(g) + 1} for g in groups],
            "short_runs": short,
            "winner": {"layers": winner["layers"], "density": winner["density"]},
            "final": final,
            "cost": _cost(gradient_seconds, short, final),
            "sweep": sweep,
            "agreement": _agreement(sums, short, sweep, winner) if sweep else None,
            "data": {"train": inputs["train rows"], "validation": inputs["validation rows"]},
            "versions": versions(),
            "machine": machine(),
        }
        atomic_write_text(output / RESULT, json.dumps(result, indent=1) + "\n")
        tables = _tables(result)
        write_html(output / "report.html", Page("maskft search", cost_sentence(result), tables=tables))
    for table in tables:
        console.print(narrow_table(table.title, table.header, [[str(cell) for cell in row] for row in table.rows]))
    console.print(cost_sentence(result), highlight=False)
    console.print(
        f"Wrote {output / CONFIG} (for maskft train --config), {ADAPTER}/, {RESULT} and report.html.", highlight=False
    )
    return result


class _Runner:
    """The runs of a search: one loaded model, a new mask over it for each."""

    def __init__(
        self,
        data: DataArguments,
        given: dict[str, Any],
        mask: MaskArguments,
        output: Path,
        tokenizer: PreTrainedTokenizerBase,
        train_rows: Dataset,
        validation_rows: Dataset,
    ) -> None:
        names = {f.name for f in dataclasses.fields(TrainingSettings)}
        self.training = {key: value for key, value in given.items() if key in names}
        self.data = dataclasses.replace(data, overwrite_output_dir=True)
        self.mask, self.output, self.tokenizer = mask, output, tokenizer
        self.train_rows, self.validation_rows = train_rows, validation_rows
        self.model = AutoModelForCausalLM.from_pretrained(data.model_name_or_path, dtype=data.dtype)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)

    def saliency(self, num_rows: int, seed: int) -> tuple[dict[int, float], float]:
        """By layer, and the seconds it took; read from the folder where an earlier start has left it."""
        path = self.output / "saliency.json"
        if path.exists():
            found = json.loads(path.read_text())
            return {int(layer): value for layer, value in found["layers"].items()}, float(found["seconds"])
        started = time.perf_counter()
        rows = self.train_rows.shuffle(seed=seed).select(range(min(num_rows, len(self.train_rows))))
        self.model.eval()
        max_length = self.settings(1.0).max_length or 1024
        terms, _ = loss_terms(self.model, self.tokenizer, rows, _GRADIENT_BATCH, max_length)
        config = self.mask_config(None, None)
        targets = {name: self.model.get_submodule(name) for name in check_targets(config, self.model)}
        reference = load_reference(config, self.model, targets) if config.reference == "pretrained" else None
        layers = layer_saliency(self.model, targets, terms, reference)
        seconds = round(time.perf_counter() - started, 1)
        atomic_write_text(path, json.dumps({"layers": layers, "seconds": seconds}))
        return layers, seconds

    def trials(self, name: str, candidates: list[Candidate], share: float, console: Console) -> list[dict[str, Any]]:
        """Train each candidate for a share of the whole run; all but the whole ones can be stopped at a rung."""
        optuna = _optuna()
        states = optuna.trial.TrialState
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(self.output / TRIALS)))
        pruner = (
            optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
            if share < 1
            else optuna.pruners.NopPruner()
        )
        study = optuna.create_study(study_name=name, storage=storage, pruner=pruner, load_if_exists=True)
        # What a killed search was at work on is begun again.
        for trial in study.get_trials(deepcopy=False, states=(states.RUNNING, states.WAITING)):
            storage.set_trial_state_values(trial._trial_id, states.FAIL)
        labels = [_candidate_label(candidate) for candidate in candidates]
        done = {t.params["candidate"]: t for t in study.get_trials(states=(states.COMPLETE, states.PRUNED))}
        results = []
        for label, candidate in zip(labels, candidates, strict=True):
            if label in done:
                results.append(done[label].user_attrs["result"])
                continue
            study.enqueue_trial({"candidate": label})
            trial = study.ask()
            trial.suggest_categorical("candidate", labels)
            result = self._trial(name, candidate, share, trial)
            trial.set_user_attr("result", result)
            state = {"complete": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[result["state"]]
            study.tell(trial, result["best"] if state == states.COMPLETE else None, state=state)
            console.print(
                f"{name} run, layers {label}: {result['state']} at validation loss {result['best'] or math.nan:.4f} "
                f"({result['steps']} steps, {result['seconds']:.0f} s)",
                highlight=False,
            )
            results.append(result)
        return results

    def _trial(self, name: str, candidate: Candidate, share: float, trial: Any) -> dict[str, Any]:
        layers, density = candidate
        started = time.perf_counter()
        model = get_peft_model(self.model, self.mask_config(layers, density))
        losses: list[float] = []
        stop = _StopAtRung(trial, losses)
        state = "complete"
        steps = 0
        try:
            trainer = build_trainer(model, self.tokenizer, self.train_rows, self.validation_rows, self.settings(share))
            if share < 1:
                num_steps = _num_steps(trainer)
                stop.num_steps = min(num_steps, max(_RUNGS, math.ceil(share * num_steps)))
                trainer.args.eval_steps = trainer.state.eval_steps = math.ceil(stop.num_steps / _RUNGS)
                _check_reach(model, trainer.args, num_steps, stop.num_steps)
            trainer.add_callback(stop)
            trainer.train()
            steps = trainer.state.global_step
            state = "stopped" if stop.stopped else "complete"
            if not losses:  # a whole run without an evaluation at its end
                trainer.evaluate()
        except TrainingDivergedError as error:
            logger.warning("Layers %s: %s", _candidate_label(candidate), error)
            state = "failed"
        finally:
            restore_logits(model)
            self.model = model.unload()
        return {
            "layers": list(layers),
            "density": density,
            "label": _candidate_label(candidate),
            "state": state,
            "steps": steps,
            "losses": losses,
            "best": min(losses, default=None),
            "seconds": round(time.perf_counter() - started, 1),
        }

    def mask_config(self, layers: tuple[int, ...] | None, density: float | None) -> Any:
        changes: dict[str, Any] = {"layers_to_transform": None if layers is None else list(layers)}
        if density is not None:
            changes["density"] = density
        return dataclasses.replace(self.mask, **changes).config()

    def settings(self, share: float) -> TrainingSettings:
        """Those of the whole run, without checkpoints; short runs are evaluated at each rung, at most four times."""
        changes: dict[str, Any] = {
            "output_dir": str(self.output / "runs"),
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "disable_tqdm": True,
            # Short runs are judged by their loss, which no task is scored for.
            "eval_tasks": None,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": None,
        }
        if share < 1:
            changes |= {"eval_strategy": "steps", "eval_steps": 1}
        return TrainingSettings(**self.training | changes)

    def train_whole(self, layers: tuple[int, ...], density: float | None, folder: Path) -> dict[str, Any]:
        """The whole run, as `maskft train` does it with the written configuration."""
        if (folder / "report.json").exists():
            report = json.loads((folder / "report.json").read_text())
        else:
            checkpoint = newest_complete_checkpoint(folder)
            changes = {"output_dir": str(folder), "resume_from_checkpoint": str(checkpoint) if checkpoint else None}
            settings = TrainingSettings(**self.training | changes)
            report = run_train(self.data, settings, self.mask_config(layers, density))
        history = [entry["eval_loss"] for entry in report["log_history"] if "eval_loss" in entry]
        return {
            "validation_loss": min(history, default=None),
            "loss_without_mask": report.get("without_mask", {}).get("eval_loss"),
            "steps": max(entry["step"] for entry in report["log_history"]),
            "seconds": report["seconds"],
            "kept_share": report["mask"]["kept_share"],
        }


class _StopAtRung(TrainerCallback):
    """Tells optuna the validation loss at each rung, and ends a run that it gives up, or after `num_steps`."""

    num_steps: int | None = None

    def __init__(self, trial: Any, losses: list[float]) -> None:
        self.trial, self.losses, self.stopped = trial, losses, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.num_steps is not None and state.global_step >= self.num_steps:
            control.should_evaluate = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.losses.append(float(kwargs["metrics"]["eval_loss"]))
        self.trial.report(self.losses[-1], len(self.losses))
        if not control.should_training_stop and self.trial.should_prune():
            self.stopped = control.should_training_stop = True


def _check_reach(model: Any, args: TrainingArguments, num_steps: int, num_first: int) -> None:
    reach = total_learning_rate(args, num_steps, num_first)
    if find_group(model, "default").reachable_share(reach) == 0:
        raise MaskftError(
            f"In a short run of {num_first} of {num_steps} steps a score moves by at most {reach:.3g}, so no weight "
            "can flip and nothing can be ranked; raise --short_run_share or --learning_rate, or lower --init_std."
        )


def _cost(gradient_seconds: float, short: list[dict[str, Any]], final: dict[str, Any]) -> dict[str, float]:
    short_seconds = sum(trial["seconds"] for trial in short)
    return {
        "gradient_seconds": gradient_seconds,
        "short_runs": len(short),
        "short_run_steps": sum(trial["steps"] for trial in short),
        "short_run_seconds": round(short_seconds, 1),
        "plain_run_steps": final["steps"],
        "plain_run_seconds": final["seconds"],
        "search_to_plain_run": round((gradient_seconds + short_seconds) / final["seconds"], 3),
    }


def _agreement(
    sums: dict[tuple[int, ...], float],
    short: list[dict[str, Any]],
    sweep: list[dict[str, Any]],
    winner: dict[str, Any],
) -> dict[str, Any]:
    """How the cheap rankings agree with whole runs of everything (Kendall's tau-b), and what it lost by them."""
    whole = {trial["label"]: trial["best"] for trial in sweep if trial["best"] is not None}
    by_group: dict[tuple[int, ...], float] = {}
    for trial in sweep:
        if trial["best"] is not None:
            group = tuple(trial["layers"])
            by_group[group] = min(by_group.get(group, math.inf), trial["best"])
    groups = list(by_group)
    # Not those stopped at a rung: what they would have come to is not known.
    pairs = [(t["best"], whole[t["label"]]) for t in short if t["state"] == "complete" and t["label"] in whole]
    first_rung = [(t["losses"][0], whole[t["label"]]) for t in short if t["losses"] and t["label"] in whole]
    ranked = sorted(whole, key=lambda label: whole[label])
    return {
        "gradients_tau": _tau([(-sums[g], by_group[g]) for g in groups]),
        "num_groups": len(groups),
        "short_runs_tau": _tau(pairs),
        "num_short_runs": len(pairs),
        "first_rung_tau": _tau(first_rung),
        "num_first_rung": len(first_rung),
        "best_of_sweep": {"label": ranked[0], "validation_loss": whole[ranked[0]]},
        "winner": {"label": winner["label"], "validation_loss": whole.get(winner["label"])},
        "winner_rank_in_sweep": ranked.index(winner["label"]) + 1 if winner["label"] in whole else None,
        "sweep_seconds": round(sum(trial["seconds"] for trial in sweep), 1),
    }


def _tau(pairs: list[tuple[float, float]]) -> dict[str, float] | None:
    if len(pairs) < 3:
        return None
    found = kendalltau(*zip(*pairs, strict=True))
    if math.isnan(found.statistic):  # all are equal, as before the first weight has flipped
        return None
    return {"tau": float(found.statistic), "p": float(found.pvalue)}


def cost_sentence(result: dict[str, Any]) -> str:
    """What the search cost beside one plain run."""
    cost = result["cost"]
    return (
        f"Beside the winner's own run, {cost['plain_run_steps']} steps in {cost['plain_run_seconds']:.0f} s, the "
        f"search cost {cost['search_to_plain_run']:.2f} times as much: {cost['gradient_seconds']:.0f} s of gradients, "
        f"and {cost['short_run_seconds']:.0f} s of {cost['short_runs']} short runs ({cost['short_run_steps']} steps)."
    )


def _tables(result: dict[str, Any]) -> list[PageTable]:
    groups = sorted(result["groups"], key=lambda group: int(group["rank"]))
    gradients = [(_label(g["layers"]), str(g["rank"]), f"{g['saliency']:.4g}") for g in groups]
    tables = [PageTable(("layers", "rank", "sum |g W|"), gradients, title="One pass of gradients")]
    header = ("layers", "state", "steps", "best validation loss", "s")
    for title, trials in (("Short runs", result["short_runs"]), ("Whole runs of everything", result["sweep"])):
        rows: list[tuple[str, ...]] = [
            (
                t["label"],
                t["state"],
                str(t["steps"]),
                _loss(t["best"]),
                f"{t['seconds']:.0f}",
            )
            for t in sorted(trials, key=lambda t: math.inf if t["best"] is None else float(t["best"]))
        ]
        if rows:
            tables.append(PageTable(header, rows, title=title))
    final = result["final"]
    losses = (_loss(final["validation_loss"]), _loss(final["loss_without_mask"]))
    rows = [(*losses, str(final["steps"]), f"{100 * final['kept_share']:.3f} %")]
    title = f"The winner, layers {_label(result['winner']['layers'])}, trained whole"
    columns = ("validation loss", "without the mask", "steps", "kept")
    caption = "Validation chose the layers, the density and the checkpoint, so the loss with the mask is optimistic."
    return [*tables, PageTable(columns, rows, title=title, caption=caption)]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _check(data: DataArguments, settings: TrainingSettings, mask: MaskArguments, search: SearchArguments) -> None:
    if data.overwrite_output_dir:
        raise MaskftError(
            "maskft search goes on in a folder that it began with the same settings and writes over no other; leave "
            "--overwrite_output_dir out, and give another --output_dir or remove that one."
        )
    if settings.eval_strategy == "no":
        raise MaskftError(
            "A search chooses by the validation loss, and `eval_strategy` is 'no'; leave it out, or set it to epoch or "
            "steps."
        )
    if mask.layers_to_transform is not None:
        raise MaskftError("A search chooses the layers itself: leave --layers_to_transform out, or use maskft train.")
    if mask.config().selection == "threshold" and search.densities:
        raise MaskftError("Under --selection threshold the share is free: leave --densities out.")
    if search.densities is not None and len(set(search.densities)) < len(search.densities):
        raise MaskftError(f"`densities` names one twice: {search.densities}.")
    _optuna()


def _densities(mask: MaskArguments, search: SearchArguments) -> list[float | None]:
    if mask.config().selection == "threshold":
        return [None]
    densities = search.densities or list(_DENSITIES)
    for density in densities:
        given: dict[str, Any] = {"density": density}
        dataclasses.replace(mask, **given).config()
    return list(densities)


def _num_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * per_epoch)


def _label(layers: Any) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _candidate_label(candidate: Candidate) -> str:
    layers, density = candidate
    return _label(layers) if density is None else f"{_label(layers)} at {density:g}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MaskftError("A search needs optuna: pip install 'maskft[studies]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
