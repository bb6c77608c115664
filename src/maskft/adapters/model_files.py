"""Whether a model can be started from, as far as its small files and the headers of its weights tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import transformers
import xxhash
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.model_layout import read_config, without_weights
from maskft.adapters.weight_files import read_header, weight_files
from maskft.errors import MaskftError, first_line
from maskft.storage.files import is_file, is_folder
from maskft.tuner.reference import refuse_hub_kernel

UNKNOWN = "unknown"  # stands for the hash where a hub model's revision is not known
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Limits:
    """How many tokens a model has embeddings for, and positions, where it has learned those."""

    num_tokens: int
    num_positions: int | None

    def check(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse token ids that the model cannot take.

        Raises:
            MaskftError: an id is beyond the embeddings, or there are more than positions.
        """
        if (largest := max(ids, default=0)) >= self.num_tokens:
            raise MaskftError(
                f"the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, and the model has "
                f"embeddings for {self.num_tokens} tokens; give the tokenizer that it was saved with."
            )
        if self.num_positions is not None and len(ids) > self.num_positions:
            raise MaskftError(
                f"it has {len(ids)} tokens, and the model has {self.num_positions} positions; set --max_length to "
                "that, or shorten it."
            )


def hub_name(name: str | Path | None) -> str | None:
    """The name, where it can be that of a hub's repository; None for what lies on this machine, and for no name."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return str(name) if name and not Path(name).exists() else None


def model_limits(model_name_or_path: str) -> Limits:
    """The sizes of a model, from its configuration alone."""
    config = read_config(model_name_or_path)
    model = without_weights(config, model_name_or_path)
    tokens = model.get_input_embeddings()
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    others = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT has two positions more, which no token takes.
    has_positions = longest is not None and any(number in (longest, longest + 2) for number in others)
    return Limits(tokens.num_embeddings, longest if has_positions else None)


def read_tokenizer(
    model_name_or_path: str, *, chat_template_path: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        chat_template_path: a .jinja file, or a folder or hub name of a tokenizer, whose chat template it takes.
        eos_token: the end token it takes. Default: its own, or that of the other tokenizer where it has that too.

    Raises:
        MaskftError: there is none, or it cannot be read, or has no such token.
    """
    told = "No tokenizer can be read from {!r}; save one beside the model's weights"
    tokenizer = _tokenizer(model_name_or_path, told)
    if str(chat_template_path).endswith((".jinja", ".j2")) and is_file(chat_template_path):
        try:
            tokenizer.chat_template = Path(str(chat_template_path)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MaskftError(
                f"`chat_template_path` {chat_template_path!r} cannot be read ({error}); save it as text in UTF-8."
            ) from error
    elif chat_template_path is not None:
        other = _tokenizer(
            chat_template_path, "`chat_template_path` {!r} is neither a .jinja file nor a model with a tokenizer"
        )
        if other.chat_template is None:
            raise MaskftError(f"`chat_template_path` {chat_template_path!r} has no chat template; give another one.")
        tokenizer.chat_template = template = other.get_chat_template()
        own = tokenizer.get_vocab()
        lacking = [token for token in other.get_added_vocab() if token in template and token not in own]
        if lacking:
            raise MaskftError(
                f"The chat template of {chat_template_path!r} writes the token {lacking[0]!r}, which is none of "
                f"{model_name_or_path!r}; add it to that model first, or give another template."
            )
        eos_token = eos_token or (other.eos_token if other.eos_token in own else None)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise MaskftError(f"`eos_token` {eos_token!r} is no token of {model_name_or_path!r}; give one that is.")
        tokenizer.eos_token = eos_token
    return tokenizer


def read_generation_config(model_name_or_path: str) -> GenerationConfig:
    """How the model generates, as it would be loaded with it."""
    try:
        return GenerationConfig.from_pretrained(model_name_or_path)
    except OSError:  # it has no file of its own
        return GenerationConfig.from_model_config(read_config(model_name_or_path))
    except Exception as error:
        raise MaskftError(
            f"generation_config.json of {model_name_or_path!r} cannot be used ({first_line(error)}); correct it, or "
            "save the model again."
        ) from error


def _tokenizer(name: str, told: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes Transformers raise
        raise MaskftError(f"{told.format(name)} ({first_line(error)}).") from error


def load_model(model_name_or_path: str, dtype: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model with its weights.

    Args:
        dtype: of the weights, as `from_pretrained` takes it.
        model_init_kwargs: what else `from_pretrained` is given, as `attn_implementation`.

    Raises:
        MaskftError: they cannot be read, are not all there, or do not fit the configuration, or a keyword is not taken.
    """
    given = model_init_kwargs or {}
    transformers.logging.disable_progress_bar()  # of reading weights, and of writing them later
    try:
        refuse_hub_kernel(model_name_or_path, given.get("attn_implementation"))
        model, info = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **given
        )
    except MaskftError:
        raise
    except (TypeError, ValueError, ImportError, AttributeError, LookupError, RecursionError) as error:
        hint = f" with `model_init_kwargs` {given!r}" if given else f" from {model_name_or_path!r}"
        remedy = "correct them or leave them out" if given else "download or save the model again"
        raise MaskftError(f"The model cannot be loaded{hint} ({first_line(error)}); {remedy}.") from error
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
    if is_file(folder / "config.json") and is_file(folder / "adapter_config.json"):
        raise MaskftError(
            f"{folder} holds an adapter (adapter_config.json) beside a model's weights, and Transformers would load "
            "both as one; move the adapter's files into a folder of their own, or merge it into the weights."
        )
    files = weight_files(folder) if is_folder(folder) else []
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
    if not is_folder(folder):
        return str(getattr(read_config(model_name_or_path), "_commit_hash", None) or UNKNOWN)
    kinds = (".safetensors", ".bin")
    files = sorted(f for f in folder.iterdir() if f.is_file() and (f.suffix in kinds or f.name in others))
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
