"""Whether two runs are one and the same, bit for bit, or how far they are apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskft.adapters.read import read_adapter
from maskft.masks import num_flipped_bits

# Times differ; TRL counts the tokens, and Transformers averages the loss, of a start and not of a run.
_OF_A_START = ("runtime", "second", "num_tokens", "train_loss")


def log_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged (losses, flips, learning rates, metrics), but for what belongs to a start."""
    return [{key: value for key, value in entry.items() if not key.endswith(_OF_A_START)} for entry in history]


def report_of(run: Path) -> dict[str, Any]:
    """The report of a finished run."""
    return json.loads((run / "report.json").read_text())


def logged(report: dict[str, Any], name: str) -> list[Any]:
    """The values that a run has logged under a name."""
    return [entry[name] for entry in report["log_history"] if name in entry]


def num_differing_bits(first: Path, second: Path) -> tuple[int, int]:
    """Bits that differ between two adapters, of how many."""
    masks, others = read_adapter(first).masks, read_adapter(second).masks
    assert masks.keys() == others.keys()
    return sum(num_flipped_bits(masks[n], others[n]) for n in masks), 8 * sum(m.numel() for m in masks.values())


def assert_close_losses(run: Path, other: Path) -> None:
    """Two finished runs have the same losses, but for rounding."""
    one, two = report_of(run), report_of(other)
    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), abs=1e-4)
    # A mean over batches, which hold other rows.
    assert one["without_mask"]["eval_loss"] == pytest.approx(two["without_mask"]["eval_loss"], abs=0.02)


def assert_close_masks(first: Path, second: Path, share: float = 0.002) -> None:
    """Two adapters differ by few bits: sums of gradients are rounded in another order."""
    num_differing, num_bits = num_differing_bits(first, second)
    assert num_differing <= share * num_bits


def assert_same_files(first: Path, second: Path) -> None:
    """Two files of tensors are equal."""
    assert _same(load_file(first), load_file(second))


def assert_close_files(first: Path, second: Path) -> None:
    """Two files of tensors have the same names, and values to 1e-4."""
    torch.testing.assert_close(load_file(first), load_file(second), rtol=0, atol=1e-4)


def assert_same_checkpoints(first: Path, second: Path) -> None:
    """Scores, masks, optimizer, scheduler, random states, data position, best metric and flips are equal."""
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    of_torch = (".safetensors", ".pt", ".pth", "optimizer.bin", "pytorch_model_fsdp.bin")
    compared = [name for name in names if name.endswith(of_torch)]
    assert len(compared) >= 4, names
    for name in compared:
        assert _same(_read(first / name), _read(second / name)), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (first, second)]
    for state in states:
        assert state["stateful_callbacks"]["RunNotes"]["attributes"].pop("seconds") > 0
    for key in ("best_metric", "best_global_step", "epoch", "global_step", "stateful_callbacks"):
        assert states[0][key] == states[1][key], key
    assert log_of(states[0]["log_history"]) == log_of(states[1]["log_history"])


def _read(path: Path) -> Any:
    # The states of NumPy's and Python's generators are no tensors.
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, torch.Tensor | np.ndarray):
        return np.array_equal(first, second)
    return bool(first == second)
