"""A linear layer with masks: what PEFT puts in the place of each masked module."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from maskft.errors import MaskftError, damaged_weight
from maskft.masks import apply_packed, masked_linear, pack_mask, packed_shape, unpack_mask
from maskft.tuner import zero
from maskft.tuner.config import MaskConfig
from maskft.tuner.sharding import is_sharded


class ScoreDict(nn.ParameterDict):
    """Scores by adapter, which `.to()`, `.half()` and the like move but never cast.

    A mask chosen from rounded scores is another mask. Where FSDP2 splits them, it puts the split and the gathered
    parameter here in turn; :meth:`stored` is always the one that the optimizer steps.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if is_sharded(value):
            self.__dict__.setdefault("_split", {})[name] = value
        super().__setattr__(name, value)

    def stored(self, adapter_name: str) -> Any:
        """The scores as they are kept between steps, this process's part where they are split; None where none are."""
        stored = self.__dict__.get("_split", self._parameters).get(adapter_name)
        return self[adapter_name] if stored is None and adapter_name in self else stored

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScoreDict":
        def move(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        super()._apply(move, recurse)
        return self


class Owner(Protocol):
    """What a layer asks of the one that says whether its mask is current (:class:`maskft.tuner.AdapterMasks`)."""

    adapter_name: str
    config: MaskConfig
    learns: bool
    layers: dict[str, "MaskLayer"]

    @property
    def keeps_masked_weights(self) -> bool: ...
    def make_current(self, *layers: "MaskLayer") -> None: ...
    def keep(self, layer: "MaskLayer") -> None: ...
    def end(self) -> None: ...


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; those made in inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight holds something else than its values; a DTensor holds a part of them."""
    is_wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    return is_wrapped or not weight.is_floating_point() or weight.element_size() < 2


class _Masked(NamedTuple):
    """A masked weight, and what tells whether the base weight is still the one that it was made from."""

    values: Tensor
    base: Tensor  # shares the memory of the base weight, so that no other weight comes to lie at its address
    address: int
    version: int

    def is_of(self, weight: Tensor) -> bool:
        """Whether `weight` is the base weight, unchanged: changes in place count its version up."""
        return weight.data_ptr() == self.address and version_of(weight) == self.version


class MaskLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose weight is multiplied by the AND of the active adapters' masks.

    It holds tensors: of an adapter in training float32 scores (out_features, in_features), its packed mask, and the
    masked weight of the current step; of those loaded for inference the packed masks, and one masked weight, that of
    the one used last. Whether a mask is current, its :class:`Owner` says.
    """

    base_layer: Any
    active_adapters: Any
    get_base_layer: Callable[[], Any]

    adapter_layer_names = ("maskft_scores",)
    other_param_names = ("maskft_mask", "maskft_reference", "owners")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.oriented_weight().shape
        self.maskft_scores = ScoreDict()
        self.maskft_mask = BufferDict()
        self.maskft_reference = BufferDict()
        self.owners: dict[str, Owner] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._masked_weights: dict[tuple[str, ...], _Masked] = {}
        self._removed: list[tuple[Tensor, Tensor]] = []
        # What the next forward multiplies by, unless an attribute is set anew or the base weight changes.
        self._ready: tuple[Any, ...] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT switches, disables and merges adapters so, and whoever puts another base layer here.
        self.__dict__["_ready"] = None
        super().__setattr__(name, copy(value) if name == "_active_adapter" else value)

    def oriented_weight(self) -> Tensor:
        """The base weight as (out_features, in_features); a view where the layer stores it transposed."""
        weight: Tensor = self.get_base_layer().weight.detach()  # torch.export cannot follow `.data`
        if not torch.compiler.is_compiling() and is_quantized(weight):
            raise MaskftError(
                f"The weight under a mask was quantized ({type(weight).__name__}); merge the mask first "
                "(merge_and_unload()), and quantize the merged model."
            )
        return weight.T if self.fan_in_fan_out else weight

    def change(self, adapter_name: str) -> Tensor:
        """What a mask takes out where it leaves a weight out: the weight, or its difference to the reference."""
        weight = self.oriented_weight()
        return weight - self.maskft_reference[adapter_name] if adapter_name in self.maskft_reference else weight

    def add_adapter(self, owner: Owner, module_name: str, reference: Tensor | None = None) -> None:
        """Make room for an adapter; one that is to be trained gets its first scores.

        `reference` stands where weights are left out: (out_features, in_features); None is zero.
        """
        name = owner.adapter_name
        if self.merged:
            raise MaskftError(f"`{module_name}` has {self.merged_adapters} merged; unmerge before adding {name!r}.")
        if is_sharded(self.get_base_layer().weight):
            raise MaskftError(f"`{module_name}` is split over processes already; add {name!r} before that.")
        self.owners[name] = owner
        owner.layers[module_name] = self
        weight = self.oriented_weight()
        if reference is not None:
            self.maskft_reference.register_buffer(name, reference.to(weight), persistent=False)
        if owner.learns:
            self.maskft_scores[name] = nn.Parameter(initial_scores(self.change(name), owner.config, module_name))
        else:
            empty = torch.zeros(packed_shape((self.out_features, self.in_features)), dtype=torch.uint8)
            self.put_mask(name, empty.to(weight.device))

    def set_mask(self, adapter_name: str, packed: Tensor) -> None:
        """Use a packed mask (uint8, (out_features, ceil(in_features / 8))); with scores, until these change."""
        self.put_mask(adapter_name, packed)
        self.owners[adapter_name].keep(self)

    def put_mask(self, adapter_name: str, packed: Tensor) -> None:
        """:meth:`set_mask` for the adapter's owner, which knows where the mask is from."""
        # In the state dict where the mask is all there is, so that whatever loads by name finds it. In training it
        # follows from the scores, and accelerate's `cpu_ram_efficient_loading` takes parameters alone.
        weight, has_scores = self.oriented_weight(), adapter_name in self.maskft_scores
        self.maskft_mask.register_buffer(adapter_name, packed.to(weight.device), persistent=not has_scores)
        if self.merged or not has_scores or is_sharded(self.get_base_layer().weight):
            self.forget_masked_weights(of=adapter_name)
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
        """What stands where the adapters leave weights out; None is zero.

        Raises:
            MaskftError: the adapters do not agree on it.
        """
        if len(self.maskft_reference) == 0:
            return None
        names = {self.owners[name].config.reference_model_name_or_path: name for name in adapter_names}
        if len(names) > 1:
            raise MaskftError(
                f"The active adapters {adapter_names} give the weights they leave out different values "
                f"({', '.join(map(str, names))}; None is zero); activate those of one reference."
            )
        (name,) = names.values()
        return dict(self.maskft_reference.items()).get(name)

    def apply_masks(self, adapter_names: Sequence[str], out: Tensor | None = None) -> Tensor:
        """The base weight with the AND of the adapters' masks: (out_features, in_features); `out` takes it.

        It lies in memory as the base weight does, so that matrix products round as they do once it is merged.
        """
        reference = self.reference(adapter_names)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            with _untraced():
                return apply_packed(self.oriented_weight(), self._packed(adapter_names), reference, out)
        return apply_packed(self.oriented_weight(), self._packed(adapter_names), reference, out)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Decoding calls each layer for one token, and training for one micro-batch after another: finding it all anew
        # would take a third as long as a product, and a GPU longer than it.
        ready = None if torch.compiler.is_compiling() else self._ready
        if ready is not None:
            base, values, address, version, all_scores, name, device, transform, reference = ready
            parameters = base._parameters
            weight, bias = parameters["weight"], parameters["bias"]
            if weight is not None and weight.data_ptr() == address and weight._version == version:
                scores, dtype = all_scores._parameters.get(name), values.dtype
                if scores is None or not (scores.requires_grad and torch.is_grad_enabled()):
                    # Autocast casts here what it casts of a plain layer.
                    if dtype == x.dtype and (bias is None or bias.dtype == dtype):
                        return F.linear(x, values, bias)
                elif dtype == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype):
                    x = x if x.dtype == dtype else x.to(dtype)  # which takes a fifth of a product's time even so
                    bias = bias if bias is None else bias.to(dtype)
                    return masked_linear(x, weight, scores, values, bias, transform, None, reference)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.owners]
        if self.disable_adapters or self.merged or not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        return self._multiply(x, names)

    def _multiply(self, x: Tensor, names: list[str]) -> Tensor:
        """The product with the masked weight, and what the next forward can go on with."""
        learned = self._learned(names)
        for name in names:
            self.owners[name].make_current(self)
        base, device = self.get_base_layer(), x.device.type
        # The parameter and not its data, which would stay in memory until the backward where ZeRO-3 frees it.
        weight, bias = base.weight, base.bias
        zero.gather_for(self, [p for p in (weight, bias, learned) if p is not None])
        is_cast = not x.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else weight.dtype
        masked = self._masked_weight(tuple(names), weight, dtype) if self._keeps(names, weight) else None
        transform: Any = self.owners[names[0]].config.score_transform
        reference = self.reference(names)
        if masked is not None and not torch.compiler.is_compiling() and self._is_lasting(x, weight):
            name = names[0] if len(names) == 1 else ""  # of several, none learns
            weights = base, masked.values, masked.address, masked.version
            self.__dict__["_ready"] = *weights, self.maskft_scores, name, device, transform, reference
        shape = (*x.shape[:-1], self.out_features)
        if self.fan_in_fan_out:
            x = x.reshape(-1, self.in_features)  # as Conv1D does, whose product over two dimensions rounds differently
        x = x.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        if learned is None:
            values = self.apply_masks(names).to(dtype) if masked is None else masked.values
            return F.linear(x, values, bias).view(shape)
        kept, packed = (None, self.maskft_mask[names[0]]) if masked is None else (masked.values, None)
        weight = weight.T if self.fan_in_fan_out else weight
        return masked_linear(x, weight, learned, kept, bias, transform, packed, reference).view(shape)

    def _learned(self, names: list[str]) -> nn.Parameter | None:
        """The scores that a forward trains."""
        all_scores = self.maskft_scores
        learned = [all_scores[name] for name in names if name in all_scores and all_scores[name].requires_grad]
        if not learned or not torch.is_grad_enabled():
            return None
        if len(names) > 1:
            raise MaskftError(
                f"Only one mask can be trained at a time, but {names} are active; call set_adapter with one of them."
            )
        if self.get_base_layer().weight.requires_grad and not torch.compiler.is_compiling():
            warnings.warn(
                "The weight of a masked layer requires a gradient and gets none: only the scores of its mask do.",
                stacklevel=2,
            )
        return learned[0]

    def _is_lasting(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a forward like this one can follow."""
        # DataParallel's replicas live for one forward, and their weights are no parameters.
        return not (self.fan_in_fan_out or weight.is_inference() or x.is_meta or "_is_replica" in self.__dict__)

    def _keeps(self, names: list[str], weight: Tensor) -> bool:
        """Whether the masked weight stays for the next forward."""
        # Split weights are whole only for a moment: a copy of them would undo the splitting.
        is_split = is_sharded(weight) or any(is_sharded(self.maskft_scores.stored(name)) for name in names)
        if is_split or torch.compiler.is_exporting():  # with tensors that hold no values
            return False
        return all(self.owners[name].keeps_masked_weights for name in names)

    def _masked_weight(self, names: tuple[str, ...], weight: Tensor, dtype: torch.dtype) -> _Masked:
        """The masked weight of the current step, in the dtype that the matrix product uses."""
        is_compiling = torch.compiler.is_compiling()
        cached = self._masked_weights.get(names)
        is_fit = cached is not None and cached.values.dtype == dtype and cached.values.device == weight.device
        # A compiled forward cannot ask for addresses and versions.
        if cached is not None and is_fit and (is_compiling or cached.is_of(weight)):
            return cached
        with torch.inference_mode(False):  # for the next training step may use it too
            values = self.apply_masks(names).to(dtype)
        # A version of -1 is of no weight that a plain forward finds.
        address, version = (0, -1) if is_compiling else (weight.data_ptr(), version_of(weight))
        masked = _Masked(values, weight.detach(), address, version)
        if not self._is_trained(names):
            self._forget_weights_only_read()
        self._masked_weights = self._masked_weights | {names: masked}
        return masked

    def forget_masked_weights(self, of: str) -> None:
        """Drop those that an adapter has a part in."""
        # Another dictionary each time: other threads may be looking at this one.
        self._masked_weights = {names: masked for names, masked in self._masked_weights.items() if of not in names}

    def _forget_weights_only_read(self) -> None:
        """Drop the masked weights of adapters that do not learn; those of the others stay where they are in memory."""
        kept = {names: masked for names, masked in self._masked_weights.items() if self._is_trained(names)}
        self._masked_weights = kept

    def _is_trained(self, names: tuple[str, ...]) -> bool:
        return len(names) == 1 and names[0] in self.maskft_scores

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the mask into the base weight; the values left out are kept for :meth:`unmerge`.

        Multiplying by 0 and 1 is exact in every dtype, so merged and unmerged outputs are equal.
        """
        weight = self.oriented_weight()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.owners:
                continue
            reference = self.reference([*self.merged_adapters, name])
            left_out = ~self.mask([name])
            self._removed.append((pack_mask(left_out), weight[left_out]))
            weight[left_out] = weight.new_zeros(()) if reference is None else reference[left_out]
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
        for left_out, values in reversed(self._removed):
            weight[unpack_mask(left_out, self.in_features)] = values.to(weight)

    def delete_adapter(self, adapter_name: str) -> None:
        owner = self.owners.get(adapter_name)
        super().delete_adapter(adapter_name)
        self.forget_masked_weights(of=adapter_name)
        if owner is not None:
            owner.end()

    def _get_available_adapters(self) -> set[str]:
        return set(self.owners)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_weights_only_read()  # masks are loaded in place, which those made of them would not notice
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskLayer":
        self._masked_weights = {}  # they would keep the base weight from being freed where it was
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own; a file need not hold them.
        return self.__dict__ | {"_masked_weights": {}, "_ready": None}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version casts to the dtype of the base weight.
        device = device or self.oriented_weight().device
        if adapter_name in self.maskft_scores and not self.maskft_scores[adapter_name].is_meta:
            self.maskft_scores[adapter_name] = self.maskft_scores[adapter_name].to(device)
        for buffers in (self.maskft_mask, self.maskft_reference):
            if adapter_name in buffers:
                setattr(buffers, adapter_name, buffers[adapter_name].to(device))


@contextmanager
def _untraced() -> Iterator[None]:
    """Leave operations out of `torch.jit.trace`, whose graphs have no views as another dtype."""
    native: Any = torch._C
    state = native._get_tracing_state()
    native._set_tracing_state(None)
    try:
        yield
    finally:
        native._set_tracing_state(state)


def initial_scores(weight: Tensor, config: MaskConfig, module_name: str) -> Tensor:
    """First scores of a weight (out_features, in_features): float32, of its shape, on its device.

    "normal" draws from N(0, init_std) (the paper's), "keep_all" puts every score init_std above the threshold,
    "uniform" spreads them evenly over the init_std above it (weights then leave in proportion to how far their scores
    are pushed, not all at once), "magnitude" ranks by |W| (or the size of its change), scaled to a root mean square of
    init_std. What is drawn is drawn by a generator seeded by `config.seed` and the module's name, so that neither the
    order of the modules nor the number of processes changes it.
    """
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if config.init_scores == "keep_all":
        return torch.full_like(weight, config.threshold + config.init_std, dtype=torch.float32)
    if config.init_scores == "magnitude":
        size = weight.to(torch.float32).abs()
        scale = size.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        if not scale.isfinite():
            raise MaskftError(damaged_weight(module_name))
        return size * (config.init_std / scale)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{module_name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    is_uniform = config.init_scores == "uniform"
    draw = torch.rand if is_uniform else torch.randn
    drawn = draw(weight.shape, generator=generator, dtype=torch.float32, device="cpu") * config.init_std
    return (drawn + config.threshold if is_uniform else drawn).to(weight.device)
