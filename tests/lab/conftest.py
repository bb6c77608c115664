"""Workers of studies that start at once."""

import subprocess
from types import SimpleNamespace

import pytest

from maskft_lab.study import schedule
from server import Worker


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a study in processes of their own that import nothing anew."""
    monkeypatch.setattr(schedule, "subprocess", SimpleNamespace(Popen=Worker, DEVNULL=subprocess.DEVNULL))
