"""A model as its `config.json` alone tells it: nothing is loaded, and no code of the model's own is run."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from maskft.errors import MaskftError, first_line
from maskft.storage.files import is_folder
from maskft.tuner import MaskLayer
from maskft.tuner.zero import loading_whole

_MAX_MODULES = 300_000  # several times those of any model with one module an expert


@dataclass(frozen=True)
class ModelLayout:
    """A model without weights, and its linear layers by name."""

    model: PreTrainedModel
    layers: dict[str, MaskLayer]

    def name_of(self, module: str) -> str | None:
        """The name here of a layer of a model that may be the same one with a head, or without."""
        prefix = f"{self.model.base_model_prefix}."
        names = (module, module.removeprefix(prefix), prefix + module)
        return next((name for name in names if name in self.layers), None)

    def find(self, module: str) -> MaskLayer | None:
        """A module, or None where the model has no such linear layer."""
        return self.layers.get(self.name_of(module) or "")

    def stored_as(self, keys: Iterable[str]) -> dict[str, str]:
        """The tensor of the model's files that each of its weights is, as Transformers finds it when it loads them.

        Weights that it makes of several tensors, or of a part of one, are left out.
        """
        conversions = get_model_conversion_mapping(self.model)
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        prefix, names = self.model.base_model_prefix, self.model.state_dict()
        found: dict[str, str] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, converted = rename_source_key(key, renamings, converters, prefix, names)
            if name not in names and key in names:
                name, converted = key, None
            if converted is None:
                found.setdefault(name, key)
        return found


def read_config(model_name_or_path: str) -> Any:
    """The model's configuration, for a look at its structure: attention is the plain one, which loads nothing.

    Raises:
        MaskftError: there is none, or it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
        config._attn_implementation = "eager"
        return config
    except Exception as error:  # whatever values of other types make Transformers raise
        raise MaskftError(
            f"No model can be read from {model_name_or_path!r}; give a folder with config.json or a hub name "
            f"({first_line(error)})"
        ) from error


def without_weights(config: Any, model_name_or_path: str, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of a configuration, on the meta device; of `kind`, or else a causal language model.

    Raises:
        MaskftError: the configuration is not one of a causal language model.
    """
    try:
        with torch.device("meta"), loading_whole(), _of_few_modules():
            if kind is not None:
                return kind(config)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever values of other types make Transformers raise
        raise MaskftError(
            f"{model_name_or_path!r} holds a model of the type {config.model_type!r}, which Transformers cannot read "
            f"as a causal language model; give one that is ({first_line(error)})"
        ) from error
    return model


@contextmanager
def _of_few_modules() -> Iterator[None]:
    """A configuration may ask for any number of layers or experts, which take time and memory without weights too."""
    numbers = count(1)

    def refuse_many(*_: Any) -> None:
        if next(numbers) > _MAX_MODULES:
            raise ValueError(f"it has more than {_MAX_MODULES} modules")

    hook = register_module_module_registration_hook(refuse_many)
    try:
        yield
    finally:
        hook.remove()


def read_layout(model_path: str | Path, modules: Collection[str] = ()) -> ModelLayout:
    """The linear layers of a causal language model; given `modules`, of the class in its file where that has them all.

    Raises:
        MaskftError: its configuration cannot be read, or is not one of a causal language model.
    """
    config = read_config(str(model_path))
    for name in (config.architectures or ()) if modules else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            layout = _layout_of(without_weights(config, str(model_path), kind))
            if all(map(layout.find, modules)):
                return layout
    return _layout_of(without_weights(config, str(model_path)))


def layer_shapes(model_path: str | Path | None, modules: Collection[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the layers of these names, as far as the model's folder is here and tells them."""
    with suppress(MaskftError):
        if model_path and is_folder(model_path):
            layout = read_layout(model_path, modules)
            layers = {name: layout.find(name) for name in modules}
            return {name: (layer.out_features, layer.in_features) for name, layer in layers.items() if layer}
    return {}


def _layout_of(model: PreTrainedModel) -> ModelLayout:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return ModelLayout(model, {name: MaskLayer(module) for name, module in linear.items()})
