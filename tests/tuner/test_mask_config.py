"""Presets of the mask's settings."""

import pytest

from maskft import MaskConfig, MaskftError
from maskft.training.arguments import MaskArguments


def test_the_papers_preset_is_what_the_defaults_are() -> None:
    assert MaskConfig.preset("paper") == MaskConfig()


def test_a_preset_gives_way_to_what_is_given() -> None:
    config = MaskConfig.preset("recommended", layers_to_transform=[1], init_std=0.5)
    assert (config.selection, config.init_scores, config.score_transform) == ("threshold", "keep_all", "none")
    assert (config.layers_to_transform, config.init_std) == ([1], 0.5)
    assert MaskConfig.preset("recommended", selection="topk", init_scores="magnitude").selection == "topk"


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(MaskftError, match="`preset` must be one of paper, recommended, got 'best'"):
        MaskConfig.preset("best")


def test_flags_start_from_the_preset() -> None:
    assert MaskArguments().config() == MaskConfig(task_type="CAUSAL_LM")
    given = MaskArguments(preset="recommended", threshold=0.1, mask_seed=3).config()
    assert given == MaskConfig.preset("recommended", threshold=0.1, seed=3, task_type="CAUSAL_LM")


def test_a_density_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(MaskftError, match=r"`density` = 0\.5 has no effect under selection='threshold'"):
        MaskArguments(preset="recommended", density=0.5).config()
