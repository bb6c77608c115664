"""The mask's settings: presets, what a file keeps of them, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from tiny import refused

from maskft import MaskConfig
from maskft.training.arguments import MaskArguments
from maskft.tuner.layer import initial_scores


def test_the_papers_preset_is_what_the_defaults_are_and_one_gives_way_to_what_is_given() -> None:
    assert MaskConfig.preset("paper") == MaskConfig()
    config = MaskConfig.preset("recommended", reference_model_name_or_path="base", init_std=0.5)
    assert (config.selection, config.init_scores, config.score_transform) == ("threshold", "uniform", "none")
    assert (config.reference, config.init_std) == ("pretrained", 0.5)
    assert MaskConfig.preset("recommended", reference="zero", init_scores="keep_all").init_scores == "keep_all"


def test_flags_start_from_the_preset() -> None:
    assert MaskArguments().config() == MaskConfig(task_type="CAUSAL_LM")
    given = MaskArguments(preset="recommended", reference_model_name_or_path="base", mask_seed=3).config()
    expected = MaskConfig.preset("recommended", reference_model_name_or_path="base", seed=3, task_type="CAUSAL_LM")
    assert given == expected


def test_uniform_scores_keep_all_and_leave_in_proportion_to_the_way() -> None:
    config = MaskConfig(selection="threshold", init_scores="uniform", threshold=-1.5, init_std=0.2)
    scores = initial_scores(torch.randn(100, 300), config, "m")
    assert scores.dtype == torch.float32
    assert bool((scores >= config.threshold).all())
    assert kstest(scores.flatten().numpy(), "uniform", (config.threshold, config.init_std)).pvalue > 1e-3
    pushed = (scores - 0.05 < config.threshold).float().mean()
    assert pushed == pytest.approx(0.25, abs=0.01)
    assert torch.equal(scores, initial_scores(torch.zeros(100, 300), config, "m"))
    assert not torch.equal(scores, initial_scores(torch.zeros(100, 300), config, "another"))


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"layers_to_transform": range(2)}, [0, 1]),
        ({"layers_to_transform": {2, 0, 11}}, [0, 2, 11]),
        ({"layers_to_transform": (1,), "layers_pattern": ("layers", "h")}, ["layers", "h"]),
        ({"target_modules": frozenset({"v_proj", "q_proj"})}, ["q_proj", "v_proj"]),
        ({"target_modules": np.str_("q_.*")}, "q_.*"),
        ({"seed": np.int64(3)}, 3),
        ({"base_model_name_or_path": Path("a/b")}, "a/b"),
        ({"reference": "pretrained", "reference_model_name_or_path": Path("a/b")}, "a/b"),
    ],
)
def test_every_setting_is_one_that_a_file_keeps(settings: dict[str, object], plain: object, tmp_path: Path) -> None:
    config = MaskConfig(**settings)
    name = list(settings)[-1]
    assert getattr(config, name) == plain
    config.save_pretrained(tmp_path)
    assert getattr(MaskConfig.from_pretrained(tmp_path), name) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, r"`density` must be in \(0, 1\], got 0"),
        ({"density": True}, "`density` must be a number, got True"),
        ({"selection": "best"}, "`selection` must be 'topk', 'global_topk' or 'threshold', got 'best'"),
        ({"selection": "threshold", "score_transform": "abs"}, "needs a `threshold` above 0"),
        ({"selection": "threshold", "score_transform": "abs", "threshold": 1e-50}, "above 0, from 1e-37, got 1e-50"),
        ({"threshold": 1e39}, "`threshold` must be a finite number of a size up to 1e\\+37, got 1e\\+39"),
        ({"threshold": float("nan")}, "`threshold` must be .*, got nan"),
        ({"threshold": -(10**400)}, "`threshold` must be a finite number .*, got -inf"),
        ({"init_scores": "keep_all"}, "would drop weights by position"),
        ({"init_std": 0}, "`init_std` must be a positive number"),
        ({"init_std": 1e-50}, "must be a positive number from 1e-37 to 1e\\+37, got 1e-50; scores are float32"),
        ({"init_std": 1e39}, "`init_std` must be .*, got 1e\\+39"),
        ({"init_std": float("nan")}, "`init_std` must be .*, got nan"),
        ({"layers_to_transform": []}, "`layers_to_transform` is empty; name layers, or leave it out"),
        ({"layers_to_transform": range(0)}, "`layers_to_transform` is empty"),
        ({"layers_to_transform": -1}, "`layers_to_transform` must be .* at least 0 .*, got -1"),
        ({"layers_to_transform": [1], "target_modules": "q.*"}, "has no effect when `target_modules` is a regular"),
        ({"layers_pattern": "layers"}, "`layers_pattern='layers'` says where the layers"),
        ({"target_modules": 3}, "`target_modules` must be text or a list or null, got 3"),
        ({"exclude_modules": [None]}, r"`exclude_modules` must be text or a list of .* text .*, got \[None\]"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' makes PEFT look for a head to train"),
        ({"seed": "x"}, "`seed` must be a whole number, got 'x'"),
        ({"reference": "pretrained"}, "`reference` is 'pretrained' and `reference_model_name_or_path` is None"),
        ({"reference_model_name_or_path": "somewhere"}, "reference='zero' takes none"),
    ],
)
def test_a_setting_that_cannot_work_or_that_no_file_or_score_can_hold_is_refused(settings, message) -> None:
    with refused(message):
        MaskConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskConfig.preset("recommended"), "needs the model before fine-tuning"),
        (lambda: MaskConfig.preset("best"), "`preset` must be one of paper, recommended, preferences, bmt, got 'best'"),
        (
            lambda: MaskArguments(preset="recommended", reference_model_name_or_path="base", density=0.5).config(),
            r"`density` = 0\.5 has no effect under selection='threshold'",
        ),
    ],
)
def test_a_preset_without_what_it_needs_is_refused(make, message) -> None:
    with refused(message):
        make()


def test_no_other_modules_are_trained() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'modules_to_save'"):
        MaskConfig(modules_to_save=["lm_head"])
