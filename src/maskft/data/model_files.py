"""Whether a model can be started from, as far as its small files and the headers of its weights tell."""

from functools import cache
from pathlib import Path
from typing import Any, cast

import xxhash
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config
from maskft.adapters.weight_files import read_header, weight_files
from maskft.errors import MaskftError, first_line

UNKNOWN = "unknown"  # stands for the hash where a hub model's revision is not known
_BLOCK = 1 << 24


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


def load_model(model_name_or_path: str, dtype: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model with its weights.

    Args:
        dtype: of the weights, as `from_pretrained` takes it.
        model_init_kwargs: what else `from_pretrained` is given, as `attn_implementation`.

    Raises:
        MaskftError: they cannot be read, are not all there, or do not fit the configuration, or a keyword is not taken.
    """
    given = model_init_kwargs or {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, output_loading_info=True, **given
        )
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
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MaskftError(
            f"The weights of {model_name_or_path!r} lack {missing[0]}{more}, which would be filled at random; "
            "save or download the whole model again."
        )
    return cast(PreTrainedModel, model)


def check_weights(model_name_or_path: str) -> list[Path]:
    """The files of weights in a model's folder, each read up to its header; none for a name of the hub.

    Raises:
        MaskftError: it holds none, or a file is missing or was cut short, or an adapter lies beside them.
    """
    folder = Path(model_name_or_path)
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise MaskftError(
            f"{folder} holds an adapter (adapter_config.json) beside a model's weights, and Transformers would load "
            "both as one; move the adapter's files into a folder of their own, or merge it into the weights."
        )
    files = weight_files(folder) if folder.is_dir() else []
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)
    return files


def weights_hash(model_name_or_path: str, *others: str) -> str:
    """XXH3 of 128 bits (hex) over a folder's files of weights, and over `others` of its files where they are there.

    A folder is read once in a process, while sizes and times of its files stay. For a name of the hub it is the
    revision, or `UNKNOWN`.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        return str(getattr(read_config(model_name_or_path), "_commit_hash", None) or UNKNOWN)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") or file.name in others)
    return _hash_files(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = xxhash.xxh3_128()
    for path, _, _ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
