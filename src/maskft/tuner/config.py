"""The settings of a mask, as a PEFT configuration."""

import operator
import os
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

from peft.config import PeftConfig

from maskft.errors import MaskftError, nearest
from maskft.masks import SCORE_TRANSFORMS, SELECTIONS, ScoreTransform, Selection
from maskft.storage.fingerprint import fingerprint_dtype
from maskft.tuner.registration import MASKFT

Reference = Literal["zero", "pretrained"]
InitScores = Literal["normal", "keep_all", "uniform", "magnitude"]
INIT_SCORES: tuple[str, ...] = get_args(InitScores)
REFERENCES: tuple[str, ...] = get_args(Reference)

PRESETS: dict[str, dict[str, Any]] = {
    # The fields' own defaults are the published method.
    "paper": {},
    "recommended": {"selection": "threshold", "init_scores": "uniform", "reference": "pretrained"},
}
"""Settings by name, for :meth:`MaskConfig.preset`."""

# Scores are float32. Within these bounds no score is rounded to zero or to infinity, the rarest draws included.
_SMALLEST, _LARGEST = 1e-37, 1e37


@dataclass
class MaskConfig(PeftConfig):
    """Settings of Mask Fine-Tuning; the defaults give the published method (arXiv 2503.22764, section 4.1).

    Raises:
        MaskftError: a value outside what its field allows.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regular expression) of the modules to mask, as in LoraConfig. "
            "Default: every linear layer of attention and MLP."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of modules to leave as they are."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer layers to mask, from 0. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers where it is not the first numbered one."}
    )
    density: float = field(default=0.9, metadata={"help": "Share of weights kept, in (0, 1]."})
    selection: str = field(
        default="topk",
        metadata={
            "help": "Which weights are kept: 'topk' the share `density` of each tensor, 'global_topk' that share of "
            "all masked tensors together, 'threshold' all whose score reaches `threshold` (the share is free)."
        },
    )
    threshold: float = field(default=0.0, metadata={"help": "Lowest score kept under selection='threshold'."})
    init_scores: str = field(
        default="normal",
        metadata={
            "help": "Scores at the start: 'normal' draws from N(0, init_std) (the paper's), 'keep_all' puts every "
            "score init_std above the threshold, 'uniform' spreads them evenly over the init_std above it (weights "
            "then leave in proportion to how far their scores are pushed, not all at once), 'magnitude' ranks by |W| "
            "(or the size of its change, for reference='pretrained'), scaled to a root mean square of init_std."
        },
    )
    init_std: float = field(default=0.02, metadata={"help": "Scale of the scores at the start; above 0."})
    score_transform: str | None = field(
        default=None,
        metadata={
            "help": "What is ranked: 'abs' the size |S| of a score (the paper's), 'none' the score itself. "
            "Default: 'abs', and 'none' under selection='threshold'."
        },
    )
    reference: str = field(
        default="zero",
        metadata={
            "help": "What stands in the place of a weight that is left out: 'zero' (the paper's), or 'pretrained', its "
            "value before fine-tuning, so that the mask chooses among the changes that fine-tuning made."
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before fine-tuning, for reference='pretrained'."}
    )
    reference_fingerprint: str | None = field(
        default=None, metadata={"help": "Hash of the weights of that model in the masked places; written on save."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the scores drawn at the start."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Not supported: a mask leaves every other weight as it is."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Hash of the masked weights of the base model; written on save."}
    )
    mask_digest: str | None = field(
        default=None, metadata={"help": "Hash of the masks in the adapter's file; written on save."}
    )
    save_scores: bool = field(
        default=False,
        metadata={"help": "Save the float32 scores beside the masks, so that training can resume."},
    )
    ignore_fingerprint: bool = field(
        default=False, metadata={"help": "Load onto a base model whose masked weights differ. Never saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MASKFT
        # What a file says of its base model and its masks; saving writes new values into the two fields.
        self.file_fingerprint = self.base_fingerprint
        self.file_reference_fingerprint = self.reference_fingerprint
        self.file_digest = self.mask_digest
        for value in (self.base_fingerprint, self.reference_fingerprint, self.mask_digest):
            if value is not None:
                fingerprint_dtype(value)
        self._make_plain()
        if self.layers_to_transform == []:
            raise MaskftError("`layers_to_transform` is empty; name layers, or leave it out to mask all of them.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise MaskftError(
                f"`layers_pattern={self.layers_pattern!r}` says where the layers of `layers_to_transform` are, and "
                "that is not given; give it, or leave both out."
            )
        if self.score_transform is None:
            self.score_transform = "none" if self.selection == "threshold" else "abs"
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("init_scores", self.init_scores, INIT_SCORES)
        _check_choice("score_transform", self.score_transform, SCORE_TRANSFORMS)
        _check_choice("reference", self.reference, REFERENCES)
        if self.reference == "pretrained" and self.reference_model_name_or_path is None:
            raise MaskftError(
                "`reference` is 'pretrained' and `reference_model_name_or_path` is None; this reference, which the "
                "preset 'recommended' has, needs the model before fine-tuning: give it, or set `reference` to 'zero'."
            )
        if self.reference == "zero" and self.reference_model_name_or_path is not None:
            raise MaskftError(
                f"`reference_model_name_or_path` is {self.reference_model_name_or_path!r}, and reference='zero' takes "
                "none; leave it out, or set `reference` to 'pretrained'."
            )
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise MaskftError(
                f"`density` must be in (0, 1], got {self.density!r}; it is the share of weights kept (0.9 keeps 90 %)."
            )
        if not _is_number(self.init_std) or not _SMALLEST <= self.init_std <= _LARGEST:
            raise MaskftError(
                f"`init_std` must be a positive number from {_SMALLEST} to {_LARGEST}, got {self.init_std!r}; scores "
                "are float32."
            )
        if not _is_number(self.threshold) or not abs(self.threshold) <= _LARGEST:
            raise MaskftError(
                f"`threshold` must be a finite number of a size up to {_LARGEST}, got {self.threshold!r}; scores are "
                "float32."
            )
        if self.init_scores == "keep_all" and self.selection != "threshold" and self.density < 1:
            raise MaskftError(
                f"`init_scores='keep_all'` starts all scores equal, so selection={self.selection!r} at density "
                f"{self.density} would drop weights by position; use selection='threshold'."
            )
        if self.selection == "threshold" and self.score_transform == "abs" and self.threshold < _SMALLEST:
            raise MaskftError(
                f"selection='threshold' with score_transform='abs' needs a `threshold` above 0, from {_SMALLEST}, got "
                f"{self.threshold}: every size reaches it; raise it or use score_transform='none'."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise MaskftError(
                f"`layers_to_transform={self.layers_to_transform}` has no effect when `target_modules` is a regular "
                f"expression ({self.target_modules!r}); name the modules as a list or put the layers into the pattern."
            )
        if self.modules_to_save:
            raise MaskftError(
                f"`modules_to_save={self.modules_to_save}` is not supported: Mask Fine-Tuning changes no weight; "
                "leave it out."
            )

    def _make_plain(self) -> None:
        """Turn what JSON cannot write (sets, ranges, NumPy's integers, paths) into lists, integers and strings."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            setattr(self, name, _converted(name, getattr(self, name), _strings, "a string or a list of strings"))
        allowed = "the index of a layer or a list of them, counted from 0"
        self.layers_to_transform = _converted("layers_to_transform", self.layers_to_transform, _indices, allowed)
        self.seed = _converted("seed", self.seed, _integer, "an integer")
        for name in ("base_model_name_or_path", "reference_model_name_or_path"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> "MaskConfig":
        """The settings of a preset, changed by those that are given.

        Args:
            name: "paper" is the published method (arXiv 2503.22764, section 4.1); "recommended" is what validation
                chose in our own studies: every weight is kept at the start, and the share left out is free.
            settings: fields of the configuration; they win.

        Raises:
            MaskftError: no such preset, or a value outside what its field allows.
        """
        _check_choice("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name] | settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings that a file keeps; `ignore_fingerprint` is a choice of one load and not among them."""
        settings: dict[str, Any] = super().to_dict()
        del settings["ignore_fingerprint"]
        settings["save_scores"] = False
        return settings

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys that a configuration does not have; PEFT calls this on what a file holds.

        Raises:
            MaskftError: an unknown key, with the nearest known ones.
        """
        known = [f.name for f in fields(cls)]
        for key in kwargs:
            if key not in known:
                raise MaskftError(f"Unknown mask setting {key!r}{nearest(key, known)}; remove it or correct its name.")
        return kwargs

    def selection_settings(self) -> dict[str, Any]:
        """The keyword arguments of :func:`maskft.masks.select`."""
        return {
            "selection": cast(Selection, self.selection),
            "density": self.density,
            "threshold": self.threshold,
            "score_transform": cast(ScoreTransform, self.score_transform),
        }


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise MaskftError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _converted(name: str, value: object, convert: Callable[[Any], Any], allowed: str) -> Any:
    try:
        return convert(value)
    except TypeError as error:
        raise MaskftError(f"`{name}` must be {allowed}, got {value!r}.") from error


def _strings(value: Any) -> Any:
    return _one_or_list(value, _string)


def _indices(value: Any) -> Any:
    return _one_or_list(value, _index)


def _one_or_list(value: Any, convert: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        return convert(value)
    items = [convert(item) for item in value]
    return sorted(items) if isinstance(value, Set) else items


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _index(value: Any) -> int:
    index = _integer(value)
    if index < 0:
        raise TypeError
    return index


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
