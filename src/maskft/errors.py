"""The errors a user of maskft can mend."""


class MaskftError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed, what to do.

    The command line prints the message alone and exits with status 2; anything else that is raised is
    a defect and keeps its traceback.
    """


class TrainingDivergedError(MaskftError):
    """A training loss became NaN or infinite; the last good checkpoint is left as it was."""
