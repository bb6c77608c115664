"""Which checkpoint a run goes on from: complete ones alone, and none where a launcher's first start has none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskft.errors import MaskftError
from maskft.training.resume import newest_complete_checkpoint, resolve_checkpoint


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")
    if complete:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 12, complete=False)
    cut = checkpoint(tmp_path, 14) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:20])
    (checkpoint(tmp_path, 16) / "trainer_state.json").write_text('{"global_step": 1')
    assert newest_complete_checkpoint(tmp_path) == newest
    assert resolve_checkpoint("auto", tmp_path) == newest
    assert resolve_checkpoint(str(newest), tmp_path) == newest
    assert resolve_checkpoint(None, tmp_path) is None
    with pytest.raises(MaskftError, match="is no complete checkpoint"):
        resolve_checkpoint(str(tmp_path / "checkpoint-12"), tmp_path)


def test_auto_begins_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert resolve_checkpoint("auto", tmp_path / "absent") is None
    checkpoint(tmp_path / "run", 2, complete=False)
    (tmp_path / "run" / "README.md").write_text("the card that TRL's trainer writes")
    assert resolve_checkpoint("auto", tmp_path / "run") is None
    # What is no run's is not written over; and true means that there has to be one.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for given, folder in (("auto", "other"), (True, "run"), (True, "absent")):
        with pytest.raises(MaskftError, match="holds no complete checkpoint"):
            resolve_checkpoint(given, tmp_path / folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(MaskftError, match="file is a file; give another --output_dir"):
        resolve_checkpoint("auto", tmp_path / "file")
