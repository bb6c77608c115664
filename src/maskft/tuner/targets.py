"""Which modules of a model are masked."""

import copy
import logging
import re
from collections.abc import Collection, Mapping, Sequence

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskft.errors import MaskftError, nearest
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer, is_quantized

logger = logging.getLogger(__name__)

_ANY_NAME = "[^.]*"


def check_targets(config: MaskConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `config` masks in `model`, all checks done before the model is changed.

    Where `target_modules` is left open, :func:`default_target_modules` is written into `config`.

    Raises:
        MaskftError: a name that matches nothing, a layer that does not exist, `layers_to_transform` beside full module
            names (PEFT would ignore it), or a module that cannot be masked.
    """
    model = getattr(model, "_orig_mod", model)  # where it is compiled
    modules = unwrapped_modules(model)
    for name, module in modules.items():
        if isinstance(module, BaseTunerLayer):
            raise MaskftError(
                f"`{name}` has an adapter of another method ({type(module).__name__}); fold it into the weights first "
                "(merge_and_unload()), and mask the result."
            )
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        targets = config.target_modules = default_target_modules(model)
    if config.layers_to_transform is not None:
        _check_layers(config, modules)
    if isinstance(targets, list):
        _check_names(targets, config, modules, type(model).__name__)
    matched = [name for name in modules if name and is_target(config, name)]
    if not matched:
        raise MaskftError(
            f"`target_modules={targets}` with `exclude_modules={config.exclude_modules}`, `layers_to_transform="
            f"{config.layers_to_transform}` and `layers_pattern={config.layers_pattern}` matches no module of "
            f"{type(model).__name__}; correct these settings."
        )
    reasons, embeddings = _reasons_against(matched, modules), _embeddings(model)
    for name in matched:
        reason = reasons.get(name)
        if modules[name] in embeddings:
            reason = "it is the model's input or output embedding, whose weight is often one and the same tensor"
        if reason:
            raise MaskftError(f"`{name}` cannot be masked: {reason}. Take it out of `target_modules`.")
    return matched


def is_target(config: MaskConfig, name: str) -> bool:
    """Whether a module of this name is to be masked.

    As PEFT's own rule, which counts layers only below a name of their own: in a bare `LlamaModel` it finds none.
    """
    of_all_layers = copy.copy(config)
    of_all_layers.layers_to_transform = None
    is_named = bool(BaseTuner._check_target_module_exists(of_all_layers, name))
    is_of_all = config.layers_to_transform is None
    return is_named and (is_of_all or layer_index(name, config.layers_pattern) in _wanted_layers(config))


def layer_index(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The index of a module's layer in the list of layers; None where it lies in no such list.

    Args:
        name: of the module in the base model.
        layers_pattern: name of the list of layers, or several of which the first that fits counts. Default: the first
            numbered list (in mixtures of experts, those are numbered too).
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [_ANY_NAME]:
        match = re.search(rf"(?:^|\.)(?:{pattern})\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def _wanted_layers(config: MaskConfig) -> list[int]:
    wanted = config.layers_to_transform
    return [wanted] if isinstance(wanted, int) else list(wanted or [])


def _check_layers(config: MaskConfig, modules: Collection[str]) -> None:
    present = (layer_index(name, config.layers_pattern) for name in modules)
    indices = sorted({index for index in present if index is not None})
    where = f"the list of layers {config.layers_pattern!r}" if config.layers_pattern else "the model"
    for layer in _wanted_layers(config):
        if layer not in indices:
            allowed = f"layers {indices[0]} to {indices[-1]}" if indices else "no numbered layers"
            raise MaskftError(
                f"`layers_to_transform` names layer {layer}, but {where} has {allowed}; correct one of them."
            )


def _check_names(targets: list[str], config: MaskConfig, modules: Collection[str], model_name: str) -> None:
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            suffixes = sorted({name.rpartition(".")[2] for name in modules if name})
            raise MaskftError(
                f"`target_modules` names {target!r}, which matches no module of {model_name}"
                f"{nearest(target, suffixes)}; correct or remove it."
            )
        if target in modules and config.layers_to_transform is not None:
            raise MaskftError(
                f"`layers_to_transform={config.layers_to_transform}` has no effect on the full module name "
                f"{target!r}; give the last part of the name, or leave `layers_to_transform` out."
            )


def default_target_modules(model: nn.Module) -> list[str]:
    """Names of every linear layer of attention and MLP: those inside the model's numbered layers.

    A name is as short as it can be without meaning a module outside of them too, or one that cannot be masked.

    Raises:
        MaskftError: the model has none.
    """
    modules = unwrapped_modules(model)
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    inside = [name for name in linear if layer_index(name) is not None]
    reasons = _reasons_against(inside, modules)
    can_be_masked = {name for name in inside if name not in reasons}
    # Together, since a mixture of experts has ten thousands of modules.
    meant = {suffix for name in modules if name not in can_be_masked for suffix in _suffixes(name)}
    names = sorted({next((s for s in _suffixes(name) if s not in meant), name) for name in can_be_masked})
    left = [f"`{name}`: {reason}" for name, reason in reasons.items()]
    if not names:
        why = f"that can be masked ({left[0]})" if left else "inside numbered transformer layers"
        raise MaskftError(f"{type(model).__name__} has no linear layers {why}; name `target_modules`.")
    if left:
        logger.warning("%d linear layers are not masked, the first is %s.", len(left), left[0])
    fused = [n for n, m in modules.items() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    if fused:
        one = f"`{fused[0]}` ({type(modules[fused[0]]).__name__})"
        logger.warning("%d modules keep several weights in one tensor and are not masked, as %s.", len(fused), one)
    return names


def _suffixes(name: str) -> list[str]:
    """The last part of a module's name, the last two, and so on to the whole name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _embeddings(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # a model of speech, say, has none
        return []


def _reasons_against(names: Sequence[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why modules cannot be masked where they stand, by name; those that can are left out."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    reasons = {}
    for name in names:
        module, above, child = modules[name], *name.rpartition(".")[::2]
        reason = why_not_maskable(module)
        if reason is None:
            sharing = [other for other in owners[id(module.weight)] if other != name]
            reason = f"`{sharing[0]}` has the same weight, and a mask holds for one module" if sharing else None
        if reason is None and _reads_weight(modules[above], child):
            reason = f"{type(modules[above]).__name__} reads its weight instead of calling it"
        if reason is not None:
            reasons[name] = reason
    return reasons


def _reads_weight(parent: nn.Module, child: str) -> bool:
    kind = type(parent).__name__
    return (
        isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        or kind == "WavLMAttention"
        or (kind.endswith("Mixer") and child in ("dt_proj", "out_proj", "x_proj"))  # Mamba's and its relatives'
        or (kind.endswith("Router") and child == "classifier")  # LongCat's
    )


def why_not_maskable(module: nn.Module) -> str | None:
    """The reason why a module cannot be masked, or None where it can."""
    kind = type(module)
    if not isinstance(module, nn.Linear | Conv1D):
        return f"it is a {kind.__name__}, and only torch.nn.Linear and Transformers' Conv1D can be masked"
    # Falcon's does what torch's does.
    if kind.forward not in (nn.Linear.forward, Conv1D.forward) and kind.__name__ != "FalconLinear":
        return f"it is a {kind.__name__}, which does more than multiply by its weight"
    if "weight" not in module._parameters:
        return "its weight is no parameter of its own but computed from others"
    if is_quantized(module.weight):
        told = f"{type(module.weight).__name__}, {module.weight.dtype}"
        return f"its weight is quantized ({told}); load the model without quantization"
    return None


def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their name in the base model: masked layers stand for what they wrap.

    One that stands in several places has a name for each; what is inside of it, for the first alone.
    """
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        modules[name] = module.get_base_layer() if isinstance(module, MaskLayer) else module
        if isinstance(module, MaskLayer) or id(module) in seen:
            return
        seen.add(id(module))
        for part, child in module._modules.items():
            if child is not None:
                walk(plain_name(f"{name}.{part}" if name else part), child)

    walk("", model)
    return modules


def plain_name(name: str) -> str:
    """A module's name without what `torch.compile` of a part of the model puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
