"""The runs of a study: one folder each, and what each needs first."""

from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from maskft.errors import MaskftError
from maskft.storage.json_text import plain, read_object
from maskft_lab.study.config import CONTROLS, MASKED, Domain, Method, StudyConfig

RESULT, FAILED, CONFIG = "result.json", "failed.json", "config.json"
_STAGES = ("base", "fft", *MASKED, *CONTROLS, "lora", "fft_continued")


@dataclass(frozen=True, eq=False)
class Run:
    """One method on one model, domain and seed.

    Attributes:
        folder: where it writes; `result.json` appears there last, so a folder that has it is finished.
        study: what it is a part of.
        model: its name there.
        needs: folders of the runs it starts from.
    """

    folder: Path
    study: StudyConfig
    model: str
    domain: Domain
    method: Method
    seed: int
    needs: tuple[Path, ...]

    @property
    def label(self) -> str:
        """Its name in messages, which is where it lies in the study's folder."""
        return "/".join(self.folder.parts[-4:])

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return (self.folder / RESULT).exists()

    def describe(self) -> dict[str, Any]:
        """What decides its result, as plain JSON: a finished run is the same run only if this is the same."""
        model = {"name": self.model, "model_name_or_path": self.study.models[self.model]}
        described = {"model": model, "domain": asdict(self.domain), "method": asdict(self.method)}
        described |= {key: getattr(self.study, key) for key in ("dtype", "bf16", "curves")}
        return plain(described | {"seed": self.seed, "mask": self.study.matched_mask(self.method)})


def plan_runs(study: StudyConfig, output_dir: Path) -> list[Run]:
    """All runs of a study in an order in which each comes after what it needs; the base model is scored once."""
    runs = []
    for model, domain, seed in product(study.models, study.domains, study.seeds):
        folder = output_dir / model / domain.name / f"seed{seed}"
        for method in sorted(study.methods.values(), key=lambda method: _STAGES.index(method.kind)):
            if method.kind == "base" and seed != study.seeds[0]:
                continue
            needs = [] if method.kind in ("base", "fft") else [folder / "fft"]
            if method.kind in CONTROLS:
                needs.append(folder / method.of)
            if method.kind == "crossfit":
                fft = study.methods["fft"]
                method = replace(method, training=fft.training | method.training, train_share=fft.train_share)
            runs.append(Run(folder / method.name, study, model, domain, method, seed, tuple(needs)))
    return runs


def check_unchanged(runs: list[Run]) -> None:
    """Refuse a folder whose runs were made from other settings.

    Raises:
        MaskftError: a run's folder holds another run.
    """
    for run in runs:
        path = run.folder / CONFIG
        if path.exists() and read_object(path, "delete the folder it lies in") != run.describe():
            raise MaskftError(
                f"{run.folder} holds a run with other settings than the study now has; restore them, give another "
                "--output_dir, or delete that folder."
            )
