"""Folding a mask into a plain Hugging Face checkpoint, on disk.

Each byte is read once and written once, in chunks: masked weights are hashed for the fingerprint on their way from file
to file, and whatever has no mask is copied as it is, so that headers and all other tensors stay byte for byte what they
were. Threads work on different tensors, for reading, hashing and writing all leave Python's lock.
"""

import logging
import math
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from maskft.adapters.model_files import hub_name, read_generation_config, read_tokenizer
from maskft.adapters.model_layout import read_layout
from maskft.adapters.read import Adapter, read_adapter
from maskft.adapters.weight_files import INDEX, SINGLE, StoredTensor, read_header, read_rows, weight_files
from maskft.errors import MaskftError
from maskft.masks import apply_packed, check_packed, num_kept_bits, pack_mask, unpack_mask
from maskft.storage.files import (
    PICKLE_SUFFIXES,
    atomic_folder,
    disk_errors,
    is_folder,
    require_empty_output,
    require_free_space,
    require_own,
    sync,
)
from maskft.storage.fingerprint import TensorDigest, check_fingerprint, combine_digests, fingerprint_dtype
from maskft.terminal import markdown

logger = logging.getLogger(__name__)

# Other copies of the weights would be unmasked ones, and pickles can run code.
_LEFT_OUT_SUFFIXES = {*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
# A card and reports tell of the run that made the base model.
_LEFT_OUT_NAMES = {"README.md", "report.json", "report.html", "trainer_state.json", "adapter_config.json"}
_CARD = Path(__file__).with_name("merged.md")
_FLAGS = {"base model": "model_name_or_path", "reference model": "reference_model_name_or_path"}
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8


@dataclass(frozen=True)
class _MaskedTensor:
    """One tensor of the base model's files, and the mask for it, packed in rows as they are stored."""

    module: str
    packed: Tensor
    stored: StoredTensor
    reference: StoredTensor | None = None
    digests: dict[str, TensorDigest] = field(default_factory=dict)  # of what is read, by the model it is of


def merge_checkpoint(
    adapter_path: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | Path | None = None,
    reference_model_name_or_path: str | Path | None = None,
    force: bool = False,
) -> None:
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

    Raises:
        MaskftError: an adapter or a base model that cannot be read, do not fit each other, or a disk that refuses.
    """
    adapter = read_adapter(adapter_path, model_name_or_path)
    config = adapter.config
    base = _find_folder("base model", model_name_or_path or config.base_model_name_or_path)
    require_empty_output(output_dir, what="the merged model")
    files, masked = _match(adapter, base, "base model")
    reference = reference_model_name_or_path or config.reference_model_name_or_path
    if config.reference == "pretrained":
        _, others = _match(adapter, _find_folder("reference model", reference), "reference model")
        masked = [replace(m, reference=other.stored) for m, other in zip(masked, others, strict=True)]
    copied = _other_files(base)
    require_own(copied, base)
    require_free_space(output_dir, sum(file.stat().st_size for file in [*files, *copied]), "the merged model")
    with disk_errors(f"write {output_dir}"), atomic_folder(output_dir) as folder:
        _write_weights(files, folder, masked, {} if force else _expected_fingerprints(adapter))
        for file in copied:
            target = folder / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        _take_tokenizer(adapter.path, folder)
        _model_card(adapter, Path(output_dir).name, base, masked, reference).save(folder / "README.md")


def _take_tokenizer(adapter: Path, folder: Path) -> None:
    """Put the chat template and the end token that the mask was learned with in the place of the base model's."""
    if not (adapter / "tokenizer_config.json").is_file():
        return
    own = read_tokenizer(str(adapter))
    given = read_tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
    if given is None or (own.chat_template, own.eos_token) != (given.chat_template, given.eos_token):
        own.save_pretrained(folder)
        config = read_generation_config(str(folder))
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if own.eos_token_id not in ends:
            config.eos_token_id = [own.eos_token_id, *(end for end in ends if end is not None)]
            config.save_pretrained(folder)


def _find_folder(what: str, name: str | Path | None) -> Path:
    if not name:
        raise MaskftError(f"The adapter does not name its {what}; give its folder with --{_FLAGS[what]}.")
    if not is_folder(name):
        told = f"The {what} {str(name)!r} is not a folder here"
        raise MaskftError(f"{told}; download it and give its folder with --{_FLAGS[what]}.")
    return Path(name)


def _match(adapter: Adapter, folder: Path, what: str) -> tuple[list[Path], list[_MaskedTensor]]:
    """The weight files of a model, and for every mask the one tensor in them that it is for."""
    files = weight_files(folder)
    if files[0].suffix == ".bin":
        raise MaskftError(
            f"The model {folder} has its weights in {files[0].name}, a pickle, which can run code when it is read: it "
            "is refused; convert the model to safetensors first."
        )
    layout = read_layout(folder, adapter.masks)
    if getattr(layout.model.config, "quantization_config", None) is not None:
        raise MaskftError(f"The model {folder} is quantized; give the folder of the unquantized model.")
    tensors = {key: stored for file in files for key, stored in read_header(file).items()}
    keys = layout.stored_as(tensors)
    masked: dict[str, _MaskedTensor] = {}
    for module, packed in adapter.masks.items():
        linear, key = layout.find(module), keys.get(f"{layout.name_of(module)}.weight")
        if linear is None or key is None or key in masked:
            raise MaskftError(
                f"The {what} {folder} has no weight of its own for the mask of `{module}`: the adapter was made for "
                "another model, or Transformers makes that weight of other tensors when it loads a "
                f"{type(layout.model).__name__}; give the right folder with --{_FLAGS[what]}, or merge in Python "
                "(PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder))."
            )
        shape = (linear.out_features, linear.in_features)
        check_packed(packed, shape, module)
        stored = _checked(key, tensors[key], shape[::-1] if linear.fan_in_fan_out else shape)
        if linear.fan_in_fan_out:
            packed = pack_mask(unpack_mask(packed, linear.in_features).T.contiguous())
        masked[key] = _MaskedTensor(module, packed, stored)
    return files, list(masked.values())


def _checked(key: str, stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """The tensor, refused where its shape is another, or it holds no floating-point numbers."""
    if stored.shape != shape:
        raise MaskftError(
            f"{stored.file} holds `{key}` with the shape {stored.shape}, which is not what config.json says; "
            "download the model again."
        )
    if not stored.dtype.is_floating_point:
        raise MaskftError(
            f"{stored.file} holds `{key}` in a dtype of quantized models; give the folder of the unquantized model."
        )
    return stored


def _expected_fingerprints(adapter: Adapter) -> dict[str, str]:
    """What the adapter says of the masked weights, and of their references."""
    config = adapter.config
    expected = {"base model": config.base_fingerprint}
    if config.reference == "pretrained":
        expected["reference model"] = config.reference_fingerprint
    for what, value in expected.items():
        if value is None:
            logger.warning("The adapter %s has no fingerprint of its %s; it is not checked.", adapter.path, what)
    return {what: value for what, value in expected.items() if value is not None}


def _check_fingerprints(masked: Collection[_MaskedTensor], expected: dict[str, str]) -> None:
    for what, value in expected.items():
        digests = {f"{tensor.module}.weight": tensor.digests[what].digest() for tensor in masked}
        check_fingerprint(
            value,
            combine_digests(digests, fingerprint_dtype(value)),
            how_to_ignore="pass force=True (on the command line: --force)",
            what=what,
        )


def _write_weights(files: list[Path], folder: Path, masked: list[_MaskedTensor], expected: dict[str, str]) -> None:
    for tensor in masked:
        for what, value in expected.items():
            name = f"{tensor.module}.weight"
            tensor.digests[what] = TensorDigest(name, tensor.stored.shape, fingerprint_dtype(value))
    num_threads = min(max(torch.get_num_threads(), 2), _MAX_THREADS)
    masked_files = dict.fromkeys(tensor.stored.file for tensor in masked)
    with ThreadPoolExecutor(num_threads) as workers, ThreadPoolExecutor(1) as flusher:
        flushes = []
        for file in masked_files:
            target = folder / file.name
            with target.open("xb") as new:
                new.truncate(file.stat().st_size)
            pieces = _pieces(file, [tensor for tensor in masked if tensor.stored.file == file])
            # Those that wait are cancelled where one fails.
            list(workers.map(_write, repeat(target), *zip(*pieces, strict=True)))
            flushes.append(flusher.submit(sync, target))  # while the next one is written
        _check_fingerprints(masked, expected)  # before all others are copied
        for file in files:
            if file not in masked_files:
                flushes.append(flusher.submit(sync, shutil.copyfile(file, folder / file.name)))
        for flush in flushes:
            flush.result()


def _pieces(source: Path, masked: list[_MaskedTensor]) -> Iterator[tuple[int, Iterator[Tensor]]]:
    """Where each piece of a merged file begins, and its chunks: the masked tensors, and what stands between them."""
    start = 0
    for tensor in sorted(masked, key=lambda tensor: tensor.stored.start):
        stored = tensor.stored
        yield start, _bytes(source, start, stored.start)
        yield stored.start, _masked_rows(tensor)
        start = stored.start + math.prod(stored.shape) * stored.dtype.itemsize
    yield start, _bytes(source, start, source.stat().st_size)


def _bytes(source: Path, start: int, end: int) -> Iterator[Tensor]:
    return read_rows(StoredTensor(source, start, (end - start, 1), torch.uint8), _CHUNK_BYTES)


def _write(target: Path, start: int, chunks: Iterator[Tensor]) -> None:
    with target.open("r+b") as file:
        file.seek(start)
        for chunk in chunks:
            file.write(chunk.view(torch.uint8).numpy().data)


def _masked_rows(tensor: _MaskedTensor) -> Iterator[Tensor]:
    """The tensor's rows with the mask applied, some at a time; what is read goes through the digests."""
    stored = tensor.stored
    num_rows = max(_CHUNK_BYTES // (stored.shape[1] * stored.dtype.itemsize), 1)
    references = repeat(None) if tensor.reference is None else read_rows(tensor.reference, num_rows)
    start = 0
    for rows, others in zip(read_rows(stored, num_rows), references, strict=False):
        for what, values in (("base model", rows), ("reference model", others)):
            if values is not None and what in tensor.digests:
                tensor.digests[what].update(values)
        packed = tensor.packed[start : start + len(rows)]
        yield apply_packed(rows, packed, None if others is None else others.to(rows.dtype))
        start += len(rows)


def _other_files(base: Path) -> list[Path]:
    """Files to copy: all but weights, pickles, hidden files and what training left."""
    return [
        path
        for path in sorted(base.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "checkpoint-", "events.out.")) for part in path.relative_to(base).parts)
        and path.suffix not in _LEFT_OUT_SUFFIXES
        and path.name not in _LEFT_OUT_NAMES
        # The index of what is copied tells where its tensors are; that of other files, or beside a whole one, does not.
        and (not path.name.endswith(".index.json") or (path.name == INDEX and not (base / SINGLE).is_file()))
    ]


def _model_card(
    adapter: Adapter, name: str, base: Path, masked: list[_MaskedTensor], reference: str | Path | None
) -> ModelCard:
    metadata = ModelCardData(
        base_model=hub_name(adapter.config.base_model_name_or_path),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["maskft", "mask-fine-tuning"],
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(_CARD),
        markdown=markdown,
        base_name=adapter.config.base_model_name_or_path or base,
        name=name,
        base=base,
        adapter=adapter.path.name,
        config=adapter.config,
        reference=reference,
        num_tensors=len(masked),
        num_kept=sum(num_kept_bits(tensor.packed) for tensor in masked),
        num_weights=sum(math.prod(tensor.stored.shape) for tensor in masked),
    )
