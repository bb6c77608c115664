"""The models of an evaluation: checked before any weight is loaded, and adapters switched on one loaded base."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config, read_layout, without_weights
from maskft.adapters.read import CONFIG_FILE, read_adapter
from maskft.data.model_files import (
    check_weights,
    load_model,
    read_tokenizer,
    weights_hash,
)
from maskft.errors import MaskftError
from maskft.tuner import MaskConfig


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user named it: a checkpoint, or `base+adapter`."""

    name: str
    base: str
    adapter: str | None = None


def parse_models(models: str) -> list[ModelSpec]:
    """Read `--models`: comma-separated, each a folder or hub name, or `base+adapter`.

    A `+` that belongs to the path of an existing folder separates nothing.

    Raises:
        MaskftError: a name is empty or given twice.
    """
    specs = []
    for name in (part.strip() for part in models.split(",")):
        base, plus, adapter = name.rpartition("+")
        if Path(name).exists() or not plus:
            base, adapter = name, ""
        if not base or (plus and not adapter and base != name):
            raise MaskftError(f"--models holds {name!r}; give folders or hub names, or BASE+ADAPTER, comma-separated.")
        specs.append(ModelSpec(name, base, adapter or None))
    twice = sorted({spec.name for spec in specs if [s.name for s in specs].count(spec.name) > 1})
    if twice:
        raise MaskftError(f"--models names {twice[0]} twice; leave one out.")
    return specs


def check_models(specs: Sequence[ModelSpec]) -> dict[str, PreTrainedTokenizerBase]:
    """Check every model from its small files, and give the tokenizer of each base.

    Raises:
        MaskftError: a model cannot be read, an adapter given as a model, or an adapter made for other layers.
    """
    tokenizers = {base: _check_base(base) for base in dict.fromkeys(spec.base for spec in specs)}
    for spec in specs:
        if spec.adapter is not None:
            _check_adapter(spec)
    return tokenizers


def _check_base(base: str) -> PreTrainedTokenizerBase:
    path = Path(base)
    if (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file():
        raise MaskftError(f"{base} is an adapter, not a model; give it with its base, as BASE+{base}.")
    without_weights(read_config(base), base)
    check_weights(base)
    tokenizer = read_tokenizer(base)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise MaskftError(f"The tokenizer of {base!r} has neither a padding nor an end token; name one in it.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_adapter(spec: ModelSpec) -> None:
    folder = Path(str(spec.adapter))
    if not (folder / CONFIG_FILE).is_file():
        raise MaskftError(
            f"{folder} holds no {CONFIG_FILE}, so it is no adapter; give the folder that one was saved to."
        )
    if not isinstance(_peft_config(folder), MaskConfig):
        return
    adapter = read_adapter(folder)
    if not Path(spec.base).is_dir():
        return  # a hub model is checked when it is loaded
    layout = read_layout(spec.base)
    for name, mask in adapter.masks.items():
        layer = layout.find(name)
        fits = layer is not None and mask.shape == (layer.out_features, -(-layer.in_features // 8))
        if not fits:
            raise MaskftError(
                f"The adapter {folder} was made for another base than {spec.base}: its mask of `{name}` fits no layer "
                "there; give the base that its adapter_config.json names."
            )


def _peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, TypeError) as error:
        raise MaskftError(f"{folder / CONFIG_FILE} cannot be used ({error}); save the adapter again.") from error


def load_models(specs: Sequence[ModelSpec], *, dtype: str, force: bool = False) -> Iterator[tuple[ModelSpec, Any]]:
    """Each model, ready to be scored: bases one after the other, adapters switched on the one that is loaded.

    The mask of an adapter is merged while it is scored, which is exact, and taken out again.

    Raises:
        MaskftError: a base's weights cannot be read, or are not those that an adapter was learned on.
    """
    for base in dict.fromkeys(spec.base for spec in specs):
        model = _load_base(base, dtype)
        ours = [spec for spec in specs if spec.base == base]
        yield from ((spec, model) for spec in ours if spec.adapter is None)
        configs = {spec: _peft_config(Path(spec.adapter)) for spec in ours if spec.adapter is not None}
        # One PeftModel holds adapters of one kind.
        for kind in dict.fromkeys(type(config) for config in configs.values()):
            of_kind = {spec: config for spec, config in configs.items() if type(config) is kind}
            yield from _switch_adapters(model, of_kind, force)
        del model


def _switch_adapters(model: Any, configs: dict[ModelSpec, PeftConfig], force: bool) -> Iterator[tuple[ModelSpec, Any]]:
    wrapped: Any = None
    names = {spec: f"adapter_{i}" for i, spec in enumerate(configs)}
    for spec, config in configs.items():
        if isinstance(config, MaskConfig):
            config.ignore_fingerprint = force
        config.inference_mode = True
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, spec.adapter, adapter_name=names[spec], config=config)
        else:
            wrapped.add_adapter(names[spec], config)
            wrapped.load_adapter(spec.adapter, adapter_name=names[spec])
    wrapped.eval()
    for spec, config in configs.items():
        wrapped.set_adapter(names[spec], inference_mode=True)
        is_mask = isinstance(config, MaskConfig)
        if is_mask:
            wrapped.merge_adapter()
        yield spec, wrapped
        if is_mask:
            with warnings.catch_warnings():
                # Layers that only another adapter masks have nothing to take out, and say so.
                warnings.filterwarnings("ignore", "Already unmerged")
                wrapped.unmerge_adapter()
    wrapped.unload()


def _load_base(base: str, dtype: str) -> Any:
    model: Any = load_model(base, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def model_hashes(spec: ModelSpec) -> dict[str, str]:
    """What the weights are and how they are used: hashes of the files of the base and of the adapter."""
    folders = {"base": spec.base} | ({"adapter": spec.adapter} if spec.adapter is not None else {})
    return {what: weights_hash(folder, "config.json", "generation_config.json") for what, folder in folders.items()}
