"""Which checkpoint a run goes on from: complete ones alone, and none where a launcher's first start has none."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskft.errors import MaskftError
from maskft.training.resume import (
    RunNotes,
    deciding,
    newest_complete_checkpoint,
    remove_run,
    require_resumable,
    resolve_checkpoint,
)


def checkpoint(
    run: Path, step: int, *, complete: bool = True, weights: str = "adapter_model.safetensors", **state: object
) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(3)}, folder / weights)
    if complete:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step} | state))
    return folder


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    _, newest, unfinished = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10), checkpoint(tmp_path, 12, complete=False)
    cut = checkpoint(tmp_path, 14) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:20])
    (checkpoint(tmp_path, 16) / "trainer_state.json").write_text('{"global_step": 1')
    assert newest_complete_checkpoint(tmp_path) == newest
    for given, found in (("auto", newest), (str(newest), newest), (None, None)):
        assert resolve_checkpoint(given, tmp_path) == found
    with pytest.raises(MaskftError, match="is no complete checkpoint"):
        resolve_checkpoint(str(unfinished), tmp_path)


def test_auto_begins_where_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert resolve_checkpoint("auto", tmp_path / "absent") is None
    checkpoint(tmp_path / "run", 2, complete=False)
    (tmp_path / "run" / "README.md").write_text("the card that TRL's trainer writes")
    assert resolve_checkpoint("auto", tmp_path / "run") is None
    (tmp_path / "notes.txt").write_text("What is no run's is not written over.")
    for folder, told in (("", "holds no complete checkpoint"), ("notes.txt", "is a file; give another --output_dir")):
        with pytest.raises(MaskftError, match=told):
            resolve_checkpoint("auto", tmp_path / folder)


@pytest.mark.parametrize(("weights", "is_mask"), [("adapter_model.safetensors", True), ("model.safetensors", False)])
def test_a_checkpoint_of_the_other_command_or_without_an_optimizer_is_refused(weights, is_mask, tmp_path) -> None:
    saved = checkpoint(tmp_path, 3, weights=weights, max_steps=9)
    command = "sft" if is_mask else "train"
    with pytest.raises(MaskftError, match=f"from which maskft {command} cannot go on"):
        require_resumable(saved, is_mask=not is_mask)
    with pytest.raises(MaskftError, match="holds no state of the optimizer"):
        require_resumable(saved, is_mask=is_mask)
    (saved / "optimizer.pt").touch()
    require_resumable(saved, is_mask=is_mask)
    # Where no step is left none is needed.
    require_resumable(checkpoint(tmp_path, 9, weights=weights, max_steps=9), is_mask=is_mask)


SETTINGS = {"load_best_model_at_end": True, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
SETTINGS |= {"learning_rate": 1e-3, "seed": 1, "save_total_limit": 2, "eval_steps": 4, "logging_steps": 5}
SETTINGS |= {"max_steps": 20, "mask": {"density": 0.9, "seed": 0}, "dataset_name": "a.jsonl", "output_dir": "run"}
SETTINGS |= {"retain_dataset_name": "b.jsonl"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-4}, "`learning_rate` = 0.001 and the run would go on with 0.0001"),
        ({"seed": 2}, "`seed` = 1 "),
        ({"max_steps": 30}, "`max_steps` = 20 and the run would go on with 30"),
        ({"mask": {"density": 0.5, "seed": 0}}, "`density` = 0.9 and the run would go on with 0.5"),
        ({"mask": {"density": 0.9, "seed": 1}}, "`mask_seed` = 0 "),
        ({"eval_steps": 2}, "`eval_steps` = 4 "),
        ({"eval_steps": 2, "load_best_model_at_end": False}, "`load_best_model_at_end` = True "),
        ({"per_device_train_batch_size": 2}, "`rows of a step` = 6 "),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, None),
        ({"logging_steps": 1, "save_total_limit": 9, "output_dir": "moved", "dataset_name": "moved.jsonl"}, None),
        ({"retain_dataset_name": "moved.jsonl"}, None),
    ],
)
def test_a_change_of_what_decides_the_result_is_named(changes, told, tmp_path) -> None:
    callbacks = {"RunNotes": RunNotes(None, deciding(SETTINGS, 1)).state()}
    facts = deciding(SETTINGS | changes, 1)
    now = RunNotes(checkpoint(tmp_path, 3, stateful_callbacks=callbacks), facts)
    with pytest.raises(MaskftError, match=told) if told else nullcontext():
        now.require_same()
    # One that was written before this was noted.
    RunNotes(checkpoint(tmp_path, 4), facts).require_same()


def test_seconds_are_those_of_all_starts(tmp_path) -> None:
    begun = RunNotes(None, {})
    begun._started -= 100
    saved = checkpoint(tmp_path, 3, stateful_callbacks={"RunNotes": begun.state()})
    again = RunNotes(saved, {})
    again._started -= 20
    assert 120 <= again.seconds() < 180
    assert RunNotes(checkpoint(tmp_path, 4), {}).seconds() < 60  # one that was written before they were noted


def test_where_no_checkpoint_is_chosen_evaluations_decide_nothing() -> None:
    last = SETTINGS | {"load_best_model_at_end": False}
    assert deciding(last, 1) == deciding(last | {"eval_steps": 2}, 1)
    assert deciding(last, 2)["rows of a step"] == 12


def test_all_of_a_run_that_could_be_taken_for_another_is_removed(tmp_path) -> None:
    checkpoint(tmp_path, 3)
    gone = "config.json generation_config.json model-1-of-2.safetensors model.safetensors.index.json "
    for name in (gone + "adapter_config.json report.html README.md tokenizer.json notes.txt").split():
        (tmp_path / name).touch()
    remove_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "tokenizer.json"]
