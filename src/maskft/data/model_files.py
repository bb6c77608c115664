"""Whether a model can be started from, as far as its small files and the headers of its weights tell."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from maskft.errors import MaskftError, first_line
from maskft.tuner.zero import loading_whole

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def read_config(model_name_or_path: str) -> Any:
    """The model's configuration.

    Raises:
        MaskftError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise MaskftError(
            f"No model can be read from {model_name_or_path!r}; give a folder with config.json or a hub name "
            f"({first_line(error)})"
        ) from error


def read_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        MaskftError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model_name_or_path)
    except (OSError, ValueError, ImportError) as error:
        raise MaskftError(
            f"No tokenizer can be read from {model_name_or_path!r} ({first_line(error)}); save the model's tokenizer "
            "beside its weights."
        ) from error


def without_weights(config: Any, model_name_or_path: str) -> PreTrainedModel:
    """The model of a configuration, on the meta device.

    Raises:
        MaskftError: the configuration is not one of a causal language model.
    """
    try:
        with torch.device("meta"), loading_whole():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise MaskftError(
            f"{model_name_or_path!r} holds a model of the type {config.model_type!r}, which Transformers cannot read "
            "as a causal language model; give one that is."
        ) from error
    return model


def load_model(model_name_or_path: str, dtype: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model with its weights.

    Args:
        dtype: of the weights, as `from_pretrained` takes it.
        model_init_kwargs: what else `from_pretrained` is given, as `attn_implementation`.

    Raises:
        MaskftError: they cannot be read, or do not fit the configuration, or a keyword is not taken.
    """
    given = model_init_kwargs or {}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype, **given)
    except (TypeError, ValueError, ImportError) as error:
        if not given:
            raise
        raise MaskftError(
            f"The model cannot be loaded with `model_init_kwargs` {given!r} ({first_line(error)}); correct them or "
            "leave them out."
        ) from error
    except (OSError, SafetensorError) as error:
        raise MaskftError(
            f"The weights of {model_name_or_path!r} cannot be read ({first_line(error)}); download or save the model "
            "again."
        ) from error
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise MaskftError(
            f"The weights of {model_name_or_path!r} have other shapes than its config.json says; save the model again."
        ) from error
    return model


def check_weights(model_name_or_path: str) -> list[Path]:
    """The files of weights in a model's folder, each read up to its header; none for a name of the hub.

    Raises:
        MaskftError: it holds none, or a file is missing or was cut short.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        return []
    files = _weight_files(folder)
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        except FileNotFoundError as error:
            raise MaskftError(
                f"{folder} lacks {file.name}, which holds a part of its weights; save or download the model again."
            ) from error
        except (OSError, SafetensorError) as error:
            raise MaskftError(
                f"{file} is damaged or was cut short ({first_line(error)}); save or download the model again."
            ) from error
    return files


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]  # which Transformers takes first
    index = folder / _INDEX
    if index.exists():
        try:
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MaskftError(f"{index} names no files of weights; save or download the model again.") from error
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise MaskftError(f"{folder} holds no weights ({_WEIGHTS}); save or download the model again.")
    return files
