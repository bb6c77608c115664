"""Folding a mask into a plain Hugging Face checkpoint, on disk, with one shard in memory at a time."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskft.checkpoints.adapter import Adapter, LinearLayout, read_adapter, read_layout
from maskft.checkpoints.files import (
    atomic_folder,
    atomic_write_text,
    disk_errors,
    require_empty_output,
    require_free_space,
)
from maskft.checkpoints.fingerprint import (
    check_fingerprint,
    combine_digests,
    fingerprint_dtype,
    tensor_digest,
)
from maskft.errors import MaskftError
from maskft.masks import apply_mask, check_packed, num_kept_bits, unpack_mask

logger = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Other copies of the weights would be unmasked ones, and pickles can run code.
_LEFT_OUT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
}
_LEFT_OUT_NAMES = {"README.md", "trainer_state.json", "adapter_config.json"}


@dataclass(frozen=True)
class MergeSummary:
    """What a merge wrote.

    Attributes:
        output_dir: the merged model.
        base_model: the base model's folder.
        num_masks: masked tensors.
        num_weights: weights in them.
        num_kept: weights of these that were kept.
        num_shards: weight files written.
        num_bytes: bytes of the whole folder without its README.
    """

    output_dir: Path
    base_model: Path
    num_masks: int
    num_weights: int
    num_kept: int
    num_shards: int
    num_bytes: int

    @property
    def kept_share(self) -> float:
        """Share of the masked tensors' weights that was kept, in [0, 1]."""
        return self.num_kept / self.num_weights


@dataclass(frozen=True)
class _MaskedTensor:
    """One tensor of the base model's files, and the mask for it."""

    module: str
    packed: Tensor
    layout: LinearLayout
    reference_file: Path | None = None

    def apply(self, key: str, weight: Tensor) -> Tensor:
        mask = unpack_mask(self.packed, self.layout.in_features)
        reference = None
        if self.reference_file is not None:
            with _open(self.reference_file) as tensors:
                reference = tensors.get_tensor(key).to(weight.dtype)
        return apply_mask(weight, mask.T if self.layout.is_transposed else mask, reference)


def merge_checkpoint(
    adapter_path: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | Path | None = None,
    reference_model_name_or_path: str | Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeSummary:
    """Write the base model with the mask folded in, as a checkpoint that needs neither PEFT nor maskft.

    Tensors keep their dtype and files their names; the tokenizer and other small files are copied. Nothing appears in
    `output_dir` before all is written.

    Args:
        adapter_path: the adapter's folder.
        output_dir: folder to write; absent or empty.
        model_name_or_path: folder of the base model; by default the one that the adapter names.
        reference_model_name_or_path: for reference='pretrained', folder of the model before fine-tuning; by default the
            one that the adapter names.
        force: merge into a base model whose masked weights are not those the mask was learned on.
        progress: called after each weight file with the bytes done and the bytes in all.

    Raises:
        MaskftError: an adapter or a base model that cannot be read, do not fit each other, or a disk that refuses.
    """
    adapter = read_adapter(adapter_path)
    base = _find_folder(
        "base model", "model_name_or_path", model_name_or_path or adapter.config.base_model_name_or_path
    )
    require_empty_output(output_dir, what="the merged model")
    shards = _read_shards(base)
    masked = _match(adapter, base, shards)
    _check_weights("base model", adapter.config.base_fingerprint, adapter, base, shards, masked, force)
    if adapter.config.reference == "pretrained":
        masked = _with_references(adapter, reference_model_name_or_path, masked, force)
    others = _other_files(base)
    sizes = {shard: (base / shard).stat().st_size for shard in shards}
    num_bytes = sum(sizes.values()) + sum((base / file).stat().st_size for file in others)
    require_free_space(output_dir, num_bytes, "the merged model")
    summary = MergeSummary(
        output_dir=Path(output_dir),
        base_model=base,
        num_masks=len(masked),
        num_weights=sum(m.layout.out_features * m.layout.in_features for m in masked.values()),
        num_kept=sum(num_kept_bits(m.packed) for m in masked.values()),
        num_shards=len(shards),
        num_bytes=num_bytes,
    )
    done = 0
    with disk_errors(f"write {output_dir}"), atomic_folder(output_dir) as folder:
        for shard, keys in shards.items():
            _write_shard(base / shard, folder / shard, {k: masked[k] for k in keys if k in masked})
            done += sizes[shard]
            if progress is not None:
                progress(done, sum(sizes.values()))
        for file in others:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, folder / file)
        atomic_write_text(folder / "README.md", _model_card(adapter, summary))
    return summary


def _find_folder(what: str, flag: str, name: str | Path | None) -> Path:
    if not name:
        raise MaskftError(f"The adapter does not name its {what}; give its folder with --{flag}.")
    folder = Path(name)
    if not folder.is_dir():
        raise MaskftError(
            f"The {what} {str(name)!r} is not a folder here; download it and give its folder with --{flag}."
        )
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MaskftError(f"{file} of the base model cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise MaskftError(f"{file} of the base model must hold a JSON object.")
    return content


def _read_shards(base: Path) -> dict[str, list[str]]:
    """Names of the tensors in each weight file, by file name."""
    if "quantization_config" in _read_json(base / "config.json"):
        raise MaskftError(f"The base model {base} is quantized; give the folder of the unquantized model.")
    if (base / _SINGLE).is_file():
        files = [_SINGLE]
    elif (base / _INDEX).is_file():
        weight_map = _read_json(base / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise MaskftError(f"{base / _INDEX} has no `weight_map` of file names; download the model again.")
        files = sorted(set(weight_map.values()))
    else:
        pickles = sorted(f.name for f in base.glob("pytorch_model*.bin"))
        if pickles:
            raise MaskftError(
                f"The base model {base} has its weights in {pickles[0]}, a pickle, which can run code when it is read: "
                "it is refused; convert the model to safetensors first."
            )
        raise MaskftError(f"The folder {base} has neither {_SINGLE} nor {_INDEX}; give a Hugging Face checkpoint.")
    shards = {}
    for file in files:
        if Path(file).name != file:
            raise MaskftError(f"{base / _INDEX} names the file {file!r}, which is outside its folder.")
        if not (base / file).is_file():
            raise MaskftError(f"The base model {base} lacks its weight file {file}; download it again.")
        with _open(base / file) as tensors:
            shards[file] = list(tensors.keys())
    return shards


def _match(adapter: Adapter, base: Path, shards: dict[str, list[str]]) -> dict[str, _MaskedTensor]:
    """The masks by the name of their tensor in the files; every mask finds exactly one."""
    layout = read_layout(base)
    keys = {key for names in shards.values() for key in names}
    masked: dict[str, _MaskedTensor] = {}
    for module, packed in adapter.masks.items():
        linear = layout.find(module)
        key = next((f"{n}.weight" for n in layout.other_names(module) if f"{n}.weight" in keys), None)
        if linear is None or key is None or key in masked:
            raise MaskftError(
                f"The base model {base} has no weight of its own for the mask of `{module}`: the adapter was made for "
                "another model; give the right folder with --model_name_or_path."
            )
        check_packed(packed, (linear.out_features, linear.in_features), module)
        masked[key] = _MaskedTensor(module, packed, linear)
    return masked


def _check_weights(
    what: str,
    expected: str | None,
    adapter: Adapter,
    base: Path,
    shards: dict[str, list[str]],
    masked: dict[str, _MaskedTensor],
    force: bool,
) -> None:
    """Read the masked tensors one by one: shapes and kinds must fit, and the fingerprint unless `force`."""
    if expected is None:
        logger.warning("The adapter %s has no fingerprint of its %s; it is not checked.", adapter.path, what)
    check = expected is not None and not force
    dtype = fingerprint_dtype(expected) if expected is not None and check else None
    digests = {}
    for shard, keys in shards.items():
        with _open(base / shard) as tensors:
            for key in keys:
                if key not in masked:
                    continue
                linear = masked[key].layout
                shape = (linear.out_features, linear.in_features)
                stored = tuple(tensors.get_slice(key).get_shape())
                if stored != (shape[::-1] if linear.is_transposed else shape):
                    raise MaskftError(
                        f"{base / shard} holds `{key}` with the shape {stored}, which is not what config.json says; "
                        "download the model again."
                    )
                weight = tensors.get_tensor(key)
                if not weight.is_floating_point():
                    raise MaskftError(
                        f"{base / shard} holds `{key}` as {weight.dtype}: the model is quantized; give the unquantized "
                        "one."
                    )
                if dtype is not None:
                    name = f"{masked[key].module}.weight"
                    digests[name] = tensor_digest(name, weight, dtype)
    if expected is not None and dtype is not None:
        check_fingerprint(
            expected,
            combine_digests(digests, dtype),
            how_to_ignore="pass force=True (on the command line: --force)",
            what=what,
        )


def _with_references(
    adapter: Adapter, given: str | Path | None, masked: dict[str, _MaskedTensor], force: bool
) -> dict[str, _MaskedTensor]:
    """The masked tensors with the files of the model before fine-tuning, checked as the base model is."""
    name = given or adapter.config.reference_model_name_or_path
    reference = _find_folder("reference model", "reference_model_name_or_path", name)
    shards = _read_shards(reference)
    _check_weights("reference model", adapter.config.reference_fingerprint, adapter, reference, shards, masked, force)
    files = {key: reference / shard for shard, keys in shards.items() for key in keys}
    for key in masked:
        if key not in files:
            raise MaskftError(
                f"The reference model {reference} has no `{key}`, so it is another model; give the one before "
                "fine-tuning with --reference_model_name_or_path."
            )
    return {key: replace(tensor, reference_file=files[key]) for key, tensor in masked.items()}


def _write_shard(source: Path, target: Path, masked: dict[str, _MaskedTensor]) -> None:
    if not masked:
        shutil.copyfile(source, target)
        return
    with _open(source) as tensors:
        content = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 -- not a mapping
        metadata = tensors.metadata()
    for key, mask in masked.items():
        content[key] = mask.apply(key, content[key]).contiguous()
    save_file(content, target, metadata=metadata or {"format": "pt"})


def _other_files(base: Path) -> list[Path]:
    """Files to copy, relative to the folder: all but weights, pickles, hidden files and what training left."""
    files = []
    for path in sorted(base.rglob("*")):
        file = path.relative_to(base)
        is_training = any(part.startswith(("checkpoint-", "events.out.")) for part in file.parts)
        is_hidden = any(part.startswith(".") for part in file.parts)
        is_other_index = file.name.endswith(".index.json") and file.name != _INDEX
        if (
            path.is_file()
            and not (is_training or is_hidden or is_other_index)
            and file.suffix not in _LEFT_OUT_SUFFIXES
            and file.name not in _LEFT_OUT_NAMES
        ):
            files.append(file)
    if (base / _SINGLE).is_file():
        files = [file for file in files if file.name != _INDEX]
    return files


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise MaskftError(f"{file} of the base model is damaged or cut short ({error}); download it again.") from error


def _model_card(adapter: Adapter, summary: MergeSummary) -> str:
    config = adapter.config
    return f"""---
library_name: transformers
tags:
- maskft
- mask-fine-tuning
---

# {summary.output_dir.name}

`{summary.base_model.name}` with a learned binary mask folded in
([Mask Fine-Tuning](https://arxiv.org/abs/2503.22764)): a plain Transformers checkpoint.

| | |
|---|---|
| base model | `{config.base_model_name_or_path or summary.base_model}` |
| adapter | `{adapter.path.name}` |
| fingerprint of the weights the mask was learned on | `{config.base_fingerprint}` |
| density | {config.density} (`selection={config.selection}`) |
| masked tensors | {summary.num_masks} |
| kept share of their weights | {summary.kept_share:.4%} ({summary.num_kept:,} of {summary.num_weights:,}) |
"""
