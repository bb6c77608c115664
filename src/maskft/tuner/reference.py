"""The model before fine-tuning, whose weights stand where a mask leaves a change out."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from maskft.errors import MaskftError, first_line, short_repr
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer
from maskft.tuner.sharding import is_sharded


def load_reference(config: MaskConfig, model: nn.Module, targets: Mapping[str, nn.Module]) -> PreTrainedModel:
    """The model before fine-tuning, of the class of `model`; its weights have the shapes of the modules in `targets`.

    Raises:
        MaskftError: it cannot be read, is an adapter or of another type, lacks a weight or has one of another shape, or
            `model` is none of Transformers'.
    """
    name, model = config.reference_model_name_or_path, getattr(model, "_orig_mod", model)  # where it is compiled
    if not isinstance(model, PreTrainedModel):
        raise MaskftError(
            f"reference='pretrained' needs a model of Transformers, got a {type(model).__name__}; give one of those."
        )
    try:
        if find_adapter_config_file(name) is not None:
            raise MaskftError(
                f"`reference_model_name_or_path` names {name!r}, an adapter, which would be read without its changes; "
                "give the model before fine-tuning, or merge the adapter and give the merged model."
            )
        types = _model_types(name)
        if types and model.config.model_type not in types:
            raise MaskftError(
                f"`reference_model_name_or_path` names {name!r}, a model of the type {', '.join(sorted(types))}, and "
                f"the fine-tuned one is of the type {model.config.model_type}; give the one before fine-tuning."
            )
        refuse_hub_kernel(str(name))
        # Inside PEFT's `low_cpu_mem_usage`, which sends new parameters to the meta device: these are here to be read.
        from_pretrained = skip_init_on_device(type(model).from_pretrained)
        reference, info = from_pretrained(name, dtype=model.dtype, output_loading_info=True, trust_remote_code=False)
    except MaskftError:
        raise
    except Exception as error:  # whatever a broken file makes Transformers raise
        raise MaskftError(
            f"`reference_model_name_or_path` names {name!r}, from which no model can be read; give the folder or hub "
            f"name of the model before fine-tuning ({first_line(error)})"
        ) from error
    lacking = [target for target in targets if f"{target}.weight" in info["missing_keys"]]
    if lacking:
        raise MaskftError(
            f"{name!r} lacks the weight of {len(lacking)} of the {len(targets)} modules to be masked, the first is "
            f"`{lacking[0]}`; it is incomplete or another model: give the one before fine-tuning as "
            "`reference_model_name_or_path`."
        )
    _check_reference(config, targets, reference)
    return cast(PreTrainedModel, reference)


def refuse_hub_kernel(model_name_or_path: str, given: object = None) -> None:
    """Refuse a model whose configuration names code on a hub, which loading it would fetch and run.

    Args:
        given: the attention that the user names, which is allowed.

    Raises:
        MaskftError: it names another one.
    """
    parts: list[Any] = [PreTrainedConfig.get_config_dict(model_name_or_path)[0]]
    for part in parts:  # which grows
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            parts += [value] if isinstance(value, dict | list) else []
            names = value.values() if isinstance(value, dict) else [value]
            if str(key).endswith("_implementation") and any("/" in str(name) and name != given for name in names):
                raise MaskftError(
                    f"config.json of {model_name_or_path!r} sets `{key}` to {short_repr(value)}, which is code on a "
                    "hub; take it out, or name it in --model_init_kwargs to run it."
                )


def _model_types(name: str | None) -> set[str]:
    """The types of the models that a folder may be read as: its own, and those of the parts it is composed of."""
    settings, _ = PreTrainedConfig.get_config_dict(name)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    return {part["model_type"] for part in parts if part.get("model_type")}


def _check_reference(config: MaskConfig, targets: Mapping[str, nn.Module], reference_model: PreTrainedModel) -> None:
    """Refuse a reference of other shapes, or one with which no mask learns, before the model is changed."""
    are_same = not config.inference_mode
    for name, module in targets.items():
        reference, weight = weight_of(name, reference_model, config), MaskLayer(module).oriented_weight()
        if reference.shape != weight.shape:
            raise MaskftError(
                f"`{name}` has the shape {tuple(weight.shape)}, and {tuple(reference.shape)} in "
                f"{config.reference_model_name_or_path!r}, which is another model; give the one before fine-tuning."
            )
        has_values = not (weight.is_meta or is_sharded(weight))
        are_same = are_same and has_values and torch.equal(reference.to(weight), weight)
    if are_same:
        raise MaskftError(
            f"The reference model {config.reference_model_name_or_path!r} has the same weights as the model in all "
            "masked layers, so no mask can change anything; give the model before fine-tuning."
        )


def weight_of(name: str, reference_model: PreTrainedModel, config: MaskConfig) -> Tensor:
    """The weight (out_features, in_features) of a module of the reference model.

    Raises:
        MaskftError: it has no such module.
    """
    try:
        return MaskLayer(reference_model.get_submodule(name)).oriented_weight()
    except AttributeError as error:
        raise MaskftError(
            f"{config.reference_model_name_or_path!r} has no module `{name}`, so it is another model; give the one "
            "before fine-tuning as `reference_model_name_or_path`."
        ) from error
