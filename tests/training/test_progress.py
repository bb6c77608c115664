"""What a run shows while it trains: one bar, and its logs as lines that can be read."""

import re

import pytest

from maskft.cli import main

STEPS = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
STEPS |= {"load_best_model_at_end": False, "report_to": "none"}
LINES = [
    r"step 1/2  loss \S+  flips \d+  kept_share 0\.\d+",
    r"step 2/2  loss \S+  flips \d+  kept_share 0\.\d+",
    r"step 2/2  eval_loss \S+  eval_mean_token_accuracy \S+",
    r"step 2/2  eval_nll_\w+ \S+",
]


@pytest.mark.parametrize(
    ("flags", "has_bar", "wanted"),
    [({"disable_tqdm": False}, True, LINES), ({}, False, LINES), ({"log_level": "error"}, False, [])],
)
def test_a_run_shows_one_bar_and_its_logs_in_lines(flags, has_bar, wanted, command, sums, tmp_path, capsys) -> None:
    given = STEPS | {"eval_tasks": f"nll:{sums}", "eval_tasks_limit": 4} | flags
    arguments = [word for word in command(tmp_path / "run", **given)]
    if has_bar:
        arguments[arguments.index("--disable_tqdm") + 1] = "False"
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    lines = [line for line in out.splitlines() if line]
    assert len(lines) == len(wanted)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(wanted, lines, strict=True))
    assert set(re.findall(r"\d+/(\d+) \[", error)) == ({"2"} if has_bar else set())
    assert "Loading weights" not in error
