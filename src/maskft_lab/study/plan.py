"""The runs of a study: one folder each, what each needs first, and what all of it will cost."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.training.crossfit import CrossFitArguments
from maskft_lab.study.config import CONTROLS, MASKED, TRAINED, Domain, Method, StudyConfig, StudyModel

RESULT = "result.json"
FAILED = "failed.json"
CONFIG = "config.json"
_STAGES = ("base", "fft", *MASKED, *CONTROLS, "lora", "fft_continued")


@dataclass(frozen=True, eq=False)
class Run:
    """One method on one model, domain and seed.

    Attributes:
        folder: where it writes; `result.json` appears there last, so a folder that has it is finished.
        study: what it is a part of.
        needs: folders of the runs it starts from.
        mask: settings of the learned mask that it is matched to in size, for LoRA without a rank.
    """

    folder: Path
    study: StudyConfig
    model: StudyModel
    domain: Domain
    method: Method
    seed: int
    needs: tuple[Path, ...] = ()
    mask: dict[str, Any] | None = None

    @cached_property
    def label(self) -> str:
        """Its name in messages, which is where it lies in the study's folder."""
        return "/".join(self.folder.parts[-4:])

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return (self.folder / RESULT).exists()

    def result(self) -> dict[str, Any]:
        """What it came to."""
        content: dict[str, Any] = json.loads((self.folder / RESULT).read_text())
        return content

    def describe(self) -> dict[str, Any]:
        """What decides its result, as plain JSON: a finished run is the same run only if this is the same."""
        described = {
            "model": asdict(self.model),
            "domain": asdict(self.domain),
            "method": asdict(self.method),
            "seed": self.seed,
            "dtype": self.study.dtype,
            "mask": self.mask,
            "bf16": self.study.bf16 or None,
            "curves": None if self.study.curves else False,
        }
        plain: dict[str, Any] = json.loads(json.dumps(described))
        return plain


def plan_runs(study: StudyConfig, output_dir: Path) -> list[Run]:
    """All runs of a study in an order in which each comes after what it needs; the base model is scored once."""
    return [
        _run(study, output_dir / model.name / domain.name / f"seed{seed}", model, domain, method, seed)
        for model in study.models
        for domain in study.domains
        for seed in study.seeds
        for method in sorted(study.methods, key=lambda method: _STAGES.index(method.kind))
        if method.kind != "base" or seed == study.seeds[0]
    ]


def _run(study: StudyConfig, folder: Path, model: StudyModel, domain: Domain, method: Method, seed: int) -> Run:
    needs = [] if method.kind in ("base", "fft") else [folder / "fft"]
    if method.kind in CONTROLS:
        needs.append(folder / method.of)
    if method.kind == "crossfit":
        fft = study.method("fft")
        method = replace(method, training=fft.training | method.training, train_share=fft.train_share)
    mask = None
    if method.kind == "lora" and "r" not in method.lora:
        mask = next(m.mask for m in study.methods if m.kind == "mft")
    return Run(folder / method.name, study, model, domain, method, seed, tuple(needs), mask)


def check_unchanged(runs: list[Run]) -> None:
    """Refuse a folder whose runs were made from other settings.

    Raises:
        MaskftError: a run's folder holds another run.
    """
    for run in runs:
        path = run.folder / CONFIG
        if path.exists() and _given(json.loads(path.read_text())) != _given(run.describe()):
            raise MaskftError(
                f"{run.folder} holds a run with other settings than the study now has; restore them, give another "
                "--output_dir, or delete that folder."
            )


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    # A run made before a setting existed is the run that leaves it unset.
    return {k: _given(v) if isinstance(v, dict) else v for k, v in settings.items() if v is not None and v != {}}


@dataclass(frozen=True)
class Size:
    """Weights of a model, and tokens of one pass over the training and the test rows of a domain."""

    num_weights: int
    num_train_tokens: int
    num_test_tokens: int


@dataclass(frozen=True)
class Cost:
    """Expected time in seconds and disk in bytes of one run; `is_measured` where like runs here told the time."""

    seconds: float
    num_bytes: int
    is_measured: bool


def expected_cost(run: Run, runs: list[Run], size: Size, flops_per_second: float) -> Cost:
    """Time and disk of a run.

    The time is that of finished runs of its method on its model and domain where there are any; else
    6 operations a weight and trained token, and 2 a scored one (Kaplan et al., arXiv 2001.08361, section 2.1), at the
    measured rate of this machine.
    """
    method = run.method
    kept = {"fft": size.num_weights * (2 if run.study.dtype == "bfloat16" else 4)}
    num_bytes = (kept | dict.fromkeys(MASKED, size.num_weights // 8)).get(method.kind, 0)
    what = (method, run.model, run.domain)
    like = [r.result()["seconds"] for r in runs if r.is_finished and (r.method, r.model, r.domain) == what]
    if like:
        return Cost(sum(like) / len(like), num_bytes, True)
    epochs = float(method.training.get("num_train_epochs", 3)) if method.kind in (*TRAINED, "crossfit") else 0.0
    if method.kind == "crossfit":
        cross = CrossFitArguments(**method.crossfit)
        epochs = cross.num_repeats * (epochs * (cross.num_folds - 1) + cross.score_num_train_epochs)
    per_weight = 4.0 * size.num_test_tokens + 6.0 * size.num_train_tokens * method.train_share * epochs
    return Cost(size.num_weights * per_weight / flops_per_second, num_bytes, False)
