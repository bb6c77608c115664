"""The tuner: puts masked layers into a model, and says what an adapter's file holds."""

import logging
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskft.errors import MaskftError
from maskft.storage.fingerprint import fingerprint
from maskft.storage.tensors import MASK_KEY, PEFT_PREFIX, SCORES_KEY, masks_and_scores
from maskft.tuner.adapter_masks import AdapterMasks, owners_of
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer
from maskft.tuner.reference import load_reference, weight_of
from maskft.tuner.sharding import is_sharded, whole
from maskft.tuner.targets import check_targets, is_target, plain_name, unwrapped_modules

logger = logging.getLogger(__name__)

_TRL_REFERENCE = "ref"


class _MaskConfigs(UserDict[str, MaskConfig]):
    """The configurations of a masked model's adapters, in which every tuner that comes to it puts its own."""

    def __setitem__(self, adapter_name: str, config: MaskConfig) -> None:
        if not isinstance(config, MaskConfig):
            raise MaskftError(
                f"The model has a mask, and a {type(config).__name__} laid over it would lose the mask once it is "
                "merged; merge the mask first (PeftModel.merge_and_unload(), or maskft merge), or unload() it."
            )
        super().__setitem__(adapter_name, config)


class MaskModel(BaseTuner):
    """A model whose linear layers are masked; made by `peft.get_peft_model(model, MaskConfig(...))`."""

    prefix = "maskft_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 -- PEFT's name; the modules are found, not listed

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        present = [masks.adapter_name for masks in _all_masks(model)]
        # Transformers' own `load_adapter` gives one configuration, and puts several adapters on one model.
        if present and (isinstance(peft_config, dict) or adapter_name in present):
            raise MaskftError(
                f"The model has a mask already ({', '.join(map(repr, present))}), and two of them would be mixed up; "
                "call unload() on the PeftModel that has it (delete_adapter() where Transformers loaded it), or "
                "add_adapter() under another name for several masks."
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.peft_config: Any = _MaskConfigs(self.peft_config)
        self.model.peft_config = self.peft_config

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        return peft_config  # checked in `inject_adapter`

    @staticmethod
    def _check_target_module_exists(peft_config: MaskConfig, key: str) -> bool:
        return is_target(peft_config, plain_name(key))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        _check_name(adapter_name, model)
        modules = unwrapped_modules(model)
        targets = {name: modules[name] for name in check_targets(config, model)}
        _refuse_offloaded(targets)
        if not config.inference_mode:
            _refuse_resized(config, model)
            _refuse_random(config, model)
        are_here = not any(module.weight.is_meta for module in targets.values())
        if are_here and nn.Linear(1, 1).weight.is_meta and not config.inference_mode and config.file_digest is None:
            raise MaskftError("A new mask has scores in no file, and `low_cpu_mem_usage` makes none; leave it out.")
        masks = AdapterMasks(adapter_name, config)
        masks.trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        reference = load_reference(config, model, targets) if config.reference == "pretrained" else None
        self.__dict__["_adding"] = masks, reference
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self.__dict__["_adding"]
        if adapter_name == _TRL_REFERENCE:
            # TRL copies parameters with ".default." inside their names, and the names of scores end with the adapter's.
            for other in _all_masks(model):
                if other is not masks and other.config is config and masks.start_as(other):
                    logger.info("The adapter 'ref' starts with the scores of %r, as TRL's.", other.adapter_name)
        masks.begin(model)
        if masks.is_checked:
            masks.refresh()  # here, for a forward that is compiled cannot choose masks
        if dist.is_available() and dist.is_initialized():
            masks.base_fingerprint()  # here, for one process alone may save weights that are split by then

    def _create_and_replace(
        self, peft_config: MaskConfig, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        masks, reference_model = self.__dict__["_adding"]
        current_key = plain_name(current_key)
        reference = None if reference_model is None else weight_of(current_key, reference_model, peft_config)
        if isinstance(target, MaskLayer):
            target.add_adapter(masks, current_key, reference)
            return
        if target._forward_hooks or target._forward_pre_hooks:
            logger.warning("The forward hooks of `%s` do not run while it is masked.", current_key)
        layer = MaskLayer(target)
        layer.add_adapter(masks, current_key, reference)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, which passes over names that no adapter has, and leaves what it refuses half merged.

        Raises:
            MaskftError: an unknown adapter, adapters of different references, or `safe_merge` and a weight that is not
                finite; no layer is merged then.
        """
        self._before_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        if merge:
            self._before_merge(adapter_names, safe_merge)
        all_masks = _all_masks(self.model)
        config: Any = getattr(self.model, "config", None)
        is_tied = getattr(config, "tie_word_embeddings", False)
        try:
            if (
                is_tied
            ):  # PEFT takes embeddings of an encoder and a decoder for ones that came apart, and would write so
                config.tie_word_embeddings = False
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        finally:
            if is_tied:
                config.tie_word_embeddings = True
        for masks in all_masks:
            masks.end()
        return cast(nn.Module, model)

    def _before_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Choose the masks that are to be merged, and refuse what cannot be."""
        unknown = [] if isinstance(adapter_names, str) else set(adapter_names or []).difference(self.peft_config)
        if unknown:
            raise MaskftError(
                f"There is no adapter {', '.join(map(repr, sorted(unknown)))} to merge; `adapter_names` can name "
                f"{', '.join(map(repr, self.peft_config))}."
            )
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, MaskLayer)}
        for name, layer in layers.items():
            wanted = [adapter for adapter in adapter_names or layer.active_adapters if adapter in layer.owners]
            if not wanted:
                continue
            if is_sharded(layer.get_base_layer().weight):
                raise MaskftError(
                    "The weights are split over processes, so no mask is merged into them; save the adapter, and merge "
                    "it in one process (maskft merge)."
                )
            layer.reference([*layer.merged_adapters, *wanted])
            with onload_layer(layer):
                if safe_merge and not torch.isfinite(layer.oriented_weight()).all():
                    raise MaskftError(
                        f"The weight of `{name}` holds NaN or infinite values, so nothing is merged (safe_merge); use "
                        "a base model without them, or merge without `safe_merge`."
                    )
        for masks in _all_masks(self.model):
            if masks.adapter_name in (adapter_names or self.active_adapters):
                masks.final()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls it around each forward, and takes `adapter_names` out of what it passes on.
        if kwargs.get("adapter_names") is not None:
            raise MaskftError(
                "`adapter_names` asks for an adapter for each row of the batch, and one mask holds for all rows; call "
                "set_adapter, and the model once for each adapter."
            )
        yield

    # PEFT's other methods have it; without this, PEFT looks for it in the base model and ends in an AttributeError.
    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a mask has no weighted sum."""
        raise MaskftError(
            "Masks cannot be summed with weights; activate several with base_model.set_adapter([...]), which keeps "
            "what all of them keep."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave every dtype: scores are float32 already, and the reference has that of the weights it stands in for."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> dict[str, Tensor]:
        group = find_group(model, adapter_name)
        masks = {name: mask.cpu() for name, mask in group.final().items()}
        config.base_fingerprint = group.base_fingerprint()
        config.reference_fingerprint = group.reference_fingerprint()
        config.mask_digest = fingerprint(masks)
        # Transformers' own `save_pretrained` puts the prefix in front by itself. PEFT takes the adapter's name out.
        prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
        saved = {f"{prefix}{name}.{MASK_KEY}.{adapter_name}": mask for name, mask in masks.items()}
        for name, layer in group.layers.items() if config.save_scores else ():
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
        try:
            tensors = cls._tensors_to_load(group, state_dict)
        except MaskftError:
            if not group.is_checked and config.file_digest is not None:  # it was made for this file
                _withdraw(model, group)
            raise
        names = {layer: name for name, layer in model.named_modules() if isinstance(layer, MaskLayer)}
        key = SCORES_KEY if group.learns else MASK_KEY
        return {f"{names[layer]}.{key}.{adapter_name}": tensors[name] for name, layer in group.layers.items()}

    @staticmethod
    def _tensors_to_load(group: AdapterMasks, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores of a file, or its masks where the adapter does not learn, checked and in use."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in group.layers.items()}
        masks, scores = masks_and_scores(state_dict, shapes)
        if group.learns and not scores:
            raise MaskftError(
                f"The adapter for {group.adapter_name!r} holds masks but no scores, so it cannot be trained further; "
                "load a checkpoint of `maskft train` or of a trainer with maskft.MaskCallback(), which keeps scores in "
                "them (MaskConfig(save_scores=True) does in all that is saved), or start a new adapter."
            )
        if not group.learns and group.is_checked and fingerprint(masks) != fingerprint(group.masks()):
            raise MaskftError(
                f"Adapter {group.adapter_name!r} holds the masks of another file, whose base model was checked; load "
                f"this file under a name of its own, or call delete_adapter({group.adapter_name!r}) first."
            )
        for name, layer in group.layers.items():
            layer.set_mask(group.adapter_name, masks[name])
        group.check()
        return scores if group.learns else masks


def find_group(model: nn.Module, adapter_name: str) -> AdapterMasks:
    """The masks of an adapter, found through the layers of any model that has them.

    Raises:
        MaskftError: no layer of the model has a mask of that name.
    """
    for masks in _all_masks(model):
        if masks.adapter_name == adapter_name:
            return masks
    raise MaskftError(f"The model has no mask adapter named {adapter_name!r}.")


def _all_masks(model: nn.Module) -> list[AdapterMasks]:
    return owners_of(module for module in model.modules() if isinstance(module, MaskLayer))


def _withdraw(model: PeftModel, masks: AdapterMasks) -> None:
    """Leave the model as it was before this adapter was added."""
    if len(_all_masks(model)) > 1:
        model.delete_adapter(masks.adapter_name)
        return
    for name, parameter in model.base_model.unload().named_parameters():
        parameter.requires_grad_(name in masks.trained_before)


def _check_name(adapter_name: str, model: nn.Module) -> None:
    if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
        raise MaskftError(f"An adapter cannot be named {adapter_name!r}, which is a name of PyTorch's; give another.")
    if any(masks.adapter_name == adapter_name for masks in _all_masks(model)):
        raise MaskftError(f"The model has a mask named {adapter_name!r} already; call delete_adapter() first.")


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
    if not name or size is None:
        return
    try:
        saved = type(cast(PreTrainedModel, model).config).from_pretrained(name, local_files_only=True).vocab_size
    except Exception:  # none is here, or whatever a broken file makes Transformers raise
        return
    if saved != size:
        raise MaskftError(
            f"The model has a vocabulary of {size} and {name} one of {saved}, so it was resized since it was loaded, "
            "and a mask's file holds no embeddings; save the model with its new vocabulary, load it from there, and "
            "mask that one."
        )


def _refuse_random(config: MaskConfig, model: nn.Module) -> None:
    """Refuse a head that is in no file: loaded again, it would be another one than the mask was learned with."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # Transformers marks what it has read; a model that was made from its configuration has no marks at all.
    is_read = {name: hasattr(p, "_is_hf_initialized") for name, p in model.named_parameters() if "maskft_" not in name}
    random = [name for name, is_one in is_read.items() if not is_one and not name.startswith(prefix)]
    if random and any(is_read.values()):
        raise MaskftError(
            f"`{random[0]}` is not in {config.base_model_name_or_path or 'the base model'}, so it was made at random, "
            "and a mask's file holds no weights; save the model as it is, load it from there, and mask that one."
        )
