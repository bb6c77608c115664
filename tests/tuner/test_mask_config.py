"""Presets of the mask's settings."""

import pytest
import torch
from scipy.stats import kstest

from maskft import MaskConfig, MaskftError
from maskft.training.arguments import MaskArguments
from maskft.tuner.layer import initial_scores


def test_the_papers_preset_is_what_the_defaults_are() -> None:
    assert MaskConfig.preset("paper") == MaskConfig()


def test_a_preset_gives_way_to_what_is_given() -> None:
    config = MaskConfig.preset("recommended", reference_model_name_or_path="base", init_std=0.5)
    assert (config.selection, config.init_scores, config.score_transform) == ("threshold", "uniform", "none")
    assert (config.reference, config.init_std) == ("pretrained", 0.5)
    assert MaskConfig.preset("recommended", reference="zero", init_scores="keep_all").init_scores == "keep_all"


def test_the_recommended_preset_asks_for_the_model_before_fine_tuning() -> None:
    with pytest.raises(MaskftError, match="needs the model before fine-tuning"):
        MaskConfig.preset("recommended")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(MaskftError, match="`preset` must be one of paper, recommended, got 'best'"):
        MaskConfig.preset("best")


def test_flags_start_from_the_preset() -> None:
    assert MaskArguments().config() == MaskConfig(task_type="CAUSAL_LM")
    given = MaskArguments(preset="recommended", reference_model_name_or_path="base", mask_seed=3).config()
    expected = MaskConfig.preset("recommended", reference_model_name_or_path="base", seed=3, task_type="CAUSAL_LM")
    assert given == expected


def test_a_density_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(MaskftError, match=r"`density` = 0\.5 has no effect under selection='threshold'"):
        MaskArguments(preset="recommended", reference_model_name_or_path="base", density=0.5).config()


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
