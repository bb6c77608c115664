"""Folding a mask into a plain Hugging Face checkpoint, on disk.

Each byte is read once and written once, in chunks: masked weights are hashed for the fingerprint on their way from file
to file, and whatever has no mask is copied as it is, so that headers and all other tensors stay byte for byte what they
were. Threads work on different tensors, for reading, hashing and writing all leave Python's lock.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from maskft.adapters.read import Adapter, LinearLayout, ModelLayout, read_adapter, read_layout
from maskft.adapters.weight_files import INDEX, SINGLE, StoredTensor, damaged, read_header, weight_files
from maskft.errors import MaskftError
from maskft.masks import apply_packed, check_packed, num_kept_bits, pack_mask, unpack_mask
from maskft.storage.files import (
    PICKLE_SUFFIXES,
    atomic_folder,
    atomic_write_text,
    disk_errors,
    require_empty_output,
    require_free_space,
    sync,
)
from maskft.storage.fingerprint import TensorDigest, check_fingerprint, combine_digests, fingerprint_dtype

logger = logging.getLogger(__name__)

# Other copies of the weights would be unmasked ones, and pickles can run code.
_LEFT_OUT_SUFFIXES = {*PICKLE_SUFFIXES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
_CHUNK_BYTES = 1 << 20
_MAX_THREADS = 8
# A card and reports tell of the run that made the base model.
_LEFT_OUT_NAMES = {"README.md", "report.json", "report.html", "trainer_state.json", "adapter_config.json"}


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
    stored: StoredTensor
    reference: StoredTensor | None = None

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    def packed_as_stored(self) -> Tensor:
        if not self.layout.is_transposed:
            return self.packed
        return pack_mask(unpack_mask(self.packed, self.layout.in_features).T.contiguous())


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
    layout, shards = _read_weights(base)
    masked = _match(adapter, base, layout, shards)
    if adapter.config.reference == "pretrained":
        masked = _with_references(adapter, reference_model_name_or_path, masked)
    fingerprints = _Fingerprints(adapter, force)
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
    with disk_errors(f"write {output_dir}"), atomic_folder(output_dir) as folder, _Threads() as threads:
        # Those with masks first, so that a wrong base model is refused before the others are copied.
        for shard in sorted(shards, key=lambda shard: masked.keys().isdisjoint(shards[shard])):
            here = [masked[key] for key in shards[shard] if key in masked]
            if not here:
                fingerprints.check()
            _write_shard(base / shard, folder / shard, here, fingerprints, threads)
            done += sizes[shard]
            if progress is not None:
                progress(done, sum(sizes.values()))
        fingerprints.check()
        for file in others:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, folder / file)
        reference = reference_model_name_or_path or adapter.config.reference_model_name_or_path
        atomic_write_text(folder / "README.md", _model_card(adapter, summary, reference))
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


def _read_weights(folder: Path) -> tuple[ModelLayout, dict[str, dict[str, StoredTensor]]]:
    """The linear layers of a model, and the tensors in each of its weight files, by file name and name."""
    files = weight_files(folder)
    if files[0].suffix == ".bin":
        raise MaskftError(
            f"The model {folder} has its weights in {files[0].name}, a pickle, which can run code when it is read: it "
            "is refused; convert the model to safetensors first."
        )
    layout = read_layout(folder)
    if layout.is_quantized:
        raise MaskftError(f"The model {folder} is quantized; give the folder of the unquantized model.")
    return layout, {file.name: read_header(file) for file in files}


def _match(
    adapter: Adapter, base: Path, layout: ModelLayout, shards: dict[str, dict[str, StoredTensor]]
) -> dict[str, _MaskedTensor]:
    """The masks by the name of their tensor in the files; every mask finds exactly one."""
    keys = {key: stored for tensors in shards.values() for key, stored in tensors.items()}
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
        masked[key] = _MaskedTensor(module, packed, linear, _checked(key, keys[key], linear))
    return masked


def _checked(key: str, stored: StoredTensor, linear: LinearLayout) -> StoredTensor:
    """The tensor, refused where its shape or kind is not that of the linear layer."""
    shape = (linear.out_features, linear.in_features)
    if stored.shape != (shape[::-1] if linear.is_transposed else shape):
        raise MaskftError(
            f"{stored.file} holds `{key}` with the shape {stored.shape}, which is not what config.json says; "
            "download the model again."
        )
    if not stored.dtype.is_floating_point:
        raise MaskftError(
            f"{stored.file} holds `{key}` in a dtype of quantized models; give the folder of the unquantized model."
        )
    return stored


def _with_references(
    adapter: Adapter, given: str | Path | None, masked: dict[str, _MaskedTensor]
) -> dict[str, _MaskedTensor]:
    """The masked tensors with those of the model before fine-tuning."""
    name = given or adapter.config.reference_model_name_or_path
    reference = _find_folder("reference model", "reference_model_name_or_path", name)
    found = {key: stored for tensors in _read_weights(reference)[1].values() for key, stored in tensors.items()}
    for key in masked:
        if key not in found:
            raise MaskftError(
                f"The reference model {reference} has no `{key}`, so it is another model; give the one before "
                "fine-tuning with --reference_model_name_or_path."
            )
    return {key: replace(m, reference=_checked(key, found[key], m.layout)) for key, m in masked.items()}


class _Fingerprints:
    """What the adapter says of the masked weights, and of their references, against what is read."""

    def __init__(self, adapter: Adapter, force: bool) -> None:
        config = adapter.config
        self._expected = {"base model": config.base_fingerprint}
        if config.reference == "pretrained":
            self._expected["reference model"] = config.reference_fingerprint
        for what, value in self._expected.items():
            if value is None:
                logger.warning("The adapter %s has no fingerprint of its %s; it is not checked.", adapter.path, what)
        self._dtypes = {
            what: fingerprint_dtype(value) for what, value in self._expected.items() if value is not None and not force
        }
        self._digests: dict[str, dict[str, TensorDigest]] = {what: {} for what in self._dtypes}

    def start(self, what: str, tensor: _MaskedTensor) -> TensorDigest | None:
        """The digest that takes in a tensor's values, or None where nothing is checked."""
        if what not in self._dtypes:
            return None
        digest = TensorDigest(tensor.name, tensor.stored.shape, self._dtypes[what])
        self._digests[what][tensor.name] = digest
        return digest

    def check(self) -> None:
        """Refuse what was read where it is not what the mask was learned on; called when all of it was."""
        for what, dtype in self._dtypes.items():
            check_fingerprint(
                str(self._expected[what]),
                combine_digests({name: digest.digest() for name, digest in self._digests[what].items()}, dtype),
                how_to_ignore="pass force=True (on the command line: --force)",
                what=what,
            )


class _Threads:
    """Threads for the pieces of a shard, and one that flushes shards to the disk while the next is written."""

    def __enter__(self) -> "_Threads":
        self._workers = ThreadPoolExecutor(min(max(torch.get_num_threads(), 2), _MAX_THREADS))
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: list[Future[None]] = []
        return self

    def run(self, pieces: list[Callable[[], None]]) -> None:
        """Do all of them; the first error is raised once none is at work any more."""
        futures = [self._workers.submit(piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def flush(self, file: Path) -> None:
        self._flushed.append(self._flusher.submit(sync, file))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._workers.shutdown()
        self._flusher.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._flushed:
                future.result()


def _write_shard(
    source: Path, target: Path, masked: list[_MaskedTensor], fingerprints: _Fingerprints, threads: _Threads
) -> None:
    if not masked:
        shutil.copyfile(source, target)
    else:
        size = source.stat().st_size
        with target.open("xb") as file:
            file.truncate(size)
        pieces: list[Callable[[], None]] = []
        place = 0
        for tensor in sorted(masked, key=lambda tensor: tensor.stored.start):
            pieces.append(partial(_copy_range, source, target, place, tensor.stored.start))
            digest = fingerprints.start("base model", tensor)
            reference = fingerprints.start("reference model", tensor)
            pieces.append(partial(_write_masked, tensor, target, digest, reference))
            place = tensor.stored.start + math.prod(tensor.stored.shape) * tensor.stored.dtype.itemsize
        pieces.append(partial(_copy_range, source, target, place, size))
        threads.run(pieces)
    threads.flush(target)


def _copy_range(source: Path, target: Path, start: int, end: int) -> None:
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, end - start)))
    with source.open("rb") as read, target.open("r+b") as write:
        read.seek(start)
        write.seek(start)
        while start < end:
            chunk = buffer[: end - start]
            _fill(chunk, read, source)
            write.write(chunk)
            start += len(chunk)


def _write_masked(
    tensor: _MaskedTensor, target: Path, digest: TensorDigest | None, reference_digest: TensorDigest | None
) -> None:
    stored, packed = tensor.stored, tensor.packed_as_stored()
    num_rows = max(_CHUNK_BYTES // (stored.shape[1] * stored.dtype.itemsize), 1)
    references = iter(()) if tensor.reference is None else _read_rows(tensor.reference, num_rows)
    start = 0
    with target.open("r+b") as file:
        file.seek(stored.start)
        for rows in _read_rows(stored, num_rows):
            if digest is not None:
                digest.update(rows)
            others = next(references, None)
            if others is not None:
                if reference_digest is not None:
                    reference_digest.update(others)
                others = others.to(rows.dtype)
            merged = apply_packed(rows, packed[start : start + len(rows)], others)
            file.write(merged.view(torch.uint8).numpy().data)
            start += len(rows)


def _read_rows(stored: StoredTensor, num_rows: int) -> Iterator[Tensor]:
    """The rows of a tensor, some at a time; the next overwrite the last."""
    row_bytes = stored.shape[1] * stored.dtype.itemsize
    buffer = bytearray(min(num_rows, stored.shape[0]) * row_bytes)
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        for start in range(0, stored.shape[0], num_rows):
            num = min(num_rows, stored.shape[0] - start)
            _fill(memoryview(buffer)[: num * row_bytes], file, stored.file)
            rows = torch.frombuffer(buffer, dtype=stored.dtype, count=num * stored.shape[1])
            yield rows.view(num, stored.shape[1])


def _fill(buffer: memoryview, file: BinaryIO, path: Path) -> None:
    if file.readinto(buffer) < len(buffer):  # type: ignore[attr-defined] # BinaryIO lacks it
        raise damaged(path, "it ended while it was read")


def _other_files(base: Path) -> list[Path]:
    """Files to copy, relative to the folder: all but weights, pickles, hidden files and what training left."""
    files = []
    for path in sorted(base.rglob("*")):
        file = path.relative_to(base)
        is_training = any(part.startswith(("checkpoint-", "events.out.")) for part in file.parts)
        is_hidden = any(part.startswith(".") for part in file.parts)
        is_other_index = file.name.endswith(".index.json") and file.name != INDEX
        if (
            path.is_file()
            and not (is_training or is_hidden or is_other_index)
            and file.suffix not in _LEFT_OUT_SUFFIXES
            and file.name not in _LEFT_OUT_NAMES
        ):
            files.append(file)
    if (base / SINGLE).is_file():
        files = [file for file in files if file.name != INDEX]
    return files


def _model_card(adapter: Adapter, summary: MergeSummary, reference: str | Path | None) -> str:
    config = adapter.config
    base = config.base_model_name_or_path or str(summary.base_model)
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["maskft", "mask-fine-tuning"],
    )
    selection = f"`{config.selection}`" + (f", density {config.density}" if config.selection != "threshold" else "")
    left_out = f"have their values in `{reference}`" if config.reference == "pretrained" else "are 0"
    return f"""---
{metadata.to_yaml()}
---

# {summary.output_dir.name}

`{summary.base_model.name}` with a learned binary mask folded in
([Mask Fine-Tuning](https://arxiv.org/abs/2503.22764)): a plain Transformers checkpoint.

| | |
|---|---|
| base model | `{base}` |
| adapter | `{adapter.path.name}` |
| fingerprint of the weights the mask was learned on | `{config.base_fingerprint}` |
| selection | {selection} |
| masked tensors | {summary.num_masks} |
| kept share of their weights | {summary.kept_share:.4%} ({summary.num_kept:,} of {summary.num_weights:,}) |
| weights left out | {left_out} |
"""
