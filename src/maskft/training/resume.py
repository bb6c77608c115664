"""Which checkpoint a run goes on from."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from maskft.errors import MaskftError

AUTO = "auto"


def holds_no_result(output_dir: Path) -> bool:
    """Whether a folder is absent or holds only what a run leaves before its first checkpoint is complete."""
    return not output_dir.exists() or (
        output_dir.is_dir()
        # TRL's trainer writes a model card before its checkpoints.
        and all(path.name.startswith("checkpoint-") or path.name == "README.md" for path in output_dir.iterdir())
    )


def remove_run(output_dir: Path) -> None:
    """Remove what an earlier run left that could be taken for a later one's: checkpoints, an adapter, reports."""
    for pattern in ("checkpoint-*", "adapter_*", "report.*"):
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_complete(checkpoint: Path) -> bool:
    """Whether a `checkpoint-N` folder was written to its end.

    Transformers writes `trainer_state.json` after everything else; a run that was killed before that leaves none, or
    half of one. Weights are read up to their header, which tells a file that was cut.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete `checkpoint-N` in a run's folder, by N."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and is_complete(path)
    ]
    return [path for _, path in sorted(numbered)]


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The last of them, or None."""
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the newest complete one for true/auto.

    Returns:
        None where nothing is to be resumed: with "auto", so that a launcher can repeat one command, also where the
        folder is absent or holds only what a killed run leaves before its first checkpoint is complete.

    Raises:
        MaskftError: the named folder is no complete checkpoint, or the run has none, or its folder is a file.
    """
    if resume_from_checkpoint in (None, False, "false", "False"):
        return None
    if resume_from_checkpoint in (True, "true", "True", AUTO, "last"):
        if Path(output_dir).is_file():
            raise MaskftError(f"The output folder {output_dir} is a file; give another --output_dir.")
        found = newest_complete_checkpoint(output_dir)
        if found is None and resume_from_checkpoint == AUTO and holds_no_result(Path(output_dir)):
            return None
        if found is None:
            raise MaskftError(f"{output_dir} holds no complete checkpoint to resume from; start without resuming.")
        return found
    path = Path(str(resume_from_checkpoint))
    if not is_complete(path):
        raise MaskftError(
            f"{path} is no complete checkpoint; give a checkpoint-N folder, or 'auto' for the newest one."
        )
    return path
