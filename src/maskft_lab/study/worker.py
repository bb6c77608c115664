"""One run of a study in a process of its own: `python -m maskft_lab.study.worker STUDY.yaml OUTPUT_DIR RUN_FOLDER PID`.

PID is the study's process, with which this one ends.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from maskft.storage.environment import machine, versions
from maskft.storage.files import atomic_write_text
from maskft_lab.study.config import read_study
from maskft_lab.study.plan import CONFIG, FAILED, RESULT, plan_runs


def main(study_file: str, output_dir: str, folder: str, parent: str) -> int:
    """Carry out the run whose folder is given; its `result.json`, or `failed.json`, is written last."""
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    run = next(run for run in plan_runs(read_study(study_file), Path(output_dir)) if run.folder == Path(folder))
    (run.folder / FAILED).unlink(missing_ok=True)
    atomic_write_text(run.folder / CONFIG, json.dumps(run.describe(), indent=1) + "\n")
    try:
        from maskft_lab.study.methods import perform

        result = perform(run)
    except Exception as error:
        failure = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        atomic_write_text(run.folder / FAILED, json.dumps(failure, indent=1) + "\n")
        logging.exception("The run failed.")
        return 1
    made_with = {"versions": versions(), "revision": git_revision(), "machine": machine()}
    result |= {"config": run.describe(), "num_threads": torch.get_num_threads()} | made_with
    atomic_write_text(run.folder / RESULT, json.dumps(result) + "\n")
    return 0


def git_revision() -> str | None:
    """The revision of the source this package runs from, "+changes" where it differs; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _end_with_parent(parent: int) -> None:
    # A worker that outlived a killed study would write into the folder that the next start works on.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
