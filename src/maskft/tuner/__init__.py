"""Mask Fine-Tuning as a method of PEFT."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from maskft.tuner.adapter_masks import AdapterMasks as AdapterMasks
from maskft.tuner.adapter_masks import AdapterMasks as MaskGroup  # its name before 0.2  # noqa: F401
from maskft.tuner.config import MaskConfig as MaskConfig
from maskft.tuner.layer import MaskLayer as MaskLayer
from maskft.tuner.model import MaskModel as MaskModel
from maskft.tuner.model import find_group as find_group
from maskft.tuner.registration import MASKFT
from maskft.tuner.stepping import step_in_backward as step_in_backward
from maskft.tuner.targets import check_targets as check_targets

if MASKFT not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="maskft", config_cls=MaskConfig, model_cls=MaskModel, prefix=MaskModel.prefix)
