"""The settings of a mask, as a PEFT configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from peft.config import PeftConfig
from pydantic import Field

from maskft.errors import MaskftError
from maskft.masks import ScoreTransform, Selection
from maskft.storage.fingerprint import fingerprint_dtype
from maskft.tuner.registration import MASKFT
from maskft.values import check_value

Reference = Literal["zero", "pretrained"]
InitScores = Literal["normal", "keep_all", "uniform", "magnitude"]
Index = Annotated[int, Field(ge=0)]

PRESETS: dict[str, dict[str, Any]] = {
    # The fields' own defaults are the published method.
    "paper": {},
    "recommended": (recommended := {"selection": "threshold", "init_scores": "uniform", "reference": "pretrained"}),
    # Rewards are noise for most weights, and Adam moves each score by the learning rate whatever its gradient is worth.
    "preferences": recommended | {"max_flips": 1e-3},
    # Few are deleted: all wait at one height, and of those that reach the border a step takes the furthest.
    "bmt": {"target_modules": ["gate_proj"], "selection": "threshold", "init_scores": "keep_all", "max_flips": 1e-5},
}
"""Settings by name, for :meth:`MaskConfig.preset`."""

# What PEFT's own fields may hold, which it does not check, and choices, which the parser of flags takes for texts.
_HINTS: dict[str, Any] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), str | None),
    "auto_mapping": dict[str, Any] | None,
    "inference_mode": bool,
    "selection": Selection,
    "init_scores": InitScores,
    "score_transform": ScoreTransform | None,
    "reference": Reference,
}
# Scores are float32. Within these bounds no score is rounded to zero or to infinity, the rarest draws included.
_SMALLEST, _LARGEST = 1e-37, 1e37


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MaskConfig(PeftConfig):
    """Settings of Mask Fine-Tuning; the defaults give the published method (arXiv 2503.22764, section 4.1).

    The command line's flags are made of these fields, and show their help. `selection` says what is kept: "topk" the
    share `density` of each tensor, "global_topk" that share of all masked tensors together, "threshold" all whose score
    reaches `threshold`, so that the share is free. How scores start: :func:`maskft.tuner.layer.initial_scores`.

    Raises:
        MaskftError: a value outside what its field allows.
    """

    target_modules: list[str] | str | None = _setting(
        None, "Names of the modules to mask. Default: every linear layer of attention and MLP."
    )
    exclude_modules: list[str] | str | None = _setting(None, "Names of modules to leave as they are.")
    layers_to_transform: list[Index] | Index | None = _setting(
        None, "Indices of the layers to mask, from 0. Default: all."
    )
    layers_pattern: list[str] | str | None = _setting(
        None, "Name of the list of layers where it is not the first numbered one."
    )
    density: float = _setting(0.9, "Share of weights kept, in (0, 1]. Default: 0.9.")
    selection: str = _setting("topk", "topk (the paper's), global_topk, or threshold (recommended).")
    threshold: float = _setting(0.0, "Lowest score kept under --selection threshold. Default: 0.")
    init_scores: str = _setting("normal", "normal (the paper's), keep_all, uniform or magnitude.")
    init_std: float = _setting(0.02, "Scale of the scores at the start. Default: 0.02.")
    score_transform: str | None = _setting(None, "abs or none.")
    reference: str = _setting(
        "zero", "Value of a weight left out: zero (the paper's), or pretrained, its value before fine-tuning."
    )
    reference_model_name_or_path: str | None = _setting(
        None, "The model before fine-tuning, for --reference pretrained."
    )
    reference_fingerprint: str | None = _setting(
        None, "Hash of that model's weights in the masked layers; written on save."
    )
    max_flips: float = _setting(
        1.0, "Largest share of the weights that may flip at a step, under --selection threshold. Default: 1, any."
    )
    seed: int = _setting(0, "Seed of the scores drawn at the start.")
    base_fingerprint: str | None = _setting(None, "Hash of the masked weights of the base model; written on save.")
    mask_digest: str | None = _setting(None, "Hash of the masks in the adapter's file; written on save.")
    save_scores: bool = _setting(False, "Save the float32 scores beside the masks, so that training can resume.")
    ignore_fingerprint: bool = _setting(False, "Load onto a base model whose masked weights differ. Never saved.")

    def __post_init__(self) -> None:
        for name, hint in (MaskConfig.__annotations__ | _HINTS).items():
            setattr(self, name, check_value(name, getattr(self, name), hint))
        super().__post_init__()
        self.peft_type = MASKFT
        self._remember_file()
        if self.score_transform is None:
            self.score_transform = "none" if self.selection == "threshold" else "abs"
        for is_broken, message in _RULES:
            if is_broken(self):
                raise MaskftError(message.format(c=self))

    def _remember_file(self) -> None:
        """Keep what a file says of its base model and its masks; saving writes new values into the fields."""
        self.file_fingerprint = self.base_fingerprint
        self.file_reference_fingerprint = self.reference_fingerprint
        self.file_digest = self.mask_digest
        for value in (self.base_fingerprint, self.reference_fingerprint, self.mask_digest):
            if value is not None:
                fingerprint_dtype(value)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> "MaskConfig":
        """The settings of a preset, changed by those that are given.

        Args:
            name: "paper" is the published method (arXiv 2503.22764, section 4.1); "recommended" is what validation
                chose in our own studies, all is kept at the start and the share left out is free; "preferences", for
                DPO, GRPO and the like, has at most 0.1 % of the weights flip at a step beside that;
                "bmt", after Bit-Mask Tuning (OpenReview JnfolztAV3), zeroes few weights, of `gate_proj` alone.
            settings: fields of the configuration; they win.

        Raises:
            MaskftError: no such preset, or a value outside what its field allows.
        """
        if name not in PRESETS:
            raise MaskftError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
        return cls(**PRESETS[name] | settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings that a file keeps; `ignore_fingerprint` is a choice of one load and not among them."""
        settings: dict[str, Any] = super().to_dict() | {"save_scores": False}
        del settings["ignore_fingerprint"]
        return settings

    def selection_settings(self) -> dict[str, Any]:
        """The keyword arguments of :func:`maskft.masks.select`."""
        return {
            "selection": self.selection,
            "density": self.density,
            "threshold": self.threshold,
            "score_transform": self.score_transform,
        }


# What breaks a rule, and the message, in which `c` is the configuration.
_RULES: tuple[tuple[Callable[[MaskConfig], bool], str], ...] = (
    (
        lambda c: c.layers_to_transform == [],
        "`layers_to_transform` is empty; name layers, or leave it out to mask all of them.",
    ),
    (
        lambda c: bool(c.layers_pattern) and c.layers_to_transform is None,
        "`layers_pattern={c.layers_pattern!r}` says where the layers of `layers_to_transform` are, and that is not "
        "given; give it, or leave both out.",
    ),
    (
        lambda c: c.layers_to_transform is not None and isinstance(c.target_modules, str),
        "`layers_to_transform={c.layers_to_transform}` has no effect when `target_modules` is a regular expression "
        "({c.target_modules!r}); name the modules as a list or put the layers into the pattern.",
    ),
    (
        lambda c: c.task_type in ("TOKEN_CLS", "QUESTION_ANS"),
        "task_type={c.task_type!r} makes PEFT look for a head to train, and a mask leaves every other weight as it is; "
        "leave `task_type` out, and the head is the model's own.",
    ),
    (
        lambda c: c.reference == "pretrained" and c.reference_model_name_or_path is None,
        "`reference` is 'pretrained' and `reference_model_name_or_path` is None; this reference, which the preset "
        "'recommended' has, needs the model before fine-tuning: give it, or set `reference` to 'zero'.",
    ),
    (
        lambda c: c.reference == "zero" and c.reference_model_name_or_path is not None,
        "`reference_model_name_or_path` is {c.reference_model_name_or_path!r}, and reference='zero' takes none; leave "
        "it out, or set `reference` to 'pretrained'.",
    ),
    (
        lambda c: not 0 < c.density <= 1,
        "`density` must be in (0, 1], got {c.density!r}; it is the share of weights kept (0.9 keeps 90 %).",
    ),
    (
        lambda c: not 0 < c.max_flips <= 1 or (c.max_flips < 1 and c.selection != "threshold"),
        "`max_flips` must be in (0, 1], the share of weights that may flip at a step, and below 1 it needs "
        "selection='threshold'; got {c.max_flips!r} with selection={c.selection!r}.",
    ),
    (
        lambda c: not _SMALLEST <= c.init_std <= _LARGEST,
        f"`init_std` must be a positive number from {_SMALLEST} to {_LARGEST}, got {{c.init_std!r}}; scores are "
        "float32.",
    ),
    (
        lambda c: not abs(c.threshold) <= _LARGEST,
        f"`threshold` must be a finite number of a size up to {_LARGEST}, got {{c.threshold!r}}; scores are float32.",
    ),
    (
        lambda c: c.init_scores == "keep_all" and c.selection != "threshold" and c.density < 1,
        "`init_scores='keep_all'` starts all scores equal, so selection={c.selection!r} at density {c.density} would "
        "drop weights by position; use selection='threshold'.",
    ),
    (
        lambda c: c.selection == "threshold" and c.score_transform == "abs" and c.threshold < _SMALLEST,
        f"selection='threshold' with score_transform='abs' needs a `threshold` above 0, from {_SMALLEST}, got "
        "{c.threshold}: every size reaches it; raise it or use score_transform='none'.",
    ),
)
