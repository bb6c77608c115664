"""A model as its `config.json` alone tells it: nothing is loaded, and no code of the model's own is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskft.errors import MaskftError, first_line
from maskft.tuner.zero import loading_whole


@dataclass(frozen=True)
class LinearLayout:
    """How a linear layer stores its weight: (out_features, in_features), or the transpose of it."""

    out_features: int
    in_features: int
    is_transposed: bool


@dataclass(frozen=True)
class ModelLayout:
    """The linear layers of a model by name, and the name its files may leave out in front (`base_model_prefix`)."""

    layers: dict[str, LinearLayout]
    prefix: str
    is_quantized: bool = False

    def other_names(self, name: str) -> list[str]:
        """Names under which `name` may be known where the prefix is left out or put in front."""
        return [name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"]

    def find(self, name: str) -> LinearLayout | None:
        """The layout of a module, or None where the model has no such linear layer."""
        return next((self.layers[n] for n in self.other_names(name) if n in self.layers), None)


def read_config(model_name_or_path: str) -> Any:
    """The model's configuration.

    Raises:
        MaskftError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise MaskftError(
            f"No model can be read from {model_name_or_path!r}; give a folder with config.json or a hub name "
            f"({first_line(error)})"
        ) from error


def without_weights(config: Any, model_name_or_path: str) -> PreTrainedModel:
    """The model of a configuration, on the meta device.

    Raises:
        MaskftError: the configuration is not one of a causal language model.
    """
    try:
        with torch.device("meta"), loading_whole():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise MaskftError(
            f"{model_name_or_path!r} holds a model of the type {config.model_type!r}, which Transformers cannot read "
            f"as a causal language model; give one that is ({first_line(error)})"
        ) from error
    return model


def read_layout(model_path: str | Path) -> ModelLayout:
    """The linear layers of a causal language model.

    Raises:
        MaskftError: its configuration cannot be read, or is not one of a causal language model.
    """
    config = read_config(str(model_path))
    model = without_weights(config, str(model_path))
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            is_transposed = isinstance(module, Conv1D)
            shape = module.weight.T.shape if is_transposed else module.weight.shape
            layers[name] = LinearLayout(shape[0], shape[1], is_transposed)
    is_quantized = getattr(config, "quantization_config", None) is not None
    return ModelLayout(layers, model.base_model_prefix, is_quantized)
