"""The tuner: finds the modules to mask, and says what an adapter's file holds."""

import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.integrations import skip_init_on_device
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from maskft.errors import MaskftError, first_line, nearest
from maskft.masks import check_packed
from maskft.storage.coding import decode_mask
from maskft.storage.fingerprint import fingerprint
from maskft.tuner.adapter_masks import AdapterMasks
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer, why_not_maskable
from maskft.tuner.sharding import is_sharded, whole

logger = logging.getLogger(__name__)

MASK_KEY = "maskft_mask"
SCORES_KEY = "maskft_scores"
CODED_KEY = "maskft_coded"
PEFT_PREFIX = "base_model.model."
_ANY_NAME = "[^.]*"
_TRL_REFERENCE = "ref"
_HEADS_BESIDE = ("TOKEN_CLS", "QUESTION_ANS")  # tasks for which PEFT adds a head, after it has asked the tuner


class MaskModel(BaseTuner):
    """A model whose linear layers are masked; made by `peft.get_peft_model(model, MaskConfig(...))`."""

    prefix = "maskft_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 -- PEFT's name; the modules are found, not listed

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        task = getattr(peft_config.task_type, "value", peft_config.task_type)
        if peft_config.modules_to_save or task in _HEADS_BESIDE:  # PEFT adds heads to it by itself
            raise MaskftError(
                f"task_type={task!r} would train {peft_config.modules_to_save or 'a head'} beside the masks, and a "
                "mask leaves every other weight as it is; leave `task_type` out, and the head is the model's own."
            )
        check_targets(peft_config, self.model)
        _refuse_resized(peft_config, self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: MaskConfig, key: str) -> bool | re.Match[str] | None:
        """As PEFT's, which counts layers only below a name of their own: in a bare `LlamaModel` it finds none."""
        of_all_layers = copy.copy(peft_config)
        of_all_layers.layers_to_transform = None
        found: bool | re.Match[str] | None = BaseTuner._check_target_module_exists(of_all_layers, key)
        if found and peft_config.layers_to_transform is not None:
            return layer_index(key, peft_config.layers_pattern) in _wanted_layers(peft_config)
        return found

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
            raise MaskftError(
                f"An adapter cannot be named {adapter_name!r}, which is a name of PyTorch's; give another."
            )
        config = self.peft_config[adapter_name]
        modules = _unwrapped_modules(model)
        targets = {name: modules[name] for name in check_targets(config, model)}
        _refuse_offloaded(targets)
        reference = load_reference(config, model, targets) if config.reference == "pretrained" else None
        self.__dict__["_reference_model"] = reference
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self.__dict__["_reference_model"]
        groups = self.__dict__["_mask_groups"]
        group = groups[adapter_name]
        if adapter_name == _TRL_REFERENCE:
            # TRL copies parameters with ".default." inside their names, and the names of scores end with the adapter's.
            for other in groups.values():
                if other is not group and other.config is config and group.start_as(other):
                    logger.info(
                        "The adapter 'ref' starts with the scores of %r, as TRL's reference.", other.adapter_name
                    )
        if group.is_checked:
            group.refresh()  # here, for a forward that is compiled cannot choose masks
        if dist.is_available() and dist.is_initialized():
            group.base_fingerprint()  # here, for one process alone may save weights that are split by then

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__["_mask_groups"].pop(adapter_name, None)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, which passes over names that no adapter has, and leaves what it refuses half merged.

        Raises:
            MaskftError: an unknown adapter, adapters of different references, or `safe_merge` and a weight that is not
                finite; no layer is merged then.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As PEFT's; see :meth:`merge_adapter`."""
        self._check_merge(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _require_adapters(self, adapter_names: list[str] | None) -> None:
        unknown = [] if isinstance(adapter_names, str) else set(adapter_names or []).difference(self.peft_config)
        if unknown:
            raise MaskftError(
                f"There is no adapter {', '.join(map(repr, sorted(unknown)))} to merge; `adapter_names` can name "
                f"{', '.join(map(repr, self.peft_config))}."
            )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._require_adapters(adapter_names)
        for group in self.__dict__.get("_mask_groups", {}).values():
            group.see_all_changes()
        for name, layer in self.model.named_modules():
            if not isinstance(layer, MaskLayer):
                continue
            wanted = [adapter for adapter in adapter_names or layer.active_adapters if adapter in layer.groups]
            if not wanted:
                continue
            layer.reference([*layer.merged_adapters, *wanted])
            with onload_layer(layer):
                if safe_merge and not torch.isfinite(layer.oriented_weight()).all():
                    raise MaskftError(
                        f"The weight of `{name}` holds NaN or infinite values, so nothing is merged (safe_merge); use "
                        "a base model without them, or merge without `safe_merge`."
                    )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls it around each forward, and takes `adapter_names` out of what it passes on.
        if kwargs.get("adapter_names") is not None:
            raise MaskftError(
                "`adapter_names` asks for an adapter for each row of the batch, and one mask holds for all rows; call "
                "set_adapter, and the model once for each adapter."
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave every dtype: scores are float32 already, and the reference has that of the weights it stands in for."""

    def _create_and_replace(
        self,
        peft_config: MaskConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        groups = self.__dict__.setdefault("_mask_groups", {})
        group = groups.get(adapter_name)
        if group is None or group.config is not peft_config:
            group = groups[adapter_name] = AdapterMasks(adapter_name, peft_config)
        reference_model = self.__dict__["_reference_model"]
        reference = None
        if reference_model is not None:
            reference = _weight_of(current_key, reference_model, peft_config)
        if isinstance(target, MaskLayer):
            target.add_adapter(adapter_name, peft_config, group, current_key, reference)
        else:
            if target._forward_hooks or target._forward_pre_hooks:
                logger.warning("The forward hooks of `%s` do not run while it is masked.", current_key)
            layer = MaskLayer(target)
            layer.add_adapter(adapter_name, peft_config, group, current_key, reference)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        group = find_group(model, adapter_name)
        group.require_choice_of_all()
        group.see_all_changes()
        masks = {name: mask.cpu() for name, mask in group.masks().items()}
        config.base_fingerprint = group.base_fingerprint()
        config.reference_fingerprint = group.reference_fingerprint()
        config.mask_digest = fingerprint(masks)
        # Transformers' own `save_pretrained` puts the prefix in front by itself. PEFT takes the adapter's name out.
        prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
        saved = {f"{prefix}{name}.{MASK_KEY}.{adapter_name}": mask for name, mask in masks.items()}
        if config.save_scores:
            for name, layer in group.layers.items():
                key = f"{prefix}{name}.{SCORES_KEY}.{adapter_name}"
                # What a trainer gathered from all processes, where one process alone is saving.
                gathered = state_dict.get(key)
                if gathered is None or is_sharded(gathered) or gathered.numel() == 0:
                    gathered = whole(layer.maskft_scores.stored(adapter_name))
                saved[key] = gathered.detach()
        return saved

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT does, which calls this on all that it is about to save: embeddings have no place beside masks."""
        if f".{cls.prefix}" not in key:
            raise MaskftError(
                f"`{key}` would be saved beside the masks, since the vocabulary was resized or "
                "`save_embedding_layers` is set; a mask's file holds no weights: save the adapter with "
                "`save_embedding_layers=False`, and the base model as it was before `get_peft_model`."
            )
        plain: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        group = find_group(model, adapter_name)
        plain = decoded({key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()})
        masks, scores = check_adapter_tensors(
            plain, {name: (layer.out_features, layer.in_features) for name, layer in group.layers.items()}
        )
        trainable = all(layer.has_scores(adapter_name) for layer in group.layers.values())
        if trainable and not scores:
            raise MaskftError(
                f"The adapter for {adapter_name!r} holds masks but no scores, so it cannot be trained further; load "
                "a checkpoint of `maskft train` or of a trainer with maskft.MaskCallback(), which keeps scores in them "
                "(MaskConfig(save_scores=True) does in all that is saved), or start a new adapter."
            )
        if not trainable and group.is_checked and fingerprint(masks) != fingerprint(group.masks()):
            raise MaskftError(
                f"Adapter {adapter_name!r} holds the masks of another file, whose base model was checked; load this "
                f"file under a name of its own, or call delete_adapter({adapter_name!r}) first."
            )
        for name, layer in group.layers.items():
            layer.set_mask(adapter_name, masks[name])
        group.check()
        names = {layer: name for name, layer in model.named_modules() if isinstance(layer, MaskLayer)}
        key, tensors = (SCORES_KEY, scores) if trainable else (MASK_KEY, masks)
        return {f"{names[layer]}.{key}.{adapter_name}": tensors[name] for name, layer in group.layers.items()}


def load_reference(config: MaskConfig, model: nn.Module, targets: Mapping[str, nn.Module]) -> PreTrainedModel:
    """The model before fine-tuning, of the class of `model`; its weights have the shapes of the modules in `targets`.

    Raises:
        MaskftError: it cannot be read, is an adapter or of another type, lacks a weight or has one of another shape, or
            `model` is none of Transformers'.
    """
    name = config.reference_model_name_or_path
    if not isinstance(model, PreTrainedModel):
        raise MaskftError(
            f"reference='pretrained' needs a model of Transformers, got a {type(model).__name__}: the weights before "
            "fine-tuning are read with its from_pretrained."
        )
    # Inside PEFT's `low_cpu_mem_usage`, which sends new parameters to the meta device: these are here to be read.
    from_pretrained = skip_init_on_device(type(model).from_pretrained)
    with _unreadable(name):
        adapter = find_adapter_config_file(name)
        types = set() if adapter else _model_types(name)
    if adapter:
        raise MaskftError(
            f"`reference_model_name_or_path` names {name!r}, an adapter, which would be read without its changes; give "
            "the model before fine-tuning, or merge the adapter and give the merged model."
        )
    if types and model.config.model_type not in types:
        raise MaskftError(
            f"`reference_model_name_or_path` names {name!r}, a model of the type {', '.join(sorted(types))}, and the "
            f"fine-tuned one is of the type {model.config.model_type}; give the one before fine-tuning."
        )
    with _unreadable(name):
        reference, found = from_pretrained(name, dtype=model.dtype, output_loading_info=True)
    lacking = [target for target in targets if f"{target}.weight" in found["missing_keys"]]
    if lacking:
        raise MaskftError(
            f"{name!r} lacks the weight of {len(lacking)} of the {len(targets)} modules to be masked, the first is "
            f"`{lacking[0]}`; it is incomplete or another model: give the one before fine-tuning as "
            "`reference_model_name_or_path`."
        )
    _check_reference(config, targets, reference)
    return cast(PreTrainedModel, reference)


@contextmanager
def _unreadable(name: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MaskftError(
            f"`reference_model_name_or_path` names {name!r}, from which no model can be read; give the folder or hub "
            f"name of the model before fine-tuning ({first_line(error)})"
        ) from error


def _model_types(name: str | None) -> set[str]:
    """The types of the models that a folder may be read as: its own, and those of the parts it is composed of."""
    settings, _ = PreTrainedConfig.get_config_dict(name)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    return {part["model_type"] for part in parts if part.get("model_type")}


def _refuse_offloaded(targets: Mapping[str, nn.Module]) -> None:
    for name, module in targets.items():
        # Weights on the meta device without accelerate's hook get their values later.
        if module.weight.is_meta and hasattr(module, "_hf_hook"):
            raise MaskftError(
                f"The weight of `{name}` is offloaded to the CPU or the disk, and a mask needs it in memory; load the "
                "model with a device_map that offloads nothing that is masked, or mask layers that are not offloaded."
            )


def _refuse_resized(config: MaskConfig, model: nn.Module) -> None:
    """Refuse a vocabulary that differs from the saved model's: PEFT would put embeddings into the adapter's file."""
    name, size = config.base_model_name_or_path, getattr(getattr(model, "config", None), "vocab_size", None)
    if config.inference_mode or not name or size is None:
        return
    try:
        saved = type(cast(PreTrainedModel, model).config).from_pretrained(name, local_files_only=True).vocab_size
    except (OSError, ValueError, AttributeError):
        return
    if saved != size:
        raise MaskftError(
            f"The model has a vocabulary of {size} and {name} one of {saved}, so it was resized since it was loaded, "
            "and a mask's file holds no embeddings; save the model with its new vocabulary, load it from there, and "
            "mask that one."
        )


def _check_reference(config: MaskConfig, targets: Mapping[str, nn.Module], reference_model: PreTrainedModel) -> None:
    """Refuse a reference of other shapes, or one with which no mask learns, before the model is changed."""
    are_same = not config.inference_mode
    for name, module in targets.items():
        reference, weight = _weight_of(name, reference_model, config), MaskLayer(module).oriented_weight()
        found, wanted = reference.shape, weight.shape
        if found != wanted:
            raise MaskftError(
                f"`{name}` has the shape {tuple(wanted)}, and {tuple(found)} in "
                f"{config.reference_model_name_or_path!r}, which is another model; give the one before fine-tuning."
            )
        has_values = not (weight.is_meta or is_sharded(weight))
        are_same = are_same and has_values and torch.equal(reference.to(weight), weight)
    if are_same:
        raise MaskftError(
            f"The reference model {config.reference_model_name_or_path!r} has the same weights as the model in all "
            "masked places, so no mask can change anything; give the model before fine-tuning."
        )


def _weight_of(name: str, reference_model: PreTrainedModel, config: MaskConfig) -> Tensor:
    try:
        return MaskLayer(reference_model.get_submodule(name)).oriented_weight()
    except AttributeError as error:
        raise MaskftError(
            f"{config.reference_model_name_or_path!r} has no module `{name}`, so it is another model; give the one "
            "before fine-tuning as `reference_model_name_or_path`."
        ) from error


def find_group(model: nn.Module, adapter_name: str) -> AdapterMasks:
    """The masks of an adapter, found through the layers of any model that has them.

    Raises:
        MaskftError: no layer of the model has a mask of that name.
    """
    for module in model.modules():
        if isinstance(module, MaskLayer) and adapter_name in module.groups:
            return module.groups[adapter_name]
    raise MaskftError(f"The model has no mask adapter named {adapter_name!r}.")


def decoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter with its compressed masks as packed ones.

    Raises:
        MaskftError: see :func:`maskft.storage.coding.decode_mask`.
    """
    plain = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind == CODED_KEY:
            plain[f"{name}.{MASK_KEY}"] = decode_mask(value, name)
        else:
            plain[key] = value
    return plain


def check_adapter_tensors(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Check the tensors of an adapter against the modules they are for.

    Args:
        tensors: as in the file, without PEFT's prefix: `<module>.maskft_mask` and perhaps `<module>.maskft_scores`.
        shapes: (out_features, in_features) of each masked module.

    Returns:
        Packed masks and scores (empty where the file has none) by module.

    Raises:
        MaskftError: missing or unexpected tensors, or one of the wrong shape or dtype.
    """
    masks = {k.removesuffix(f".{MASK_KEY}"): v for k, v in tensors.items() if k.endswith(f".{MASK_KEY}")}
    scores = {k.removesuffix(f".{SCORES_KEY}"): v for k, v in tensors.items() if k.endswith(f".{SCORES_KEY}")}
    missing = sorted(set(shapes) - set(masks))
    if missing:
        raise MaskftError(
            f"The adapter's file has no mask for {len(missing)} of {len(shapes)} modules, the first is `{missing[0]}`; "
            "it is damaged or was made for other `target_modules` or layers."
        )
    unexpected = sorted(set(masks) - set(shapes))
    if unexpected:
        raise MaskftError(
            f"The adapter's file has masks for {len(unexpected)} modules that are not to be masked here, the first is "
            f"`{unexpected[0]}`; it was made for another model, other `target_modules` or other layers."
        )
    for name, mask in masks.items():
        check_packed(mask, shapes[name], name)
    for name, value in scores.items():
        if value.dtype != torch.float32 or tuple(value.shape) != shapes.get(name):
            raise MaskftError(f"The scores of `{name}` do not fit its weight; the checkpoint is damaged.")
    if scores and len(scores) != len(masks):
        raise MaskftError(f"The checkpoint has scores for {len(scores)} of {len(masks)} modules; it is damaged.")
    return masks, scores


def default_target_modules(model: nn.Module) -> list[str]:
    """Names of every linear layer of attention and MLP: those inside the model's numbered layers.

    A name is as short as it can be without meaning a module outside of them too, or one that cannot be masked.

    Raises:
        MaskftError: the model has none.
    """
    modules = _unwrapped_modules(model)
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    in_layers = {name for name in linear if layer_index(name) is not None}
    reasons = _reasons_against(linear, modules)
    inside = [name for name in linear if name in in_layers and name not in reasons]
    can_be_masked = set(inside)
    # Together, since a mixture of experts has ten thousands of modules.
    meant = {suffix for name in modules if name not in can_be_masked for suffix in _suffixes(name)}
    names = sorted({next((s for s in _suffixes(name) if s not in meant), name) for name in inside})
    if not names:
        why = next(
            (f"that can be masked (`{name}`: {why})" for name, why in reasons.items() if name in in_layers), None
        )
        why = why or "inside numbered transformer layers"
        raise MaskftError(f"{type(model).__name__} has no linear layers {why}; name `target_modules`.")
    left = [name for name in reasons if name in in_layers]
    if left:
        logger.warning("%d linear layers are not masked, the first is `%s`: %s.", len(left), left[0], reasons[left[0]])
    fused = [n for n, m in modules.items() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    if fused:
        logger.warning(
            "%d modules keep several weights in one tensor and are not masked, the first is `%s` (%s).",
            len(fused),
            fused[0],
            type(modules[fused[0]]).__name__,
        )
    return names


def _suffixes(name: str) -> list[str]:
    """The last part of a module's name, the last two, and so on to the whole name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def check_targets(config: MaskConfig, model: nn.Module) -> list[str]:
    """Names of the modules that `config` masks in `model`, all checks done before the model is changed.

    Where `target_modules` is left open, :func:`default_target_modules` is written into `config`.

    Raises:
        MaskftError: a name that matches nothing, a layer that does not exist, `layers_to_transform` beside full module
            names (PEFT would ignore it), or a module that cannot be masked.
    """
    modules = _unwrapped_modules(model)
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
        suffixes = sorted({name.rpartition(".")[2] for name in modules if name})
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise MaskftError(
                    f"`target_modules` names {target!r}, which matches no module of {type(model).__name__}"
                    f"{nearest(target, suffixes)}; correct or remove it."
                )
            if target in modules and config.layers_to_transform is not None:
                raise MaskftError(
                    f"`layers_to_transform={config.layers_to_transform}` has no effect on the full module name "
                    f"{target!r}; give the last part of the name, or leave `layers_to_transform` out."
                )
    matched = [name for name in modules if name and MaskModel._check_target_module_exists(config, name)]
    if not matched:
        raise MaskftError(
            f"`target_modules={targets}` with `exclude_modules={config.exclude_modules}`, `layers_to_transform="
            f"{config.layers_to_transform}` and `layers_pattern={config.layers_pattern}` matches no module of "
            f"{type(model).__name__}; correct these settings."
        )
    embeddings = _embeddings(model)
    reasons = _reasons_against(matched, modules)
    for name in matched:
        reason = reasons.get(name)
        if modules[name] in embeddings:
            reason = "it is the model's input or output embedding, whose weight is often one and the same tensor"
        if reason:
            raise MaskftError(f"`{name}` cannot be masked: {reason}. Take it out of `target_modules`.")
    return matched


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
        parent = modules.get(above)
        kind = type(parent).__name__
        reason = why_not_maskable(module)
        if reason is None:
            sharing = [other for other in owners[id(module.weight)] if other != name]
            if sharing:
                reason = f"`{sharing[0]}` has the same weight, and a mask holds for one module"
        if reason is None and (
            isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
            or kind == "WavLMAttention"
            or (kind.endswith("Mixer") and child in ("dt_proj", "out_proj", "x_proj"))  # Mamba's and its relatives'
            or (kind.endswith("Router") and child == "classifier")  # LongCat's
        ):
            reason = f"{kind} reads its weight instead of calling it"
        if reason is not None:
            reasons[name] = reason
    return reasons


def layer_index(name: str, layers_pattern: str | Sequence[str] | None = None) -> int | None:
    """The place of a module's layer in the list of layers; None where it lies in no such list.

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
    found = (layer_index(name, config.layers_pattern) for name in modules)
    indices = sorted({index for index in found if index is not None})
    where = f"the list of layers {config.layers_pattern!r}" if config.layers_pattern else "the model"
    for layer in _wanted_layers(config):
        if layer not in indices:
            allowed = f"layers {indices[0]} to {indices[-1]}" if indices else "no numbered layers"
            correct = "the number, or `layers_pattern`" if config.layers_pattern else "the number"
            raise MaskftError(
                f"`layers_to_transform` names layer {layer}, but {where} has {allowed}; correct {correct}."
            )


def _unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
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
                walk(f"{name}.{part}" if name else part, child)

    walk("", model)
    return modules
