"""`--require_gain`: the paired test on rows that chose nothing, and what is written without a gain."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft.cli import main
from maskft.data.rows import load_rows, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.scoring import verdict as guard
from maskft.scoring.nll import NllResult, token_nll
from maskft.scoring.temperature import INVERSE_TEMPERATURES
from maskft.scoring.verdict import LEVEL, bootstrap_t_test, gain_p_value, level_for, verdict
from maskft.tuner import MaskConfig

NAMES = [str(i) for i in range(60)]
LAWS = {
    "heavy tails on both sides": lambda draw, n: draw.standard_t(3, n) * draw.gamma(2, 1, n),
    "a tail to the right": lambda draw, n: draw.exponential(1, n) - 1,
    "a long tail to the right": lambda draw, n: draw.lognormal(size=n) - np.exp(0.5),
}


def scored(sums: np.ndarray, right: np.ndarray | None = None, best: np.ndarray | None = None) -> NllResult:
    """Rows of three tokens; none is written right, and no temperature is better than 1, unless it is said."""
    sums_at = np.stack([sums + 1] * len(INVERSE_TEMPERATURES))
    sums_at[INVERSE_TEMPERATURES.index(1)] = sums
    if best is not None:
        sums_at[INVERSE_TEMPERATURES.index(0.8)] = best
    return NllResult(sums, np.full(len(sums), 3), np.zeros(len(sums), bool) if right is None else right, sums_at)


@pytest.mark.parametrize("n", [25, 50, 100])
@pytest.mark.parametrize("law", LAWS)
def test_null_masks_pass_in_at_most_five_percent_of_all_cases(law: str, n: int) -> None:
    """Masks that change each problem's loss at random and help nobody; either test alone lets more pass."""
    draw = np.random.default_rng(0)
    masks = [LAWS[law](draw, n) for _ in range(200)]
    # The p-value is the larger of two: where the cheaper one does not pass, it does not; see the tests below.
    passed = sum(bootstrap_t_test(of) <= level_for(n) and gain_p_value(of) <= level_for(n) for of in masks)
    # More than 5 % could explain would fail; the figure itself is measured by benchmarks/guard_error_rate.py.
    assert binomtest(passed, 200, 0.05, alternative="greater").pvalue > 0.01


def plain_bootstrap_t(changes: np.ndarray, num_resamples: int) -> float:
    draw, n = np.random.default_rng(7), len(changes)
    samples = [draw.choice(changes, n) for _ in range(num_resamples)]
    t = [(sample.mean() - changes.mean()) / (sample.std(ddof=1) / n**0.5) for sample in samples]
    return sum(each <= changes.mean() / (changes.std(ddof=1) / n**0.5) for each in t) / num_resamples


@pytest.mark.parametrize("shift", [-0.4, -0.2, 0.0, 0.3])
def test_bootstrap_t_is_that_of_a_plain_loop(shift: float) -> None:
    changes = np.random.default_rng(2).exponential(1, 30) - 1 + shift
    assert bootstrap_t_test(changes) == pytest.approx(plain_bootstrap_t(changes, 4000), abs=0.03)
    assert bootstrap_t_test(1000 * changes) == pytest.approx(bootstrap_t_test(changes), abs=1e-3)
    assert gain_p_value(changes) == max(guard.sign_flips(changes), bootstrap_t_test(changes))


@pytest.mark.parametrize(("change", "p"), [(0.0, 1.0), (0.1, 1.0), (-0.1, 0.0)])
def test_changes_that_are_all_the_same_have_a_plain_answer(change: float, p: float) -> None:
    assert bootstrap_t_test(np.full(25, change)) == p
    assert (gain_p_value(np.full(25, change)) <= LEVEL) is (change < 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=8, max_size=40))
def test_a_gain_has_the_right_sign_and_turning_it_round_takes_it_away(changes: list[float]) -> None:
    base, problems = np.full(len(changes), 2.0), NAMES[: len(changes)]
    there = verdict(scored(base), scored(base + np.array(changes)), problems)
    back = verdict(scored(base + np.array(changes)), scored(base), problems)
    assert not (there.has_gain and back.has_gain)
    assert not there.has_gain or (there.difference.estimate < 0 and there.p <= there.level == LEVEL / 2)
    # Each of the two p-values turns into its complement, and the larger one is taken both times.
    assert there.p + back.p >= 1 - 0.02


@pytest.fixture
def gain() -> tuple[np.ndarray, np.ndarray]:
    """Losses of sixty rows, without a mask that helps and with it."""
    draw = np.random.default_rng(0)
    base = draw.exponential(3, 60)
    return base, base - draw.normal(0.3, 0.1, 60)


def test_what_a_temperature_alone_gains_is_told(gain) -> None:
    base, masked = gain
    found = verdict(scored(base, best=masked - 0.1), scored(masked), NAMES)
    assert found.has_gain
    assert found.temperatures == (1.25, 1.0)
    assert found.difference.estimate == pytest.approx((masked - base).sum() / 180)
    assert found.tempered.estimate == pytest.approx(0.1 / 3)
    assert "1.25 without the mask and 1.00 with it: +0.0333 [+0.0333, +0.0333]" in found.sentence
    assert "letter" not in found.sentence


@pytest.mark.parametrize(("num_lost", "has_gain"), [(0, True), (2, True), (12, False)])
def test_a_lower_loss_with_fewer_rows_right_is_no_gain(num_lost: int, has_gain: bool, gain) -> None:
    base, masked = gain
    was_right = np.arange(60) < 30
    found = verdict(scored(base, was_right), scored(masked, was_right & (np.arange(60) >= num_lost)), NAMES)
    assert found.p <= LEVEL
    assert found.has_gain is has_gain
    assert (found.right.estimate, found.base_right) == (pytest.approx(-100 * num_lost / 60), 50)
    assert ("fewer rows right, which is no gain" in found.sentence) is not has_gain
    assert "50.0 % without the mask" in found.sentence


def test_rows_of_one_problem_count_once() -> None:
    base = np.ones(40)
    better = base - np.repeat(np.random.default_rng(1).normal(0.05, 0.1, 5), 8)
    alone, together = (verdict(scored(base), scored(better), names) for names in (NAMES[:40], np.repeat(NAMES[:5], 8)))
    assert together.difference.n == 5
    assert together.difference.estimate == pytest.approx(alone.difference.estimate)
    assert together.p > alone.p


def test_the_model_is_judged_with_and_without_its_mask(tiny_model: Path, sums: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = load_rows(str(sums))
    tokenised = tokenise_rows(rows, RowTokeniser(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = token_nll(model, tokenised)
    model = get_peft_model(model, MaskConfig(density=0.5, task_type="CAUSAL_LM"))
    masked = token_nll(model, tokenised)
    found = guard.judge_gain(model, tokenised, batch_size=4)
    assert found.base_nll == pytest.approx(plain.mean)
    assert found.difference.estimate == pytest.approx(masked.mean - plain.mean)
    assert torch.equal(torch.tensor(token_nll(model, tokenised).sums), torch.tensor(masked.sums))


def test_the_halves_share_no_problem_and_few_are_refused(sums: Path) -> None:
    rows = load_rows(str(sums))
    choosing, judging = guard.split_guard_rows(rows, seed=0)
    assert not set(choosing["prompt"]) & set(judging["prompt"])
    assert len(choosing) + len(judging) == len(rows)
    guard.require_problems(rows.select(range(2)), "the rows", is_required=False)
    with pytest.raises(MaskftError, match="needs 20 different problems, and half of the validation rows hold 9"):
        guard.split_guard_rows(rows.select(range(18)), seed=0)
    with pytest.raises(MaskftError, match="The verdict needs 2 different problems, and the rows hold 1; give more"):
        guard.require_problems(rows.select([0, 0, 0]), "the rows", is_required=False)


@pytest.mark.parametrize("learning_rate", ["1e-12", "2e-2"])
def test_the_command_ends_with_a_verdict(learning_rate: str, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    output, judged = tmp_path / "run", tmp_path / "judged.jsonl"
    judged.write_text(sums.read_text().replace('"prompt": "', '"prompt": " '))
    flags = f"--model_name_or_path {tiny_model} --dataset_name {sums} --eval_dataset_name {judged}"
    # A mask that cannot flip has no gain; one that learns nearly the rows it is judged on has.
    flags += f" --learning_rate {learning_rate} --selection threshold --init_scores keep_all --init_std 1e-3"
    flags += f" --output_dir {output} --num_train_epochs 3 --require_gain True --disable_tqdm True --bf16 False"
    status = main(["train", *flags.split()])
    report = json.loads((output / "report.json").read_text())
    has_gain = learning_rate == "2e-2"
    assert report["verdict"]["has_gain"] is has_gain
    assert "(a gain needs 0.0125 or less)" in report["verdict"]["sentence"]  # on 30 problems
    assert report["verdict"]["sentence"] in (output / "README.md").read_text()
    assert report["data"]["guard"]["n"] == report["data"]["validation"]["n"] == 30
    assert status == (0 if has_gain else 3)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).exists() is has_gain
