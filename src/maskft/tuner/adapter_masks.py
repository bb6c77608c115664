"""The masks of one adapter, over all its layers: chosen together, once for each optimizer step."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskft.errors import MaskftError, damaged_weight
from maskft.masks import num_flipped_bits, num_kept_bits
from maskft.masks.selection import hold_back, refuse_nan, select_packed, transform_scores
from maskft.storage import fingerprint as hashes
from maskft.tuner import sharding, zero
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer, version_of
from maskft.tuner.sharding import is_sharded
from maskft.tuner.stepping import live

_HOW_TO_IGNORE = (
    "pass ignore_fingerprint=True to PeftModel.from_pretrained (on the command line: --force; before `load_adapter`: "
    "add_adapter with MaskConfig.from_pretrained(FOLDER, ignore_fingerprint=True))"
)
_NUM_COUNTED = 32  # masks whose flips are counted together


class AdapterMasks:
    """The one owner of an adapter's masks: it knows whether they are current, and chooses them.

    That is after each optimizer step, and before a forward of the model when scores were changed in another way
    (`Tensor._version` tells, which changes in place through `.data` pass by: use an optimizer or `torch.no_grad()`). A
    compiled forward looks at nothing: call :meth:`refresh` with `anew` after such a change.

    On an accelerator the host does not wait for a choice: flips are counted there, and scores that are NaN are refused
    when the flips or the masks are next asked for (a log, an evaluation, a checkpoint).

    Attributes:
        layers: the masked layers by module name.
        learns: whether they have scores.
        num_refreshes: how often masks were chosen.
        is_checked: whether the masks are known to be those of the adapter's file, where it has one.
        trained_before: names of the parameters that required gradients before the adapter was added.
    """

    def __init__(self, adapter_name: str, config: MaskConfig) -> None:
        self.adapter_name = adapter_name
        self.config = config
        self.layers: dict[str, MaskLayer] = {}
        self.learns = not config.inference_mode
        self.num_refreshes = 0
        self.is_checked = self.learns and config.file_digest is None
        self._keeps_masked_weights = True
        self._num_flips: int | Tensor = 0
        self._num_nan: Tensor | None = None
        # Of each layer that has a mask: what its scores were like when it got it, and whether it was chosen from them.
        self._masked_at: dict[MaskLayer, tuple[int, int, int] | None] = {}
        self._by_hand: set[MaskLayer] = set()
        # A mask that learns is tied to the base that it learns on, whatever its file was.
        self._fingerprint = None if self.learns else config.file_fingerprint
        self._fingerprint_versions: list[tuple[int, int]] | None = None
        self._reference_fingerprint: str | None = None
        self.trained_before: set[str] = set()
        self._hook: RemovableHandle | None = None
        live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        live.add(self)

    def begin(self, model: nn.Module) -> None:
        """Make the masks current before each forward of `model`, from now on."""
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def end(self) -> None:
        """Leave the model alone: the adapter is gone from it."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self.learns or not self.is_checked:
            first = next(iter(self.layers.values()))
            if self.adapter_name in first.active_adapters and not first.disable_adapters:
                self.make_current(*self.layers.values())

    def make_current(self, *layers: MaskLayer) -> None:
        """Choose the masks of these layers anew where their scores have changed, and check masks from a file, once.

        Raises:
            MaskftError: see :meth:`refresh`, or masks that are to be checked inside of `torch.compile`.
        """
        if torch.compiler.is_compiling():
            if not self.is_checked:
                raise MaskftError(
                    f"The masks of adapter {self.adapter_name!r} are not checked yet, which a compiled forward cannot "
                    "do; run the model once before torch.compile, or load it with PeftModel.from_pretrained."
                )
        elif not self.is_checked or (self.learns and any(map(self._is_stale, layers))):
            self.refresh()

    def refresh(self, *, anew: bool = False) -> None:
        """Choose the masks anew where scores have changed since they were chosen last.

        Args:
            anew: choose them also where no change is seen; DeepSpeed loads a checkpoint's scores unseen.

        Raises:
            MaskftError: scores that are NaN or not float32, or see :meth:`check`.
        """
        if anew:
            self._forget(self.layers.values())
        with torch.inference_mode(False):  # for the next training step needs the masks too
            self._choose()
        if not self.is_checked:
            self.check()

    def keep(self, layer: MaskLayer) -> None:
        """Take a layer's mask as it is, which somebody set, until its scores change."""
        self._masked_at[layer] = _state_of(self._scores(layer))
        self._by_hand.add(layer)

    def after_step(self, stepped: set[int]) -> None:
        """Choose the masks of scores that an optimizer has stepped, given the ids of all parameters it steps."""
        layers = [layer for layer in self.layers.values() if id(self._scores(layer)) in stepped] if self.learns else []
        self._forget(layers)
        if layers:
            if self.config.max_flips < 1:
                self._hold_back()
            self.refresh()
        elif zero.steps_copies():
            self._forget(self.layers.values())  # the scores follow from the copies later on

    @torch.no_grad()
    def _hold_back(self) -> None:
        """Put scores back to the threshold where more weights would flip than `max_flips` allows."""
        scores = [self._scores(layer) for layer in self.layers.values()]
        if zero.steps_copies() or any(map(is_sharded, scores)):
            raise MaskftError("`max_flips` moves scores after a step; FSDP2 and DeepSpeed split them: leave it out.")
        limit, settings = math.ceil(self.config.max_flips * self.num_weights()), self.config.selection_settings()
        hold_back(scores, list(self._packed().values()), limit, settings["threshold"], settings["score_transform"])

    def final(self) -> dict[str, Tensor]:
        """The packed masks by module name, for a file or a merge: changes of scores through `.data` are seen too.

        Raises:
            MaskftError: DeepSpeed has split scores that were stepped since the masks were chosen.
        """
        if any(zero.is_split(self._scores(layer)) and self._is_stale(layer) for layer in self.layers.values()):
            raise MaskftError(
                "Under ZeRO-3 masks are chosen by all processes at once, and the scores were stepped since they were; "
                f"call find_group(model, {self.adapter_name!r}).refresh() on each before saving (a trainer does it by "
                "maskft.MaskCallback)."
            )
        # Choosing masks of split scores takes all processes, and one alone may be saving.
        whole = [layer for layer in self.layers.values() if not is_sharded(self._scores(layer))]
        self._forget(layer for layer in whole if layer not in self._by_hand)
        return self.masks()

    def _forget(self, layers: Iterable[MaskLayer]) -> None:
        """Take the masks of these layers for stale, where they follow from scores."""
        for layer in layers if self.learns else ():
            self._masked_at.pop(layer, None)

    @property
    def keeps_masked_weights(self) -> bool:
        """Whether masked weights are kept from one forward to the next.

        False makes them anew in each forward and again in its backward: slower, and without their memory.
        """
        return self._keeps_masked_weights

    @keeps_masked_weights.setter
    def keeps_masked_weights(self, value: bool) -> None:
        self._keeps_masked_weights = value
        for layer in self.layers.values():
            layer.forget_masked_weights(of=self.adapter_name)

    def _scores(self, layer: MaskLayer) -> Any:
        scores: Any = layer._modules["maskft_scores"]
        return scores.stored(self.adapter_name)

    def _is_stale(self, layer: MaskLayer) -> bool:
        scores = self._scores(layer)
        return scores is not None and not scores.is_meta and self._masked_at.get(layer) != _state_of(scores)

    def _choose(self) -> None:
        stale = [layer for layer in self.layers.values() if self._is_stale(layer)]
        if not stale:
            return
        if self.config.selection == "global_topk":
            stale = list(self.layers.values())
        scores = [self._scores(layer) for layer in stale]
        for tensor in scores:
            self._require_usable(tensor)
        with self._told_of_base():
            if is_sharded(scores[0]):
                masks = sharding.packed_masks_of_shards(scores, **self.config.selection_settings())
            else:
                masks, self._num_nan = self._select([tensor.detach() for tensor in scores])
        before = [layer.maskft_mask._buffers.get(self.adapter_name) for layer in stale]
        self._count_flips([(old, new) for old, new in zip(before, masks, strict=True) if old is not None])
        for layer, packed in zip(stale, masks, strict=True):
            layer.put_mask(self.adapter_name, packed)
            self._masked_at[layer] = _state_of(self._scores(layer))
        self._by_hand.difference_update(stale)
        self.num_refreshes += 1

    def _require_usable(self, scores: Tensor) -> None:
        if not isinstance(scores, nn.Parameter) and dist.is_available() and dist.is_initialized():
            raise MaskftError(
                "FSDP's first version flattens scores, of which no mask can be chosen; use its second one "
                "(torch.distributed.fsdp.fully_shard, or fsdp_version: 2 for accelerate)."
            )
        if scores.dtype != torch.float32:
            raise MaskftError(
                f"The scores of adapter {self.adapter_name!r} were cast to {scores.dtype}, and rounded scores choose "
                "another mask; keep them in float32."
            )

    def _select(self, scores: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Packed masks, each on the device of its scores, and how many scores are NaN.

        A model that is too large for one device has its layers on several.
        """
        settings, devices = self.config.selection_settings(), [tensor.device for tensor in scores]
        if settings["selection"] == "global_topk":
            scores = [tensor.to(devices[0]) for tensor in scores]
        masks: dict[int, Tensor] = {}
        num_nan: int | Tensor = 0
        for indices in _by_device(scores):
            chosen, num_here = select_packed([scores[i] for i in indices], **settings)
            masks |= dict(zip(indices, chosen, strict=True))
            num_nan = _added(num_nan, num_here)
        assert isinstance(num_nan, Tensor)
        return [masks[i].to(device) for i, device in enumerate(devices)], num_nan

    def _count_flips(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for indices in _by_device([new for _, new in pairs]):
            for begin in range(0, len(indices), _NUM_COUNTED):
                # Some at once, since each is little work on a GPU, and not all, since they are copied.
                part = zip(*(pairs[i] for i in indices[begin : begin + _NUM_COUNTED]), strict=True)
                old, new = (torch.cat([mask.flatten() for mask in some]) for some in part)
                self._num_flips = _added(self._num_flips, num_flipped_bits(old, new))

    def _refuse_nan(self) -> None:
        if self._num_nan is not None:
            num_nan, self._num_nan = self._num_nan, None
            with self._told_of_base():
                refuse_nan(num_nan, self.num_weights())

    @contextmanager
    def _told_of_base(self) -> Iterator[None]:
        """Where scores are refused as NaN, say so of the weight that made them, if one did."""
        try:
            yield
        except MaskftError:
            for name, layer in self.layers.items():
                weight = layer.oriented_weight()
                if not is_sharded(weight) and not weight.isfinite().all():
                    raise MaskftError(damaged_weight(name)) from None
            raise

    def check(self) -> None:
        """Check masks against what the adapter's file says of them and of the base model, once.

        Masks can come in by name alone: Transformers' own `load_adapter` calls no hook of PEFT's, and leaves what it
        does not find as it was.

        Raises:
            MaskftError: no masks, others than the file's, or a base model they were not learned on.
        """
        if self.is_checked:
            return
        if not self._is_loaded():
            raise MaskftError(
                f"Adapter {self.adapter_name!r} is to be trained, but its scores are not those that its masks were "
                "chosen from; load a training checkpoint (checkpoint-N), which has scores, or start a new adapter from "
                "a MaskConfig of its own."
                if self.learns
                else f"Adapter {self.adapter_name!r} has no mask, or others than its adapter_config.json says: it was "
                "created for inference and nothing was loaded into it, or it is a compressed one, which Transformers' "
                "own load_adapter does not read, or its file is damaged; load it with PeftModel.from_pretrained, or "
                "save or download it again."
            )
        for what, expected, take in (
            ("base model", self.config.file_fingerprint, self._take_fingerprint),
            ("reference model", self.config.file_reference_fingerprint, self._take_reference_fingerprint),
        ):
            if expected and not self.config.ignore_fingerprint:
                actual = str(take(hashes.fingerprint_dtype(expected)))
                dtype = next(iter(self.layers.values())).get_base_layer().weight.dtype
                hashes.check_fingerprint(expected, actual, how_to_ignore=_HOW_TO_IGNORE, what=what, loaded_as=dtype)
        self.is_checked = True

    def _is_loaded(self) -> bool:
        """Whether the masks are the file's; scores may follow from another adapter of the same file."""
        expected = self.config.file_digest
        if expected is None:
            return len(self._masked_at) == len(self.layers)
        twins = [owner for owner in owners_of(self.layers.values()) if owner is not self]
        return hashes.fingerprint(self._packed()) == expected or any(
            twin.config.file_digest == expected == hashes.fingerprint(twin._packed()) and self.start_as(twin)
            for twin in twins
        )

    def start_as(self, twin: "AdapterMasks") -> bool:
        """Take the scores of another adapter of the same layers, where it has some; whether it has."""
        if not (self.learns and twin.learns and list(self.layers.values()) == list(twin.layers.values())):
            return False
        with torch.no_grad():
            for layer in self.layers.values():
                layer.maskft_scores[self.adapter_name].copy_(layer.maskft_scores[twin.adapter_name])
        self._choose()
        self.num_flips = 0
        return True

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's weights that the masks were made for; see :func:`fingerprint`."""
        weights = [layer.get_base_layer().weight for layer in self.layers.values()]
        # A process that holds parts of the weights cannot see all changes.
        is_fixed = not self.learns or any(map(is_sharded, weights))
        versions = None if is_fixed else [(id(weight), version_of(weight)) for weight in weights]
        if self._fingerprint is None or (versions is not None and versions != self._fingerprint_versions):
            self._fingerprint, self._fingerprint_versions = self._take_fingerprint(), versions
        return self._fingerprint

    def reference_fingerprint(self) -> str | None:
        """Fingerprint of what stands where weights are left out; None where that is zero."""
        if self._reference_fingerprint is None:
            self._reference_fingerprint = self._take_reference_fingerprint()
        return self._reference_fingerprint

    def _take_reference_fingerprint(self, dtype: torch.dtype | None = None) -> str | None:
        references = {}
        for name, layer in self.layers.items():
            if self.adapter_name in layer.maskft_reference:
                reference = layer.maskft_reference[self.adapter_name]
                references[f"{name}.weight"] = reference.T if layer.fan_in_fan_out else reference  # as it is stored
        return hashes.fingerprint(references, dtype) if references else None

    def _take_fingerprint(self, dtype: torch.dtype | None = None) -> str:
        dtype = dtype or hashes.widest_dtype(layer.get_base_layer().weight.dtype for layer in self.layers.values())
        # One after the other: of split or merged layers a weight is a copy, which is gone before the next is made.
        digests = {
            f"{name}.weight": hashes.tensor_digest(f"{name}.weight", sharding.whole(layer.unmerged_weight()), dtype)
            for name, layer in self.layers.items()
        }
        return hashes.combine_digests(digests, dtype)

    def _packed(self) -> dict[str, Tensor]:
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
        return sum(num_kept_bits(mask) for mask in self.masks().values()) / self.num_weights()

    def masks(self) -> dict[str, Tensor]:
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
        config, layers = self.config, list(self.layers.values())
        self.refresh()

        def ranked(layer: MaskLayer) -> Tensor:
            """What the rule ranks, whole on every process; of one layer at a time, since it may be split."""
            scores = sharding.whole(self._scores(layer)).detach()
            return transform_scores(scores, config.selection_settings()["score_transform"])

        num_reachable = 0
        for pool in [layers] if config.selection == "global_topk" else [[layer] for layer in layers]:
            border, reach = config.threshold, total_learning_rate
            if config.selection != "threshold":
                left_out = {layer: ~layer.mask([self.adapter_name]) for layer in pool}
                if not any(mask.any() for mask in left_out.values()):
                    continue
                border = min(float(ranked(each).masked_fill(mask, math.inf).min()) for each, mask in left_out.items())
                reach = 2 * total_learning_rate
            num_reachable += sum(int(((ranked(layer) - border).abs() <= reach).sum()) for layer in pool)
        return num_reachable / self.num_weights()


def owners_of(layers: Iterable[MaskLayer]) -> list[AdapterMasks]:
    """The owners of the masks of some layers, each once."""
    owners = (owner for layer in layers for owner in layer.owners.values())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, AdapterMasks)))


def _state_of(scores: Any) -> tuple[int, int, int] | None:
    """What is another one when scores have changed; None where there are none."""
    if scores is None:
        return None
    # ZeRO counts no versions up, nor the same ones everywhere, and all processes have to choose at once. Addresses
    # differ between processes too; elsewhere they tell of values that were assigned to `.data`.
    if is_sharded(scores):
        return id(scores), 0, -1 if zero.is_split(scores) else sharding.local_part(scores)._version
    return id(scores), scores.data_ptr(), version_of(scores)


def _by_device(tensors: list[Tensor]) -> list[list[int]]:
    """Indices of the tensors that lie on one device, for each device."""
    indices: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        indices.setdefault(tensor.device, []).append(i)
    return list(indices.values())


def _added(total: int | Tensor, number: Tensor) -> Tensor:
    return number + total if isinstance(total, int) else total + number.to(total.device)
