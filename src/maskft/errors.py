"""The errors a user of maskft can mend."""


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


class LostRankError(MaskftError):
    """Another process of the run has stopped or is gone; the status is EX_TEMPFAIL, so launchers retry."""

    exit_status = 75
