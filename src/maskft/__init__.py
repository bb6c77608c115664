"""Mask Fine-Tuning (arXiv 2503.22764) as a PEFT method: importing this module registers it with PEFT.

PyTorch and PEFT take seconds to import, so each public name is imported when it is first used, and the method is
registered when PEFT itself is imported, by whomever: `maskft --help` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from maskft.errors import MaskftError as MaskftError

__version__ = "0.2.0"

if TYPE_CHECKING:
    from maskft.training.callback import MaskCallback as MaskCallback
    from maskft.tuner import MaskConfig as MaskConfig
    from maskft.tuner import MaskModel as MaskModel
    from maskft.tuner import find_group as find_group
    from maskft.tuner import step_in_backward as step_in_backward

_PUBLIC = dict.fromkeys(("MaskConfig", "MaskModel", "find_group", "step_in_backward"), "maskft.tuner")
_PUBLIC["MaskCallback"] = "maskft.training.callback"

register_post_import_hook(lambda _: import_module("maskft.tuner"), "peft")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
