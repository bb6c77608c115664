"""A real browser for the pages that studies write, and workers that start at once."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskft_lab.study import schedule
from server import Worker


@pytest.fixture
def dump_dom(tmp_path: Path) -> Callable[..., str]:
    """What a page has become once its scripts have run: `dump_dom(path, *flags of Chromium)`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    command = [str(chromium), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]

    def dump(page: Path, *flags: str) -> str:
        if chromium is None:
            pytest.skip("no Chromium on this machine")
        return subprocess.run(
            [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return dump


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a study in processes of their own that import nothing anew."""
    monkeypatch.setattr(schedule, "subprocess", SimpleNamespace(Popen=Worker, DEVNULL=subprocess.DEVNULL))
