"""A linear layer with masks: what PEFT puts in the place of each masked module."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from maskft.errors import MaskftError
from maskft.masks import (
    apply_packed,
    masked_linear,
    num_kept_bits,
    pack_mask,
    packed_shape,
    unpack_mask,
)
from maskft.tuner import zero
from maskft.tuner.adapter_masks import AdapterMasks, version_of
from maskft.tuner.config import MaskConfig
from maskft.tuner.sharding import is_sharded, local_part


def why_not_maskable(module: nn.Module) -> str | None:
    """The reason why a module cannot be masked, or None where it can."""
    kind = type(module)
    if not isinstance(module, nn.Linear | Conv1D):
        return f"it is a {kind.__name__}, and only torch.nn.Linear and Transformers' Conv1D can be masked"
    if not module.weight.is_floating_point() or module.weight.element_size() < 2:
        return f"its weight is quantized ({module.weight.dtype}); load the model without quantization"
    # Falcon's does what torch's does.
    if kind.forward not in (nn.Linear.forward, Conv1D.forward) and kind.__name__ != "FalconLinear":
        return f"it is a {kind.__name__}, which does more than multiply by its weight"
    if "weight" not in module._parameters:
        return "its weight is no parameter of its own but computed from others"
    if is_traceable_wrapper_subclass(module.weight) and not isinstance(module.weight, DTensor):
        return f"its weight is quantized ({type(module.weight).__name__}); load the model without quantization"
    return None


class ScoreDict(nn.ParameterDict):
    """Scores by adapter, which `.to()`, `.half()` and the like move but never cast.

    A mask chosen from rounded scores is another mask. Where FSDP2 splits them, it puts the split and the gathered
    parameter here in turn; :meth:`stored` is always the one that the optimizer steps.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if is_sharded(value):
            self.__dict__.setdefault("_split", {})[name] = value
        super().__setattr__(name, value)

    def stored(self, adapter_name: str) -> Tensor:
        """The scores as they are kept between steps: this process's part where they are split."""
        stored: Tensor = self.__dict__.get("_split", {}).get(adapter_name, self[adapter_name])
        return stored

    def is_split(self, adapter_name: str) -> bool:
        """Whether the scores are split over processes."""
        return adapter_name in self and is_sharded(self.stored(adapter_name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreDict":
        def move(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        super()._apply(move, recurse)
        return self


class _Masked:
    """A masked weight, and what tells whether the base weight is still the one that it was made from.

    `base` shares the memory of the base weight, so that no other weight comes to lie at its address.
    """

    def __init__(self, values: Tensor, base: Tensor, address: int, version: int) -> None:
        self.values, self.base, self.address, self.version = values, base, address, version

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` is the base weight, unchanged: changes in place count its version up."""
        return weight.data_ptr() == self.address and version_of(weight) == self.version


def _state_of(scores: Tensor) -> tuple[int, int, int]:
    return id(scores), scores.data_ptr(), version_of(scores)


class _Settled(NamedTuple):
    """What a forward found, and what would have to change for the next one to find something else.

    An attribute of the layer that is set anew ends it in any case, see :meth:`MaskLayer.__setattr__`.
    """

    active: str | list[str]
    parameters: dict[str, Any]  # of the base layer; its bias may be None
    values: Tensor  # of `masked`, and the two others too: an object less to look at in decoding
    address: int
    version: int
    masked: _Masked
    learning: "_Learning | None"


class _Learning(NamedTuple):
    """The same of the scores that a forward trains."""

    adapter_name: str
    group: AdapterMasks
    all_scores: dict[str, nn.Parameter | None]  # by adapter
    scores: nn.Parameter
    device: str
    dtype: torch.dtype  # of the weight


class MaskLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose weight is multiplied by the mask of the active adapter.

    An adapter in training holds float32 scores (out_features, in_features), its packed mask, and the masked weight of
    the current step. An adapter loaded for inference holds the packed mask alone; all of those share one masked weight,
    that of the one used last. With several active adapters the AND of their masks is used.
    """

    base_layer: Any
    active_adapters: Any
    get_base_layer: Callable[[], Any]

    adapter_layer_names = ("maskft_scores",)
    other_param_names = ("maskft_mask", "maskft_reference", "groups")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.oriented_weight().shape
        self.maskft_scores = ScoreDict()
        self.maskft_mask = BufferDict()
        self.maskft_reference = BufferDict()
        self.groups: dict[str, AdapterMasks] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._placeholders: set[str] = set()
        self._chosen_at: dict[str, tuple[int, int, int]] = {}
        self._set_by_hand: set[str] = set()
        self._masked_weights: dict[tuple[str, ...], _Masked] = {}
        self._settled: _Settled | None = None
        self._removed: list[tuple[Tensor, Tensor]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT switches, disables and merges adapters so, and whoever puts another base layer here.
        self.__dict__["_settled"] = None
        super().__setattr__(name, value)

    def oriented_weight(self) -> Tensor:
        """The base weight as (out_features, in_features); a view where the layer stores it transposed."""
        weight: Tensor = self.get_base_layer().weight.data
        return weight.T if self.fan_in_fan_out else weight

    def change(self, adapter_name: str) -> Tensor:
        """What a mask takes out where it leaves a weight out: the weight, or its difference to the reference."""
        weight = self.oriented_weight()
        return weight - self.maskft_reference[adapter_name] if adapter_name in self.maskft_reference else weight

    def add_adapter(
        self,
        adapter_name: str,
        config: MaskConfig,
        group: AdapterMasks,
        module_name: str,
        reference: Tensor | None = None,
    ) -> None:
        """Make room for an adapter; one that is to be trained gets its first scores.

        `reference` stands in the places left out: (out_features, in_features); None is zero.
        """
        if self.merged:
            raise MaskftError(
                f"`{module_name}` has the merged adapters {self.merged_adapters}; unmerge before adding "
                f"{adapter_name!r}."
            )
        if is_sharded(self.get_base_layer().weight):
            raise MaskftError(
                f"The weight of `{module_name}` is split over processes already; add {adapter_name!r} before that."
            )
        self.groups[adapter_name] = group
        group.layers[module_name] = self
        if reference is not None:
            self.maskft_reference.register_buffer(adapter_name, reference.to(self.oriented_weight()), persistent=False)
        if not config.inference_mode:
            scores = initial_scores(self.change(adapter_name), config, module_name)
            self.maskft_scores[adapter_name] = nn.Parameter(scores)
        else:
            weight = self.oriented_weight()
            empty = torch.zeros(packed_shape((self.out_features, self.in_features)), dtype=torch.uint8)
            self.set_mask(adapter_name, empty.to(weight.device))
            self._placeholders.add(adapter_name)

    def has_placeholder(self, adapter_name: str) -> bool:
        """Whether no mask has been set yet; one that was loaded by name alone is not noticed."""
        return adapter_name in self._placeholders

    def has_scores(self, adapter_name: str) -> bool:
        """Whether the adapter can be trained."""
        return adapter_name in self.maskft_scores

    def is_stale(self, adapter_name: str) -> bool:
        """Whether scores have changed since the adapter's mask was chosen."""
        if not self.has_scores(adapter_name) or self.maskft_scores[adapter_name].is_meta:
            return False
        return self._chosen_at.get(adapter_name) != self._state_of_scores(adapter_name)

    def _state_of_scores(self, adapter_name: str) -> tuple[int, int, int]:
        scores = self.maskft_scores.stored(adapter_name)
        # ZeRO counts no versions up, nor the same ones everywhere, and all processes have to choose at once. Addresses
        # differ between processes too; elsewhere they tell of values that were assigned to `.data`.
        if zero.is_split(scores):
            return id(scores), 0, -1
        return (id(scores), 0, local_part(scores)._version) if is_sharded(scores) else _state_of(scores)

    def is_stepped(self, adapter_name: str, stepped: set[int]) -> bool:
        """Whether the adapter's scores are among the parameters of these ids."""
        return self.has_scores(adapter_name) and id(self.maskft_scores.stored(adapter_name)) in stepped

    def see_all_changes(self, adapter_name: str) -> None:
        """Take the adapter's mask for stale if it was chosen from scores that this process holds whole."""
        is_whole = self.has_scores(adapter_name) and not self.maskft_scores.is_split(adapter_name)
        if is_whole and adapter_name not in self._set_by_hand:
            self.forget_choice(adapter_name)

    def forget_choice(self, adapter_name: str) -> None:
        """Take the adapter's mask for stale."""
        self._settled = None
        self._chosen_at.pop(adapter_name, None)

    def set_mask(self, adapter_name: str, packed: Tensor, *, is_chosen: bool = False) -> None:
        """Put a packed mask (uint8, (out_features, ceil(in_features / 8))) in use.

        Where the adapter has scores it stays until these change; `is_chosen` says that it was chosen from them.
        """
        # In the state dict where the mask is all there is, so that whatever loads by name finds it. In training it
        # follows from the scores, and accelerate's `cpu_ram_efficient_loading` takes parameters alone.
        weight, has_scores = self.oriented_weight(), self.has_scores(adapter_name)
        self.maskft_mask.register_buffer(adapter_name, packed.to(weight.device), persistent=not has_scores)
        self._placeholders.discard(adapter_name)
        self._settled = None
        if has_scores:
            self._chosen_at[adapter_name] = self._state_of_scores(adapter_name)
        (self._set_by_hand.discard if is_chosen else self._set_by_hand.add)(adapter_name)
        if self.merged or not has_scores or is_sharded(self.get_base_layer().weight):
            self._forget_masked_weights(of=adapter_name)
        for names, masked in self._masked_weights.items():
            if adapter_name in names:
                # In place, so that a compiled forward goes on reading the same tensor.
                if masked.values.dtype == weight.dtype and masked.values.device == weight.device:
                    self.apply_masks(names, out=masked.values)
                else:
                    masked.values.copy_(self.apply_masks(names))

    def mask(self, adapter_names: Sequence[str]) -> Tensor:
        """The AND of the adapters' masks: bool, (out_features, in_features)."""
        return unpack_mask(self._packed(adapter_names), self.in_features)

    def _packed(self, adapter_names: Sequence[str]) -> Tensor:
        packed: Tensor = self.maskft_mask[adapter_names[0]]
        for name in adapter_names[1:]:
            packed = packed & self.maskft_mask[name]
        return packed

    def reference(self, adapter_names: Sequence[str]) -> Tensor | None:
        """What stands in the places that the adapters leave out; None is zero.

        Raises:
            MaskftError: the adapters do not agree on it.
        """
        if len(self.maskft_reference) == 0:
            return None
        found = {self.groups[name].config.reference_model_name_or_path: name for name in adapter_names}
        if len(found) > 1:
            raise MaskftError(
                f"The active adapters {adapter_names} put different values into the places they leave out "
                f"({', '.join(map(str, found))}; None is zero); activate those of one reference."
            )
        (name,) = found.values()
        return dict(self.maskft_reference.items()).get(name)

    def apply_masks(self, adapter_names: Sequence[str], out: Tensor | None = None) -> Tensor:
        """The base weight with the AND of the adapters' masks: (out_features, in_features); `out` takes it.

        It lies in memory as the base weight does, so that matrix products round as they do once it is merged.
        """
        reference = self.reference(adapter_names)
        return apply_packed(self.oriented_weight(), self._packed(adapter_names), reference, out)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Decoding calls each layer for one token, and training for one micro-batch after another: finding it all anew
        # would take a third as long as a product, and a GPU longer than it.
        is_compiling = torch.compiler.is_compiling()
        settled = None if is_compiling else self._settled
        if settled is not None:
            active, parameters, values, address, version, masked, learning = settled
            weight, bias = parameters["weight"], parameters["bias"]
            # As in `is_of`, without a call: each costs a tenth of a percent of decoding.
            if active == self._active_adapter and weight.data_ptr() == address and weight._version == version:
                if learning is None:
                    # Autocast casts here what it casts of a plain layer.
                    if values.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
                        return F.linear(x, values, bias)
                elif self._still_learns(learning, values.dtype):
                    return self._learn(x, weight, bias, learning.scores, learning.adapter_name, masked)
        if self.disable_adapters and self.merged:
            self.unmerge()
        groups = self.groups
        names = [name for name in self.active_adapters if name in groups]
        if self.disable_adapters or self.merged or not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        # Each attribute that is a module or a parameter is looked up once: in decoding, a look-up is a cost to be seen.
        all_scores, base = self.maskft_scores, self.get_base_layer()
        scored = [name for name in names if name in all_scores]
        if scored and len(names) > 1 and torch.is_grad_enabled() and any(all_scores[n].requires_grad for n in scored):
            raise MaskftError(
                f"Only one mask can be trained at a time, but {names} are active; call set_adapter with one of them."
            )
        for name in names:
            group = groups[name]
            if not is_compiling:
                if (scored and self.is_stale(name)) or not group.is_checked:
                    group.refresh()
            elif not group.is_checked:
                raise MaskftError(
                    f"The masks of adapter {name!r} are not checked yet, which a compiled forward cannot do; run the "
                    "model once before torch.compile, or load it with PeftModel.from_pretrained."
                )
        scores = all_scores[names[0]] if scored and len(names) == 1 else None
        # The parameter and not its data, which would stay in memory until the backward where ZeRO-3 frees it.
        weight, bias = base.weight, base.bias
        zero.gather_for(self, [p for p in (weight, bias, scores) if p is not None])
        device = x.device.type
        is_cast = not x.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else weight.dtype
        # Split weights are whole only for a moment: a copy of them would undo the splitting.
        is_split = is_sharded(weight) or any(all_scores.is_split(name) for name in scored)
        keeps = not is_split and all(groups[name].keeps_masked_weights for name in names)
        cached = self._masked_weight(tuple(names), weight, dtype) if keeps else None
        bias = bias if bias is None else bias.to(dtype)
        shape = (*x.shape[:-1], self.out_features)
        if self.fan_in_fan_out:
            x = x.reshape(-1, self.in_features)  # as Conv1D does, whose product over two dimensions rounds differently
        learned = scores if scores is not None and torch.is_grad_enabled() and scores.requires_grad else None
        if learned is not None and weight.requires_grad and not is_compiling:
            warnings.warn(
                "The weight of a masked layer requires a gradient and gets none: only the scores of its mask do.",
                stacklevel=2,
            )
        if cached is not None and not (self.fan_in_fan_out or is_compiling or weight.is_inference() or x.is_meta):
            learning = None
            if learned is not None:
                name, group = names[0], groups[names[0]]
                learning = _Learning(name, group, all_scores._parameters, learned, device, weight.dtype)
            # DataParallel's replicas live for one forward, and their weights are no parameters.
            if (learning is not None or not scored) and not zero.steps_copies() and "_is_replica" not in self.__dict__:
                values, address, version = cached.values, cached.address, cached.version
                active, parameters = copy(self._active_adapter), base._parameters
                self.__dict__["_settled"] = _Settled(active, parameters, values, address, version, cached, learning)
        if learned is not None:
            weight = weight.T if self.fan_in_fan_out else weight
            return self._learn(x.to(dtype), weight, bias, learned, names[0], cached).view(shape)
        values = self.apply_masks(names).to(dtype) if cached is None else cached.values
        return F.linear(x.to(dtype), values, bias).view(shape)

    def _learn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        adapter_name: str,
        masked: _Masked | None,
    ) -> Tensor:
        """A forward that trains scores, in the dtype of the masked weight where that is kept."""
        values, packed = (None, self.maskft_mask[adapter_name]) if masked is None else (masked.values, None)
        if values is not None and values.dtype != x.dtype:  # a cast to the same dtype takes a fifth of a product's time
            x = x.to(values.dtype)
        bias = bias if bias is None else bias.to(x.dtype)
        transform: Any = self.groups[adapter_name].config.score_transform
        reference = self.reference([adapter_name])
        return masked_linear(x, weight, scores, values, bias, transform, packed, reference)

    def _still_learns(self, learning: _Learning, dtype: torch.dtype) -> bool:
        """Whether a forward would find the same to train again, and masked weights of this dtype."""
        name, group, all_scores, scores, device, of_weight = learning
        return (
            all_scores.get(name) is scores
            and group.keeps_masked_weights
            and scores.requires_grad
            and torch.is_grad_enabled()
            and self._chosen_at.get(name) == _state_of(scores)
            and dtype == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else of_weight)
        )

    def _masked_weight(self, names: tuple[str, ...], weight: Tensor, dtype: torch.dtype) -> _Masked:
        """The masked weight of the current step, in the dtype that the matrix product uses."""
        cached = self._masked_weights.get(names)
        is_fit = cached is not None and cached.values.dtype == dtype and cached.values.device == weight.device
        # A compiled forward cannot ask for addresses and versions.
        if cached is not None and is_fit and (torch.compiler.is_compiling() or cached.is_of(weight)):
            return cached
        with torch.inference_mode(False):  # for the next training step may use it too
            values = self.apply_masks(names).to(dtype)
        address, version = 0, -1  # of no weight that a plain forward finds
        if not torch.compiler.is_compiling():
            address, version = weight.data_ptr(), version_of(weight)
        masked = _Masked(values, weight.detach(), address, version)
        if not self._is_trained(names):
            self._forget_weights_only_read()
        self._masked_weights = self._masked_weights | {names: masked}
        return masked

    def _forget_masked_weights(self, of: str) -> None:
        """Drop those that an adapter has a part in."""
        # Another dictionary each time: other threads may be looking at this one.
        self._masked_weights = {names: masked for names, masked in self._masked_weights.items() if of not in names}

    def _forget_weights_only_read(self) -> None:
        """Drop the masked weights of adapters that do not learn; those of the others stay where they are in memory."""
        kept = {names: masked for names, masked in self._masked_weights.items() if self._is_trained(names)}
        self._masked_weights = kept

    def _is_trained(self, names: tuple[str, ...]) -> bool:
        return len(names) == 1 and self.has_scores(names[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the mask into the base weight; the values left out are kept for :meth:`unmerge`.

        Multiplying by 0 and 1 is exact in every dtype, so merged and unmerged outputs are equal.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.groups]
        if not self.merged:
            for name in names:
                self.groups[name].refresh()
        for name in names:
            weight = self.oriented_weight()
            if is_sharded(self.get_base_layer().weight):
                raise MaskftError(
                    "The weights are split over processes, so no mask is merged into them; save the adapter, and merge "
                    "it in one process (maskft merge)."
                )
            if safe_merge and not torch.isfinite(weight).all():
                raise MaskftError("The base weight holds NaN or infinite values, so it is not merged (safe_merge).")
            self.reference([*self.merged_adapters, name])
            mask = self.mask([name])
            self._removed.append((pack_mask(mask), weight[~mask]))
            if name in self.maskft_reference:
                weight[~mask] = self.maskft_reference[name][~mask]
            else:
                weight.masked_fill_(~mask, 0)
            self.merged_adapters = [*self.merged_adapters, name]

    def unmerge(self) -> None:
        """Put the left-out values back; the base weight is then byte for byte what it was before the merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._put_back(self.oriented_weight())
        self._removed.clear()
        self.merged_adapters = []

    def unmerged_weight(self) -> Tensor:
        """The base weight as the base layer stores it, without what is merged into it."""
        weight: Tensor = self.get_base_layer().weight.data
        if self.merged:
            weight = weight.clone()
            self._put_back(weight.T if self.fan_in_fan_out else weight)
        return weight

    def _put_back(self, weight: Tensor) -> None:
        for packed, values in reversed(self._removed):
            weight[~unpack_mask(packed, self.in_features)] = values.to(weight)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._settled = None
        self._placeholders.discard(adapter_name)
        self._set_by_hand.discard(adapter_name)
        self._chosen_at.pop(adapter_name, None)
        self._forget_masked_weights(of=adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self.groups)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The masks are loaded in place, which those made of them would not notice.
        self._settled = None
        self._forget_weights_only_read()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskLayer":
        self._masked_weights = {}  # they would keep the base weight from being freed where it was
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own; a file need not hold them.
        return self.__dict__ | {"_masked_weights": {}, "_settled": None}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version casts to the dtype of the base weight.
        device = device or self.oriented_weight().device
        if adapter_name in self.maskft_scores and not self.maskft_scores[adapter_name].is_meta:
            self.maskft_scores[adapter_name] = self.maskft_scores[adapter_name].to(device)
        for buffers in (self.maskft_mask, self.maskft_reference):
            if adapter_name in buffers:
                setattr(buffers, adapter_name, buffers[adapter_name].to(device))

    def extra_repr(self) -> str:
        shares = [
            f"{name}={num_kept_bits(mask) / (self.in_features * self.out_features):.4f}"
            for name, mask in self.maskft_mask.items()
            if not mask.is_meta
        ]
        return f"kept: {', '.join(shares)}" if shares else ""


def initial_scores(weight: Tensor, config: MaskConfig, module_name: str) -> Tensor:
    """First scores of a weight (out_features, in_features): float32, of its shape, on its device.

    Drawn from a generator of their own, seeded by `config.seed` and the module's name, so that neither the order
    of the modules nor the number of processes changes them.
    """
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if config.init_scores == "keep_all":
        return torch.full_like(weight, config.threshold + config.init_std, dtype=torch.float32)
    if config.init_scores == "magnitude":
        size = weight.to(torch.float32).abs()
        scale = size.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return size * (config.init_std / scale)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{module_name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    if config.init_scores == "uniform":
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (drawn * config.init_std + config.threshold).to(weight.device)
    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn * config.init_std).to(weight.device)
