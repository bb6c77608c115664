"""`maskft crossfit`: a mask of the change, learned on rows that the fine-tuning which made the change has not seen.

On its own training rows a fine-tuned model has nothing left to learn, so a mask that is learned there fits them and no
others. Here the rows are dealt into folds. For each fold a copy of the model before fine-tuning is fine-tuned on the
other folds, and the scores go on learning over that change, on this fold. The mask that they give at last is put over
the change of the fine-tuning on all rows. Cross-fitting is known from statistics (Chernozhukov et al. 2018,
doi:10.1111/ectj.12097, section 3); what is measured of it here stands in docs/how-to/crossfit.md.
"""

import copy
import dataclasses
import json
import logging
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from pydantic import Field

from maskft.adapters.model_files import UNKNOWN, load_model
from maskft.adapters.read import load_scores
from maskft.data.splits import check_overlap, rows_by_problem
from maskft.errors import MaskftError
from maskft.masks import majority_mask
from maskft.scoring.verdict import require_problems
from maskft.storage.files import atomic_write_text, disk_errors, require_empty_output
from maskft.storage.json_text import read_object
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings, flag, other_flags, training_flags
from maskft.training.averaging import save_average
from maskft.training.callback import total_learning_rate
from maskft.training.hub import open_repository, push_result
from maskft.training.inputs import check_inputs, hash_inputs, note_inputs
from maskft.training.prepare import check_model, load_tokeniser
from maskft.training.preview import show_rows
from maskft.training.ranks import on_first_rank, require_equal_ranks
from maskft.training.report import begin_report, require_shown_gain, write_result
from maskft.training.restore import restoring_mask
from maskft.training.resume import AUTO, newest_complete_checkpoint
from maskft.training.retain import MORE, RetainArguments, Retaining
from maskft.training.run import judge, read_rows, run_sft, run_train
from maskft.tuner import MaskConfig, find_group
from maskft.values import check_value

logger = logging.getLogger(__name__)

MODEL, MASK, ADAPTER = "model", "mask", "adapter"
FINE_TUNING = "fine-tuning"
REPORT = "report.json"
_SEED_STEP = 1_000_003  # between a run's seeds, so that runs of neighbouring seeds share none


@dataclass
class CrossFitArguments:
    """How the mask is cross-fitted; the flags of training are those of the fine-tuning."""

    _argument_group_name = "Cross-fitting"

    fine_tuned_model_name_or_path: str | None = flag(
        None, "The fine-tuning on all rows, with the same flags, if there already. Default: OUTPUT_DIR/model is made."
    )
    num_fine_tunings: int = flag(1, "Fine-tunings on all rows, over whose averaged weights the mask is put.")
    num_folds: int = flag(3, "Parts into which the training rows are dealt, at least 2.")
    num_repeats: int = flag(
        1,
        "Masks that vote, each with folds, fine-tunings and first scores of its own. A weight is left out where more "
        "than half of them leave it out. Three lose no right answers where one does.",
    )
    # On validation -0.0121 nats at 2.8 spreads, -0.0111 at 1.3 and -0.0086 at 0.7 (studies/effect/README.md).
    score_reach: float = flag(
        2.8,
        "How far a score can move over all folds, in units of --init_std, over which the scores are spread at the "
        "start. Their learning rate follows from it and the number of steps.",
    )
    score_num_train_epochs: int = flag(1, "Epochs of the scores on each fold.")

    def __post_init__(self) -> None:
        hints: dict[str, Any] = dict.fromkeys(
            ("num_fine_tunings", "num_repeats", "score_num_train_epochs"), Annotated[int, Field(ge=1)]
        )
        # The mask learns on rows which the other folds' fine-tuning has not seen.
        hints |= {"num_folds": Annotated[int, Field(ge=2)]}
        hints |= {"score_reach": Annotated[float, Field(gt=0, allow_inf_nan=False)]}
        for name, hint in hints.items():
            setattr(self, name, check_value(name, getattr(self, name), hint))
        if self.num_fine_tunings > 1 and self.fine_tuned_model_name_or_path is not None:
            what = f"`num_fine_tunings` is {self.num_fine_tunings}"
            raise MaskftError(f"With --fine_tuned_model_name_or_path nothing is left to average, and {what}; give one.")


def run_crossfit(
    data: DataArguments,
    settings: TrainingSettings,
    mask: MaskArguments,
    cross: CrossFitArguments,
    *,
    retain: RetainArguments | None = None,
    require_gain: bool = False,
    splits: tuple[Dataset, Dataset] | None = None,
) -> dict[str, Any]:
    """Fine-tune, learn the mask on rows that its change has not seen, and save it to `settings.output_dir/adapter`.

    `data.model_name_or_path` is the model before fine-tuning. Started again in the same folder with the same settings,
    rows and weights, it goes on where it was killed. Validation rows choose the checkpoints of the fine-tunings, and
    none of the scores, so the verdict is on all of them. NoGainError where `require_gain` and it shows no gain, any
    other MaskftError for bad settings or data, a loss that is no number, or a disk that refuses. Returns the report, as
    in `adapter/report.json`.

    Args:
        retain: general rows, on which the scores learn to stay near the model before fine-tuning. The verdict is then
            on both kinds of rows (:func:`maskft.scoring.verdict.restore_verdict`).
        require_gain: write no adapter without a gain.
        splits: training and validation rows. Default: those that `data` names.
    """
    if settings.deepspeed_plugin is not None:
        raise MaskftError("maskft crossfit runs alone, under DDP and FSDP2, not under DeepSpeed; configure another.")
    model, tuned = str(data.model_name_or_path), cross.fine_tuned_model_name_or_path
    config = restoring_mask(mask, model)
    check_model(model, config, temperature_scaling=settings.temperature_scaling)
    if tuned is not None:
        check_model(tuned, config)
    rows, found, tokenizer = read_rows(data, settings, splits, require_gain=False)
    check_overlap(rows["train"], rows["validation"], is_refused=True)
    require_problems(rows["validation"], "the validation rows", is_required=require_gain)
    retaining = _retaining(retain, model, settings, require_gain)
    of_task, rows = rows, rows | (retaining.splits if retaining else {})

    given: dict[str, Any] = {"data": other_flags(data), "training": training_flags(settings), "mask": other_flags(mask)}
    given |= {"crossfit": dataclasses.asdict(cross), "require_gain": require_gain}
    given |= {"retain": other_flags(retain)} if retaining else {}
    require_equal_ranks(given)
    stages = _Stages(data, given, config, cross, Path(str(settings.output_dir)), rows, found, retaining)
    if data.dry_run:
        return show_rows(of_task, tokenizer, model, settings.max_length)
    repository = on_first_rank(lambda: open_repository(settings, tuned or str(stages.output_dir / MODEL)))
    on_first_rank(stages.claim)
    with disk_errors(f"finish the cross-fitting in {stages.output_dir}"):
        if not stages.is_done(ADAPTER):
            if retaining is not None:
                retaining.ask(data.dtype, tokenizer, settings)
            for number in range(stages.num_learned(), len(stages.folds)):
                stages.learn(number)
            fine_tuned = tuned or str(stages.fine_tune_on_all())
            on_first_rank(lambda: stages.carry_over(fine_tuned))
        report = stages.finish()
    if repository is not None:
        folder = stages.output_dir / ADAPTER
        on_first_rank(lambda: push_result(settings, repository, folder, [path.name for path in folder.iterdir()]))
    return report


def _retaining(given: RetainArguments | None, model: str, settings: Any, require_gain: bool) -> Retaining | None:
    """The general rows, read, where the user gives some."""
    if given is None or not given.retain_dataset_name:
        return None
    retaining = Retaining(given, model)
    held_out = retaining.read(settings, require_gain=False)["retained validation"]
    require_problems(held_out, "the held-out general rows", is_required=require_gain, more=MORE)
    return retaining


def deal_folds(rows: Dataset, num_folds: int, seed: int) -> list[list[int]]:
    """Deal rows into folds, as their indices; the rows of one problem stay together, and each fold needs one."""
    problems = rows_by_problem(rows)
    if len(problems) < num_folds:
        what = f"{len(problems)} different problems cannot be dealt into {num_folds} folds"
        raise MaskftError(f"{what}; give more rows or lower --num_folds.")
    random.Random(seed).shuffle(problems)
    return [sorted(index for group in problems[i::num_folds] for index in group) for i in range(num_folds)]


@dataclass
class _Stages:
    """The parts of a cross-fitting, each of which is left out where its folder already has the result."""

    data: DataArguments
    given: dict[str, Any]
    mask: MaskConfig
    cross: CrossFitArguments
    output_dir: Path
    rows: dict[str, Dataset]
    found: dict[str, dict[str, int]] | None
    retaining: Retaining | None

    def __post_init__(self) -> None:
        self.data = dataclasses.replace(self.data, overwrite_output_dir=True)
        self.started = time.perf_counter()
        seeds = [self.settings("", i).seed for i in range(self.cross.num_repeats)]
        self.folds = [fold for seed in seeds for fold in deal_folds(self.rows["train"], self.cross.num_folds, seed)]
        for number in range(len(self.folds)):
            self.mask_settings(number)  # which refuses a fold of too few steps

    def claim(self) -> None:
        """Take the folder, or go on there; MaskftError where it was begun with other settings, rows or weights."""
        before, tuned = self.data.model_name_or_path, self.cross.fine_tuned_model_name_or_path
        inputs = hash_inputs(self.rows, *filter(None, (before, tuned)))
        if tuned is not None and inputs[f"weights of {tuned}"] == inputs[f"weights of {before}"] != UNKNOWN:
            what = f"{tuned!r} has the same weights as {before!r}, so no mask can change anything"
            raise MaskftError(f"{what}; give its fine-tuning as --fine_tuned_model_name_or_path, or leave it out.")
        check_inputs(self.output_dir, inputs)
        path, text = self.output_dir / "settings.json", json.dumps(self.given, indent=1, default=str) + "\n"
        if not path.exists():
            require_empty_output(self.output_dir, what="the cross-fitting")
            atomic_write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise MaskftError(f"{self.output_dir} has a cross-fitting with other settings; give another --output_dir.")
        note_inputs(self.output_dir, inputs)

    def is_done(self, name: str) -> bool:
        """Whether a stage's folder has its result."""
        return on_first_rank((self.output_dir / name / REPORT).exists)

    def num_learned(self) -> int:
        """How many folds there were scores for; of a repeat's folds the last is kept alone."""
        return max((n + 1 for n in range(len(self.folds)) if self.is_done(f"fold-{n}/{MASK}")), default=0)

    def learn(self, number: int) -> None:
        """Learn the scores on a fold over the change made on the others, going on from the repeat's fold before.

        The fold's model and the scores before are removed then.
        """
        fold, (repeat, nth) = self.folds[number], divmod(number, self.cross.num_folds)
        scores = on_first_rank(lambda: self.scores(number - 1)) if nth else None
        rows = self.rows["train"]
        others = rows.select(sorted(set(range(len(rows))).difference(fold)))
        what = f"Fold {number + 1} of {len(self.folds)}"
        model = self.fine_tune(f"fold-{number}/{MODEL}", others, f"{what}: fine-tuning on the other folds.", repeat)
        logger.info("%s: the mask learns on %d rows.", what, len(fold))
        data = dataclasses.replace(self.data, model_name_or_path=str(model))
        mask = dataclasses.replace(self.mask, seed=self.mask.seed + repeat * _SEED_STEP)
        splits = (rows.select(fold), self.rows["validation"])
        settings = self.mask_settings(number)
        if self.retaining is not None:
            self.retaining.deal(settings, number)
        run_train(data, settings, mask, splits=splits, scores_from=scores, restoring=self.retaining)
        self.remove(f"fold-{number}/{MODEL}", *([f"fold-{number - 1}"] if nth else []))

    def scores(self, number: int) -> Path:
        """The training checkpoint of a fold's scores."""
        checkpoint = newest_complete_checkpoint(self.output_dir / f"fold-{number}" / MASK)
        if checkpoint is None:
            raise MaskftError(f"{self.output_dir} has lost the scores of fold {number}; remove it and start anew.")
        return checkpoint

    def fine_tune_on_all(self) -> Path:
        """The model that the mask is put over: one fine-tuning, or the average of some with other seeds."""
        rows, count, folder = self.rows["train"], self.cross.num_fine_tunings, self.output_dir / MODEL
        if count == 1:
            return self.fine_tune(MODEL, rows, f"Fine-tuning on all {len(rows)} rows.")
        if not self.is_done(MODEL):
            what = f"of {count} on all {len(rows)} rows."
            made = [self.fine_tune(f"{FINE_TUNING}-{i}", rows, f"Fine-tuning {i + 1} {what}", i) for i in range(count)]
            on_first_rank(lambda: save_average(made, folder))
        return folder

    def fine_tune(self, name: str, rows: Dataset, what: str, nth_seed: int = 0) -> Path:
        """Say `what` is done, and fine-tune the first model on `rows` into a folder, or go on there; returns it."""
        if not self.is_done(name):
            logger.info("%s", what)
            settings = self.settings(name, nth_seed, temperature_scaling=False)
            run_sft(self.data, settings, splits=(rows, self.rows["validation"]))
        self.remove(f"{name}/checkpoint-*")  # here, for a kill may have come before it
        return self.output_dir / name

    def remove(self, *patterns: str) -> None:
        """Remove folders, which nothing needs any more."""
        on_first_rank(lambda: [*map(shutil.rmtree, [path for each in patterns for path in self.output_dir.glob(each)])])

    def settings(self, name: str, nth_seed: int = 0, **changes: Any) -> TrainingSettings:
        own = {"output_dir": str(self.output_dir / name), "resume_from_checkpoint": AUTO}
        settings = TrainingSettings(**self.given["training"] | own | changes)
        settings.seed += nth_seed * _SEED_STEP
        return settings

    def mask_settings(self, number: int) -> TrainingSettings:
        """Those of a fold's scores: no checkpoint is chosen, and the rate is such that they reach their share."""
        num_rows, epochs = len(self.folds[number]), self.cross.score_num_train_epochs
        # A linear schedule's sum is known; packing would make fewer steps than are counted.
        changes: dict[str, Any] = {"num_train_epochs": epochs, "max_steps": -1, "weight_decay": 0.0, "packing": False}
        changes |= {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "eval_strategy": "no"}
        changes |= {"save_strategy": "epoch", "load_best_model_at_end": False}
        changes |= {"eval_tasks": None, "early_stopping_patience": None}
        settings = self.settings(f"fold-{number}/{MASK}", number // self.cross.num_folds, **changes)
        batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        num_steps = math.ceil(num_rows / batch) * epochs
        total = total_learning_rate(settings, num_steps)
        if total == 0:
            what = f"The scores would make {num_steps} step on a fold of {num_rows} rows in batches of {batch}"
            raise MaskftError(f"{what}, all of it warm-up; lower the batch, or raise --score_num_train_epochs.")
        reach = self.cross.score_reach * self.mask.init_std / self.cross.num_folds
        settings.learning_rate *= reach / total
        return settings

    def carry_over(self, fine_tuned: str) -> None:
        """Put the learned mask over the fine-tuning on all rows, judge it, and save it with its report."""
        folder = self.output_dir / ADAPTER
        settings = self.settings(ADAPTER)
        model = load_model(fine_tuned, self.data.dtype, settings.model_init_kwargs)
        model = get_peft_model(model, copy.deepcopy(self.mask))
        self.vote(model)
        tokenizer = load_tokeniser(fine_tuned, settings).tokenizer
        judging = judge if self.retaining is None else self.retaining.judge
        verdict = judging(model.to(settings.device), self.rows["validation"], settings)
        group = find_group(model, "default")
        report = begin_report("crossfit", fine_tuned, self.given, self.rows, self.found) | {
            "seconds": round(time.perf_counter() - self.started, 1),
            "best": {"metric": "eval_loss", "value": None, "step": None},
            "log_history": [],
            "mask": {"kept_share": group.kept_share(), "num_weights": group.num_weights()},
            "verdict": verdict.to_dict(),
        }
        is_kept = verdict.has_gain or not self.given["require_gain"]
        write_result(folder, report, model, tokenizer, masks=group.masks(), is_kept=is_kept)
        if is_kept:  # where not, the error says it
            logger.info("%s", verdict.sentence)
            logger.info("Wrote %s (the adapter, report.html, report.json).", folder)

    def vote(self, model: PeftModel) -> None:
        """Set the masks to those of the last fold's scores; of several repeats, to what most of them leave out."""
        group, learned = find_group(model, "default"), []
        for repeat in range(1, self.cross.num_repeats + 1):
            load_scores(model, self.scores(repeat * self.cross.num_folds - 1))
            learned.append(group.masks())
        if len(learned) > 1:
            for name, layer in group.layers.items():
                layer.set_mask("default", majority_mask([masks[name] for masks in learned], layer.in_features))

    def finish(self) -> dict[str, Any]:
        """Remove what only a run that goes on needs; returns the report, or NoGainError where a gain is required."""
        self.remove("fold-*", f"{FINE_TUNING}-*")
        report = read_object(self.output_dir / ADAPTER / REPORT, "give another --output_dir")
        if self.given["require_gain"]:
            require_shown_gain(report, self.output_dir / ADAPTER)
        return report
