"""The runs of a study: one folder each, what each needs first, and what all of it will cost."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskft.data.inputs import check_inputs
from maskft.errors import MaskftError
from maskft.training.crossfit import CrossFitArguments
from maskft_lab.study.config import CONTROLS, MASKED, TRAINED, Domain, Method, StudyConfig, StudyModel

RESULT = "result.json"
FAILED = "failed.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Run:
    """One method on one model, domain and seed.

    Attributes:
        folder: where it writes; `result.json` appears there last, so a folder that has it is finished.
        needs: folders of the runs it starts from.
        mask: settings of the learned mask that it is matched to in size, for LoRA without a rank.
        max_length: tokens after which a row is cut in scoring; what trains has it among its settings too.
    """

    folder: Path
    model: StudyModel
    domain: Domain
    method: Method
    seed: int
    dtype: str
    needs: tuple[Path, ...] = ()
    mask: dict[str, Any] | None = None
    bf16: bool = False
    curves: bool = True
    max_length: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return (self.folder / RESULT).exists()

    def describe(self) -> dict[str, Any]:
        """What decides its result, as plain JSON: a finished run is the same run only if this is the same."""
        described: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "model": asdict(self.model),
                    "domain": asdict(self.domain),
                    "method": asdict(self.method),
                    "seed": self.seed,
                    "dtype": self.dtype,
                    "mask": self.mask,
                }
                | ({"bf16": True} if self.bf16 else {})
                | ({} if self.curves else {"curves": False})
            )
        )
        return described


def plan_runs(study: StudyConfig, output_dir: Path) -> list[Run]:
    """All runs of a study in an order in which each comes after what it needs; the base model is scored once."""
    runs = []
    for model in study.models:
        for domain in study.domains:
            place = output_dir / model.name / domain.name
            for seed in study.seeds:
                for method in sorted(study.methods, key=_stage):
                    if method.kind == "base" and seed != study.seeds[0]:
                        continue
                    runs.append(_run(study, place, model, domain, method, seed))
    return runs


def check_unchanged(runs: list[Run]) -> None:
    """Refuse a folder whose runs were made from other settings.

    Raises:
        MaskftError: a run's folder holds another run.
    """
    for run in runs:
        path = run.folder / CONFIG
        if path.exists() and _set(json.loads(path.read_text())) != _set(run.describe()):
            raise MaskftError(
                f"{run.folder} holds a run with other settings than the study now has; restore them, give another "
                "--output_dir, or delete that folder."
            )


def check_same_inputs(runs: list[Run], inputs: dict[tuple[str, str], dict[str, str]]) -> None:
    """Refuse a folder whose runs were begun with other rows or weights.

    Args:
        inputs: hashes as :func:`maskft.data.inputs.hash_inputs` gives them, by model and domain.

    Raises:
        MaskftError: a run's folder holds other hashes.
    """
    for run in runs:
        check_inputs(run.folder, inputs[run.model.name, run.domain.name])


def _set(settings: dict[str, Any]) -> dict[str, Any]:
    # A run made before a setting existed is the run that leaves it unset.
    return {k: _set(v) if isinstance(v, dict) else v for k, v in settings.items() if v is not None and v != {}}


def _stage(method: Method) -> int:
    order = ("base", "fft", *MASKED, *CONTROLS, "lora", "fft_continued")
    return order.index(method.kind)


def _run(study: StudyConfig, place: Path, model: StudyModel, domain: Domain, method: Method, seed: int) -> Run:
    def folder(name: str) -> Path:
        return place / f"seed{seed}" / name

    needs: tuple[Path, ...] = ()
    if method.kind not in ("base", "fft"):
        needs = (folder("fft"),)
    if method.kind in CONTROLS:
        needs = (*needs, folder(method.of))
    if method.kind == "crossfit":
        fft = study.method("fft")
        method = replace(method, training=fft.training | method.training, train_share=fft.train_share)
    mask = None
    if method.kind == "lora" and "r" not in method.lora:
        mask = next(m.mask for m in study.methods if m.kind == "mft")
    return Run(
        folder(method.name),
        model,
        domain,
        method,
        seed,
        study.dtype,
        needs,
        mask,
        study.bf16,
        study.curves,
        study.max_length,
    )


@dataclass(frozen=True)
class Cost:
    """Expected time in seconds and disk in bytes of one run; `is_measured` where like runs here told the time."""

    seconds: float
    num_bytes: int
    is_measured: bool


def expected_cost(
    run: Run, runs: list[Run], *, num_weights: int, num_train_tokens: int, num_test_tokens: int, flops_per_second: float
) -> Cost:
    """Time and disk of a run.

    The time is that of finished runs of its method on its model and domain where there are any; else
    6 operations a weight and trained token, and 2 a scored one (Kaplan et al., arXiv 2001.08361, section 2.1), at the
    measured rate of this machine.

    Args:
        run: the run in question.
        runs: all runs of the study.
        num_weights: weights of the model.
        num_train_tokens: tokens of one pass over the training rows.
        num_test_tokens: tokens of one pass over the test rows.
        flops_per_second: what the machine does in matrix products.
    """
    itemsize = 2 if run.dtype == "bfloat16" else 4
    kept = {"fft": num_weights * itemsize} | dict.fromkeys(MASKED, num_weights // 8)
    like = [
        json.loads((other.folder / RESULT).read_text())["seconds"]
        for other in runs
        if other.is_finished and (other.method, other.model, other.domain) == (run.method, run.model, run.domain)
    ]
    if like:
        return Cost(sum(like) / len(like), kept.get(run.method.kind, 0), True)
    operations = 4.0 * num_weights * num_test_tokens
    epochs = float(run.method.training.get("num_train_epochs", 3))
    if run.method.kind == "crossfit":
        cross = CrossFitArguments(**run.method.crossfit)
        epochs = cross.num_repeats * (epochs * (cross.num_folds - 1) + cross.score_num_train_epochs)
    if run.method.kind in (*TRAINED, "crossfit"):
        operations += 6.0 * num_weights * num_train_tokens * run.method.train_share * epochs
    return Cost(operations / flops_per_second, kept.get(run.method.kind, 0), False)
