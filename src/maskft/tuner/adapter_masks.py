"""The masks of one adapter, over all its layers: chosen together, once for each optimizer step."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from maskft.errors import MaskftError
from maskft.masks import num_flipped_bits, num_kept, num_kept_bits
from maskft.masks.selection import (
    ScoreTransform,
    kth_largest,
    refuse_nan,
    select_packed,
    transform_scores,
)
from maskft.storage.fingerprint import (
    check_fingerprint,
    combine_digests,
    fingerprint,
    fingerprint_dtype,
    tensor_digest,
    widest_dtype,
)
from maskft.tuner import zero
from maskft.tuner.sharding import (
    is_sharded,
    kth_largest_of_shards,
    local_part,
    packed_masks_of_shards,
    sum_over_shards,
    whole,
)

_HOW_TO_IGNORE = (
    "pass ignore_fingerprint=True to PeftModel.from_pretrained (on the command line: --force; before `load_adapter`: "
    "add_adapter with MaskConfig.from_pretrained(FOLDER, ignore_fingerprint=True))"
)

_NUM_COUNTED = 32  # masks whose flips are counted together

if TYPE_CHECKING:
    from maskft.tuner.config import MaskConfig
    from maskft.tuner.layer import MaskLayer


class AdapterMasks:
    """All layers that one adapter masks, and the rule that chooses their masks.

    A mask is chosen after each optimizer step, and when scores were changed in another way since the last choice
    (`Tensor._version` tells, which changes in place through `.data` pass by: change scores, and base weights, with an
    optimizer or under `torch.no_grad()`); neither a further forward, nor activations that are recomputed, nor an
    accumulated micro-batch chooses it again. A layer looks at its own scores and weight, and a compiled one at nothing:
    call :meth:`refresh` with `anew` after changing them otherwise than by an optimizer's step under `torch.compile`, or
    where `global_topk` ranks all layers together.

    On an accelerator the host does not wait for a choice: flips are counted there, and scores that are NaN are refused
    when the flips or the masks are next asked for (a log, an evaluation, a checkpoint).

    Attributes:
        layers: the masked layers by module name.
        num_refreshes: how often masks were chosen.
        is_checked: whether the masks are known to be those of the adapter's file, where it has one.
        keeps_masked_weights: whether masked weights are kept from one forward to the next. False makes them anew in
            each forward and again in its backward: slower, and without their memory.
    """

    def __init__(self, adapter_name: str, config: "MaskConfig") -> None:
        self.adapter_name = adapter_name
        self.config = config
        self.layers: dict[str, MaskLayer] = {}
        self._num_flips: int | torch.Tensor = 0
        self._num_nan: torch.Tensor | None = None
        self.num_refreshes = 0
        self.keeps_masked_weights = True
        self.is_checked = config.file_digest is None and not config.inference_mode
        # A mask that learns is tied to the base that it learns on, whatever its file was.
        self._fingerprint = config.file_fingerprint if config.inference_mode else None
        self._fingerprint_versions: list[tuple[int, int]] | None = None
        self._reference_fingerprint: str | None = None
        _live_groups.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _live_groups.add(self)

    def refresh(self, *, anew: bool = False) -> None:
        """Choose the masks anew where scores have changed since they were chosen last.

        Args:
            anew: choose them also where no change is seen; DeepSpeed loads a checkpoint's scores unseen.

        Raises:
            MaskftError: scores that are NaN or not float32, or see :meth:`check`.
        """
        if anew:
            self.forget_choices()
        with torch.inference_mode(False):  # for the next training step needs the masks too
            self._choose()
        if not self.is_checked:
            self.check()

    def _choose(self) -> None:
        stale = [layer for layer in self.layers.values() if layer.is_stale(self.adapter_name)]
        if not stale:
            return
        if self.config.selection == "global_topk":
            stale = [layer for layer in self.layers.values() if layer.has_scores(self.adapter_name)]
        scores = [layer.maskft_scores.stored(self.adapter_name) for layer in stale]
        for tensor in scores:
            if not isinstance(tensor, torch.nn.Parameter) and dist.is_available() and dist.is_initialized():
                raise MaskftError(
                    "FSDP's first version flattens scores, of which no mask can be chosen; use its second one "
                    "(torch.distributed.fsdp.fully_shard, or fsdp_version: 2 for accelerate)."
                )
            if tensor.dtype != torch.float32:
                raise MaskftError(
                    f"The scores of adapter {self.adapter_name!r} were cast to {tensor.dtype}; a mask of rounded "
                    "scores is another mask, so keep them in float32."
                )
        if is_sharded(scores[0]):
            masks = packed_masks_of_shards(scores, **self.config.selection_settings())
        else:
            masks, self._num_nan = self._select([tensor.detach() for tensor in scores])
        before = [dict(layer.maskft_mask.items()).get(self.adapter_name) for layer in stale]
        pairs = [(old, new) for old, new in zip(before, masks, strict=True) if old is not None]
        for places in _by_device([new for _, new in pairs]):
            for begin in range(0, len(places), _NUM_COUNTED):
                # Some at once, since each is little work on a GPU, and not all, since they are copied.
                part = zip(*(pairs[i] for i in places[begin : begin + _NUM_COUNTED]), strict=True)
                old, new = (torch.cat([mask.flatten() for mask in some]) for some in part)
                self._num_flips = _added(self._num_flips, num_flipped_bits(old, new))
        for layer, packed in zip(stale, masks, strict=True):
            layer.set_mask(self.adapter_name, packed, is_chosen=True)
        self.num_refreshes += 1

    def _select(self, scores: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Packed masks, each on the device of its scores, and how many scores are NaN.

        A model that is too large for one device has its layers on several.
        """
        settings, devices = self.config.selection_settings(), [tensor.device for tensor in scores]
        if settings["selection"] == "global_topk":
            scores = [tensor.to(devices[0]) for tensor in scores]
        masks: dict[int, torch.Tensor] = {}
        total: int | torch.Tensor = 0
        for places in _by_device(scores):
            chosen, found = select_packed([scores[i] for i in places], **settings)
            masks |= dict(zip(places, chosen, strict=True))
            total = _added(total, found)
        assert isinstance(total, torch.Tensor)
        return [masks[i].to(device) for i, device in enumerate(devices)], total

    def require_choice_of_all(self) -> None:
        """Refuse to go on by one process alone where a choice takes all of them.

        Raises:
            MaskftError: DeepSpeed has split scores that were stepped since the masks were chosen.
        """
        stale = [layer for layer in self.layers.values() if layer.is_stale(self.adapter_name)]
        if any(zero.is_split(layer.maskft_scores.stored(self.adapter_name)) for layer in stale):
            raise MaskftError(
                "Under ZeRO-3 masks are chosen by all processes at once, and the scores were stepped since they were; "
                f"call find_group(model, {self.adapter_name!r}).refresh() on each before saving (a trainer does it by "
                "maskft.MaskCallback)."
            )

    def see_all_changes(self) -> None:
        """Take masks for stale that were chosen from scores: some change these through `.data`, unseen."""
        for layer in self.layers.values():
            layer.see_all_changes(self.adapter_name)

    def forget_choices(self) -> None:
        """Take all masks that are learned for stale."""
        for layer in self.layers.values():
            layer.forget_choice(self.adapter_name)

    def _refuse_nan(self) -> None:
        if self._num_nan is not None:
            found, self._num_nan = self._num_nan, None
            refuse_nan(found, self.num_weights())

    def check(self) -> None:
        """Check masks against what the adapter's file says of them and of the base model, once.

        Masks can come in by name alone: Transformers' own `load_adapter` calls no hook of PEFT's, and leaves what it
        does not find as it was.

        Raises:
            MaskftError: no masks, others than the file's, or a base model they were not learned on.
        """
        if self.is_checked:
            return
        expected = self.config.file_digest
        if expected is None:
            is_loaded = not any(layer.has_placeholder(self.adapter_name) for layer in self.layers.values())
        else:
            is_loaded = fingerprint(self._packed()) == expected or self._start_as_twin(expected)
        if not is_loaded and self.config.inference_mode:
            raise MaskftError(
                f"Adapter {self.adapter_name!r} has no mask, or others than its adapter_config.json says: it was "
                "created for inference and nothing was loaded into it, or it is a compressed one, which Transformers' "
                "own load_adapter does not read, or its file is damaged; load it with PeftModel.from_pretrained, or "
                "save or download it again."
            )
        if not is_loaded:
            raise MaskftError(
                f"Adapter {self.adapter_name!r} is to be trained, but its scores are not those that its masks were "
                "chosen from; load a training checkpoint (checkpoint-N), which has scores, or start a new adapter from "
                "a MaskConfig of its own."
            )
        for expected, take, what in (
            (self.config.file_fingerprint, self._take_fingerprint, "base model"),
            (self.config.file_reference_fingerprint, self._take_reference_fingerprint, "reference model"),
        ):
            if expected and not self.config.ignore_fingerprint:
                check_fingerprint(
                    expected,
                    str(take(fingerprint_dtype(expected))),
                    how_to_ignore=_HOW_TO_IGNORE,
                    what=what,
                    loaded_as=self._weights_dtype(),
                )
        self.is_checked = True

    def _start_as_twin(self, expected: str) -> bool:
        """Start as another adapter of the same file that still has that file's masks; whether there is one."""
        for twin in {group for layer in self.layers.values() for group in layer.groups.values()}:
            if twin is self or twin.config.file_digest != expected or fingerprint(twin._packed()) != expected:
                continue
            if self.start_as(twin):
                return True
        return False

    def start_as(self, twin: "AdapterMasks") -> bool:
        """Take the scores of another adapter of the same layers, where it has some; whether it has."""
        layers = list(self.layers.values())
        if not all(layer.has_scores(name) for layer in layers for name in (self.adapter_name, twin.adapter_name)):
            return False
        with torch.no_grad():
            for layer in layers:
                layer.maskft_scores[self.adapter_name].copy_(layer.maskft_scores[twin.adapter_name])
        self._choose()
        self.num_flips = 0
        return True

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's weights that the masks were made for; see :func:`fingerprint`."""
        versions = None if self.config.inference_mode else self._versions_of_weights()
        if self._fingerprint is None or (versions is not None and versions != self._fingerprint_versions):
            self._fingerprint, self._fingerprint_versions = self._take_fingerprint(), versions
        return self._fingerprint

    def _versions_of_weights(self) -> list[tuple[int, int]] | None:
        """What changes where base weights do; None where they are split, for no process can look at all of them."""
        weights = [layer.get_base_layer().weight for layer in self.layers.values()]
        if any(is_sharded(weight) for weight in weights):
            return None
        return [(id(weight), version_of(weight)) for weight in weights]

    def reference_fingerprint(self) -> str | None:
        """Fingerprint of what stands in the places left out; None where that is zero."""
        if self._reference_fingerprint is None:
            self._reference_fingerprint = self._take_reference_fingerprint()
        return self._reference_fingerprint

    def _take_reference_fingerprint(self, dtype: torch.dtype | None = None) -> str | None:
        references = {}
        for name, layer in self.layers.items():
            if self.adapter_name in layer.maskft_reference:
                reference = layer.maskft_reference[self.adapter_name]
                references[f"{name}.weight"] = reference.T if layer.fan_in_fan_out else reference  # as it is stored
        return fingerprint(references, dtype) if references else None

    def _take_fingerprint(self, dtype: torch.dtype | None = None) -> str:
        dtype = dtype or widest_dtype(layer.get_base_layer().weight.dtype for layer in self.layers.values())
        # One after the other: of split or merged layers a weight is a copy, which is gone before the next is made.
        digests = {
            f"{name}.weight": tensor_digest(f"{name}.weight", whole(layer.unmerged_weight()), dtype)
            for name, layer in self.layers.items()
        }
        return combine_digests(digests, dtype)

    def _weights_dtype(self) -> torch.dtype:
        return next(iter(self.layers.values())).get_base_layer().weight.dtype

    def _packed(self) -> dict[str, torch.Tensor]:
        return {name: layer.maskft_mask[self.adapter_name] for name, layer in self.layers.items()}

    @property
    def num_flips(self) -> int:
        """Number of weights that went in or out since :meth:`take_flips` was called last; waits for an accelerator."""
        self._refuse_nan()
        return int(self._num_flips)

    @num_flips.setter
    def num_flips(self, value: int) -> None:
        self._num_flips = value

    def take_flips(self) -> int:
        """Number of weights that flipped since the last call."""
        flips, self.num_flips = self.num_flips, 0
        return flips

    def num_weights(self) -> int:
        """Number of weights that the masks cover."""
        return sum(layer.in_features * layer.out_features for layer in self.layers.values())

    def kept_share(self) -> float:
        """Share of the covered weights that the masks keep, in [0, 1]."""
        kept = sum(num_kept_bits(mask) for mask in self.masks().values())
        return kept / self.num_weights()

    def masks(self) -> dict[str, torch.Tensor]:
        """The packed masks by module name: uint8, (out_features, ceil(in_features / 8))."""
        self.refresh()
        self._refuse_nan()
        return self._packed()

    def reachable_share(self, total_learning_rate: float) -> float:
        """Upper bound on the share of weights that can flip, in [0, 1].

        Adam moves a score by about the learning rate a step at most, so a score can cross the border only from
        within `total_learning_rate` (the sum over all steps) of it; where the border is a rank it can come
        half the way itself, which doubles the distance.
        """
        settings = self.config.selection_settings()
        transform = settings["score_transform"]
        stored = [layer.maskft_scores.stored(self.adapter_name) for layer in self.layers.values()]
        sizes = [layer.in_features * layer.out_features for layer in self.layers.values()]
        groups = list(zip([[tensor] for tensor in stored], sizes, strict=True))
        if settings["selection"] == "global_topk":
            groups = [(stored, sum(sizes))]
        num_reachable = torch.zeros((), dtype=torch.int64)
        for group, num_scores in groups:
            if settings["selection"] == "threshold":
                border, reach = settings["threshold"], total_learning_rate
            else:
                k = num_kept(num_scores, settings["density"])
                if k == num_scores:
                    continue
                border, reach = _kth_largest(group, k, transform), 2 * total_learning_rate
            for tensor in group:
                near = (transform_scores(local_part(tensor).detach(), transform) - border).abs() <= reach
                num_reachable += near.sum().cpu()
        if is_sharded(stored[0]):
            num_reachable = sum_over_shards(stored[0])(num_reachable.to(stored[0].device))
        return int(num_reachable) / self.num_weights()


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; those made in inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _by_device(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Places of the tensors that lie on one device, for each device."""
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    return list(places.values())


def _added(total: int | torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    return number + total if isinstance(total, int) else total + number.to(total.device)


def _kth_largest(scores: list[torch.Tensor], k: int, transform: ScoreTransform) -> float:
    if is_sharded(scores[0]):
        return kth_largest_of_shards(scores, k, transform)
    return float(kth_largest([tensor.detach().to(scores[0].device) for tensor in scores], k, transform))


_live_groups: "weakref.WeakSet[AdapterMasks]" = weakref.WeakSet()
_inside_backward: set[int] = set()


def step_in_backward(optimizer: Optimizer) -> None:
    """Step each parameter of `optimizer` as soon as its gradient is there, and free that gradient.

    So no more than one gradient lives at a time. Call `optimizer.step()` after the backward all the same: it finds no
    gradients left, and has the masks chosen. The scores are bit for bit those of a step after the backward, as long as
    the optimizer looks at each parameter alone, one backward makes a step, and no gradients are clipped together.
    """

    def step(parameter: torch.Tensor) -> None:
        # The others have no gradients at this time, and an optimizer passes over those.
        _inside_backward.add(id(optimizer))
        try:
            optimizer.step()
        finally:
            _inside_backward.discard(id(optimizer))
        parameter.grad = None

    for settings in optimizer.param_groups:
        for parameter in settings["params"]:
            parameter.register_post_accumulate_grad_hook(step)


def _refresh_after_step(optimizer: Optimizer, *_: object) -> None:
    if id(optimizer) in _inside_backward:  # all masks of a step are chosen together, when the backward is done
        return
    stepped = {id(parameter) for settings in optimizer.param_groups for parameter in settings["params"]}
    for group in list(_live_groups):
        layers = [layer for layer in group.layers.values() if layer.is_stepped(group.adapter_name, stepped)]
        for layer in layers:
            layer.forget_choice(group.adapter_name)
        if layers:
            group.refresh()
        elif zero.steps_copies():
            group.forget_choices()  # the scores follow from the copies later on


# `_version` alone would not do: fused optimizers (Transformers' default) change scores without counting it up, and a
# compiled forward cannot read it. So masks are chosen right after each step.
register_optimizer_step_post_hook(torch.compiler.disable(_refresh_after_step))
