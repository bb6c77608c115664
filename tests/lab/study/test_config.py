from pathlib import Path
from typing import Any

import pytest

from maskft.errors import MaskftError
from maskft_lab.study.config import mask_config, masks_of, parse_study, read_study

REPOSITORY = Path(__file__).parents[3]


def study(**changes: Any) -> dict[str, Any]:
    return {
        "name": "s",
        "seeds": [1, 2],
        "models": {"m": "somewhere"},
        "domains": {"d": {"generated": {"num_train": 5, "num_validation": 5, "num_test": 5}}},
        "defaults": {"per_device_train_batch_size": 2},
        "methods": {"base": None, "fft": {"learning_rate": "1e-4"}, "mft": {"density": 0.95}, "shuffled": None},
    } | changes


def test_settings_reach_the_method_they_are_for() -> None:
    parsed = parse_study(study(), "s.yaml")
    assert parsed.seeds == (1, 2)
    assert parsed.methods["fft"].training == {"per_device_train_batch_size": 2, "learning_rate": 1e-4}
    assert parsed.methods["mft"].mask == {"density": 0.95}
    assert parsed.methods["shuffled"].of == "mft"
    assert parsed.methods["base"].training == {}


def test_a_cross_fitted_mask_starts_from_the_preset_recommended() -> None:
    methods = {"fft": None, "crossfit": {"init_scores": "keep_all"}}
    config = masks_of(parse_study(study(methods=methods), "s.yaml").methods["crossfit"], "somewhere")
    assert config is not None
    assert (config.selection, config.init_scores, config.reference) == ("threshold", "keep_all", "pretrained")
    assert config.reference_model_name_or_path == "somewhere"


def test_a_mask_of_changes_goes_back_to_the_studys_model() -> None:
    mask = parse_study(study(methods={"fft": None, "mft": {"reference": "pretrained"}}), "s.yaml").methods["mft"].mask
    assert mask_config(mask, "somewhere", seed=3).reference_model_name_or_path == "somewhere"
    assert mask_config(mask | {"reference_model_name_or_path": "else"}, "x").reference_model_name_or_path == "else"
    assert mask_config({}, "somewhere").reference_model_name_or_path is None


FILES = {"dataset_name": "a", "test_dataset_name": "t"}
SIZES = {"num_train": 3, "num_validation": 2, "num_test": 2}
OF_THE_STUDY: list[tuple[dict[str, Any], str]] = [
    ({"seeds": [1, 1]}, "names a seed twice"),
    ({"seeds": "1"}, "`seeds` must be a list, got '1'"),
    ({"methods": {}}, "has no `methods`"),
    ({"methods": [{"fft": None}]}, "`methods` must be a mapping, got"),
    ({"models": {"m": 5}}, "models: `m` must be text, got 5"),
    ({"methods": {"fft": 5}}, "methods: `fft` must be a mapping or null, got 5"),
    ({"sedes": [1]}, "unknown key 'sedes' .nearest: seeds"),
    ({"dtype": "int8"}, "must be 'float32' or 'bfloat16', got 'int8'"),
    ({"defaults": {"num_train_epochs": "two"}}, "`num_train_epochs` must be a number, got 'two'"),
]
OF_METHODS: list[tuple[dict[str, Any], str]] = [
    ({"fft": None, "mtf": None}, "unknown method 'mtf' .nearest: mft"),
    ({"mft": None}, "'mft' starts from the best FFT; add the method `fft`"),
    ({"fft": None, "random": None}, "'random' leaves out as many weights as 'mft', which is no method"),
    ({"fft/x": None}, "a name may hold"),
    ({"fft": {"learning_rte": 1}}, "unknown key 'learning_rte' .nearest: learning_rate"),
    ({"fft": {"density": 0.5}}, "unknown key 'density'"),
    ({"fft": {"push_to_hub": True}}, "unknown key 'push_to_hub'"),
    ({"fft": {"temperature_scaling": True}}, "unknown key 'temperature_scaling'"),
    ({"fft": {"max_length": 64}}, "'fft': `max_length` must be the same for all methods"),
    ({"fft": {"train_share": 0}}, "`train_share` must be above 0, got 0"),
    ({"fft": {"learning_rate": -1}}, "`learning_rate` must be above 0, got -1"),
    ({"fft": None, "mft": {"density": 1.5}}, "method 'mft'.*`density` must be .* 1.5"),
    ({"fft": None, "mft": {"reference": "base"}}, "`reference` must be 'zero' or 'pretrained'"),
    ({"fft": None, "crossfit": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
    ({"fft": None, "crossfit": {"preset": "paper"}}, "unknown key 'preset'"),
    ({"fft": None, "crossfit": {"density": 0.9}}, "`density` = 0.9 has no effect under"),
    ({"fft": None, "lora": None}, "no learned mask to match in size; give `r`"),
    ({"fft": None, "lora": {"r": 2, "layers_to_transform": [1], "target_modules": "all-linear"}}, "'lora'"),
    ({"fft": None, "lora": {"r": 0}}, "`r` must be at least 1, got 0"),
]
OF_A_DOMAIN: list[tuple[dict[str, Any], str]] = [
    ({}, "needs either `dataset_name` or `generated`"),
    ({"dataset_name": "a"}, "has no `test_dataset_name`"),
    ({"dataset_name": "no.jsonl", "test_dataset_name": "t"}, "no.jsonl, which does not exist"),
    (FILES | {"checker": "ifevil"}, "unknown checker 'ifevil' .nearest: ifeval.*one of ifeval, gsm8k"),
    (FILES | {"checker": "ifeval"}, "must be a .jsonl file, got 't'"),
    (FILES | {"validation_split_percentage": 100}, "`validation_split_percentage` must be at most 90, got 100"),
    ({"generated": {"num_train": 5}, "checker": "gsm8k"}, "must be a .jsonl file, got None"),
    ({"generated": {"num_train": 3}}, "`generated` has no `num_validation`"),
    ({"generated": SIZES | {"num_terms": 2}}, "`num_terms` must be a list of 2 values, got 2"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *OF_THE_STUDY,
        *(({"methods": methods}, message) for methods, message in OF_METHODS),
        *(({"domains": {"d": domain}}, message) for domain, message in OF_A_DOMAIN),
    ],
)
def test_what_cannot_work_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskftError, match=f"s.yaml.*{message}"):
        parse_study(study(**changes), "s.yaml")


def test_a_file_that_is_no_study_is_named(tmp_path: Path) -> None:
    for text, message in ((None, "cannot be read"), ("- a", "must be a mapping"), ("a: [", "is no YAML")):
        if text:
            (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(MaskftError, match=message):
            read_study(tmp_path / "s.yaml")


READY = sorted([*(REPOSITORY / "studies" / "ablations").glob("*.yaml"), REPOSITORY / "studies/demo-sums/study.yaml"])


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_studies_can_be_read(path: Path) -> None:
    assert len(READY) > 5
    assert read_study(path).name == (path.parent.name if path.stem == "study" else path.stem)
