"""The folder that a command of hours writes to, tried out before its work begins."""

import tempfile
from pathlib import Path

from maskft.checkpoints.files import disk_errors
from maskft.errors import MaskftError


def make_output(output: Path) -> None:
    """Make the folder where it is absent, and write a file there that is gone at once.

    Raises:
        MaskftError: a file is in its place or in that of a folder above it, or the disk refuses.
    """
    with disk_errors(f"write to the output folder {output}"):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise MaskftError(
                f"The output folder {output} cannot be made, for a file is in its place or in that of a folder above "
                "it; give another --output_dir."
            ) from error
        with tempfile.TemporaryFile(dir=output):
            pass
