"""Mask Fine-Tuning (arXiv 2503.22764) as a PEFT method: importing this module registers it with PEFT."""

from typing import TYPE_CHECKING, Any

from maskft.errors import MaskftError as MaskftError
from maskft.tuner import MaskConfig as MaskConfig
from maskft.tuner import MaskModel as MaskModel
from maskft.tuner import find_group as find_group
from maskft.tuner import step_in_backward as step_in_backward

__version__ = "0.1.0"

if TYPE_CHECKING:
    from maskft.training.callback import MaskCallback as MaskCallback


def __getattr__(name: str) -> Any:
    if name == "MaskCallback":  # with a second of imports that a model alone does not need
        from maskft.training.callback import MaskCallback

        return MaskCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
