"""The errors a user of maskft can mend, and words for their messages."""

import difflib
import reprlib
from collections.abc import Sequence

_FEW = 120  # words that a message may list
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 4, 12, 12
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


class MaskftError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed, what to do.

    The command line prints the message alone and exits with `exit_status`; anything else that is raised is
    a defect and keeps its traceback.
    """

    exit_status = 2


class TrainingDivergedError(MaskftError):
    """A training loss became NaN or infinite; the last good checkpoint is left as it was."""


def first_line(error: Exception) -> str:
    """What a library's error says, for the end of one sentence; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def short_repr(value: object) -> str:
    """A foreign value for a message: of any size and depth, and one that cannot be written out too."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"a value of the type {type(value).__name__}"


def damaged_weight(name: str) -> str:
    """The sentence on a weight of a model that nothing was trained of yet."""
    return (
        f"The weight of `{name}` holds NaN or infinite values, so the model is damaged: save or download it again, or "
        "give another one."
    )


def require_flags(arguments: object, *names: str) -> None:
    """Raise MaskftError for the first of these settings that was not given."""
    for name in names:
        if not getattr(arguments, name):
            raise MaskftError(f"--{name} is missing; give it as a flag or in the file of --config.")


class NoGainError(MaskftError):
    """A mask did not pass the test of `--require_gain`; the report says why, and no adapter was written."""

    exit_status = 3


class PreemptedError(MaskftError):
    """SIGTERM ended a run after it had saved a checkpoint; the status is that of the signal, so launchers retry."""

    exit_status = 143


def nearest(name: str, known: Sequence[str]) -> str:
    """A clause that names the known words nearest to `name`, or all of them where they are few.

    First come those that `name` is short for: it has the initials of their parts, or is how they begin.
    """
    whole = [word for word in known if name and "".join(part[:1] for part in word.split("_")) == name]
    whole += [word for word in known if name and word.startswith(name)]
    near = list(dict.fromkeys(whole + difflib.get_close_matches(name, known, n=3, cutoff=0.5)))[:3]
    if near:
        return f" (nearest: {', '.join(near)})"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= _FEW else ""
