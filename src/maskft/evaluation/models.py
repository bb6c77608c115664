"""The models of an evaluation: checked before any weight is loaded, and adapters put on one loaded base in turn."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_files import check_weights, load_model, read_tokenizer, weights_hash
from maskft.adapters.model_layout import read_config, read_layout, without_weights
from maskft.adapters.read import CONFIG_FILE, read_adapter
from maskft.errors import MaskftError, first_line
from maskft.storage.files import is_folder
from maskft.tuner import MaskConfig


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user named it: a checkpoint, or `base+adapter`."""

    name: str
    base: str
    adapter: str | None = None

    def hashes(self) -> dict[str, str]:
        """What the weights are and how they are used: hashes of the files of the base and of the adapter."""
        folders = {"base": self.base} | ({"adapter": self.adapter} if self.adapter is not None else {})
        used = ("config.json", "generation_config.json", CONFIG_FILE)
        return {what: weights_hash(folder, *used) for what, folder in folders.items()}


def parse_models(models: str) -> list[ModelSpec]:
    """Read `--models`; a `+` that belongs to the path of an existing folder separates nothing."""
    specs: list[ModelSpec] = []
    for name in (part.strip() for part in models.split(",")):
        base, plus, adapter = name.rpartition("+")
        if Path(name).exists() or not plus:
            base, adapter = name, ""
        if not base or (plus and not adapter and base != name):
            raise MaskftError(f"--models holds {name!r}; give folders or hub names, or BASE+ADAPTER, comma-separated.")
        if any(spec.name == name for spec in specs):
            raise MaskftError(f"--models names {name} twice; leave one out.")
        specs.append(ModelSpec(name, base, adapter or None))
    return specs


def check_models(specs: Sequence[ModelSpec]) -> dict[ModelSpec, PreTrainedTokenizerBase]:
    """Check every model from its small files, adapters against their bases, and give the tokenizer of each."""
    for base in dict.fromkeys(spec.base for spec in specs):
        _check_base(base)
    for spec in specs:
        if spec.adapter is not None:
            _check_adapter(spec, Path(spec.adapter))
    return {spec: _tokenizer(spec) for spec in specs}


def _check_base(base: str) -> None:
    path = Path(base)
    if (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file():
        raise MaskftError(f"{base} is an adapter, not a model; give it with its base, as BASE+{base}.")
    without_weights(read_config(base), base)
    check_weights(base)


def _tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's, or the one saved with the adapter, which may have learned with another chat template."""
    has_own = spec.adapter is not None and Path(spec.adapter, "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(str(spec.adapter) if has_own else spec.base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise MaskftError(f"The tokenizer of {spec.name!r} has neither a padding nor an end token; name one in it.")
    return tokenizer


def _check_adapter(spec: ModelSpec, folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise MaskftError(f"{folder} holds no {CONFIG_FILE}, so it is no adapter; give the folder one was saved to.")
    if not isinstance(_peft_config(folder), MaskConfig):
        return
    masks = read_adapter(folder, spec.base).masks
    if not is_folder(spec.base):
        return  # a hub model is checked when it is loaded
    layout = read_layout(spec.base)
    for name, mask in masks.items():
        layer = layout.find(name)
        if layer is None or mask.shape != (layer.out_features, -(-layer.in_features // 8)):
            why = f"its mask of `{name}` fits no layer there; give the base that its adapter_config.json names."
            raise MaskftError(f"The adapter {folder} was made for another base than {spec.base}: {why}")


def _peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a broken file makes PEFT raise
        raise MaskftError(f"{folder / CONFIG_FILE} cannot be used ({first_line(error)}); save it again.") from error


def load_models(specs: Sequence[ModelSpec], *, dtype: str, force: bool = False) -> Iterator[tuple[ModelSpec, Any]]:
    """Each model, ready to be scored; one base is in memory at a time, if the caller lets go of each model too."""
    for base in dict.fromkeys(spec.base for spec in specs):
        model = _load_base(base, dtype)
        for spec in specs:
            if spec.base == base and spec.adapter is None:
                yield spec, model
            elif spec.base == base:
                yield from _with_adapter(model, spec, force)
        del model
        gc.collect()  # PEFT and lm-eval hold models in circles, and two may not fit


def _with_adapter(model: Any, spec: ModelSpec, force: bool) -> Iterator[tuple[ModelSpec, Any]]:
    config = _peft_config(Path(str(spec.adapter)))
    is_mask = isinstance(config, MaskConfig)
    if is_mask:
        config.ignore_fingerprint = force
    wrapped: Any = PeftModel.from_pretrained(model, str(spec.adapter), config=config).eval()
    if is_mask:
        wrapped.merge_adapter()  # exact, and taken out again to the byte
    yield spec, wrapped
    if is_mask:
        wrapped.unmerge_adapter()
    wrapped.unload()


def _load_base(base: str, dtype: str) -> Any:
    model: Any = load_model(base, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
