from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from maskft.errors import MaskftError
from maskft.scoring.nll import NllResult
from maskft.scoring.statistics import wilson
from maskft_lab.demo import run


@pytest.mark.parametrize("num_right", [0, 7, 20])
def test_accuracies_have_wilsons_interval(num_right: int) -> None:
    demo = object.__new__(run._Demo)
    right = np.arange(20) < num_right
    demo.nll = {"best FFT": NllResult(np.arange(20.0), np.ones(20, np.int64), right)}
    demo.correct, demo.extras = {"best FFT": right}, {"best FFT": {}}
    accuracy = demo.row("best FFT")["accuracy"]
    expected = wilson(num_right, 20)
    assert (accuracy["estimate"], accuracy["low"], accuracy["high"]) == (expected.estimate, expected.low, expected.high)
    assert accuracy["low"] < accuracy["high"]


def test_a_file_above_the_output_is_refused_before_the_download(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run, "fetch_demo_model", pytest.fail)
    with pytest.raises(MaskftError, match="/file is a file; give another --output_dir"):
        run.run_demo(tmp_path / "file" / "demo", console=Console(quiet=True))
