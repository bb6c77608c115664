"""Hashes that tie an adapter to the weights it was learned on, and to its own masks.

XXH3 of 128 bits: it finds mistakes, at the speed of memory, and is no defence against whoever forges weights on
purpose, who could as well write another hash into the adapter's file.
"""

import re
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
import xxhash
from torch import Tensor

from maskft.errors import MaskftError

_ALGORITHM = "xxh3_128"
# Those that masks and weights have: PyTorch casts to no quantized or packed one, which a file could name.
_FORM = re.compile(rf"(uint8|bfloat16|float16|float32|float64):{_ALGORITHM}:[0-9a-f]{{32}}")


class TensorDigest:
    """Hash over the name, shape, dtype and bytes of a tensor, read as `dtype`; values come in pieces of any dtype."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._digest = xxhash.xxh3_128(f"{name}|{shape}|{dtype}|".encode())

    def update(self, values: Tensor) -> None:
        """Take in the next values."""
        data = values.detach().to(device="cpu", dtype=self._dtype).contiguous()
        self._digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")

    def digest(self) -> bytes:
        """The digest of what came in so far."""
        return self._digest.digest()


def tensor_digest(name: str, tensor: Tensor, dtype: torch.dtype) -> bytes:
    """The :class:`TensorDigest` of a whole tensor."""
    digest = TensorDigest(name, tuple(tensor.shape), dtype)
    digest.update(tensor)
    return digest.digest()


def combine_digests(digests: Mapping[str, bytes], dtype: torch.dtype) -> str:
    """One fingerprint of several tensors, whatever order they were read in."""
    digest = xxhash.xxh3_128()
    for name in sorted(digests):
        digest.update(digests[name])
    return f"{_dtype_name(dtype)}:{_ALGORITHM}:{digest.hexdigest()}"


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that tensors of these dtypes are read as."""
    return reduce(torch.promote_types, dtypes)


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Fingerprint of named tensors, `<dtype>:xxh3_128:<32 hex digits>`.

    Args:
        tensors: the tensors by name.
        dtype: the dtype they are read as; by default the widest among them. A bfloat16 file loaded in float32 has the
            float32 fingerprint of both, since that cast loses nothing.
    """
    dtype = dtype or widest_dtype(tensor.dtype for tensor in tensors.values())
    return combine_digests({n: tensor_digest(n, t, dtype) for n, t in tensors.items()}, dtype)


def fingerprint_dtype(value: str) -> torch.dtype:
    """The dtype that a fingerprint was taken in.

    Raises:
        MaskftError: a text that is no fingerprint.
    """
    form = _FORM.fullmatch(value)
    if form is None:
        raise MaskftError(
            f"A fingerprint must look like 'float32:{_ALGORITHM}:<32 hex digits>', got {value!r}; the adapter is "
            "damaged, or of a version of maskft that hashed otherwise: save or download it again."
        )
    dtype: torch.dtype = getattr(torch, form[1])
    return dtype


def check_fingerprint(
    expected: str, actual: str, *, how_to_ignore: str, what: str = "base model", loaded_as: torch.dtype | None = None
) -> None:
    """Refuse a base (or reference) model other than the one an adapter was learned on.

    Args:
        loaded_as: the dtype of the weights that `actual` was taken of; a narrower one than they had rounded them.

    Raises:
        MaskftError: the fingerprints differ; the message holds both.
    """
    if expected == actual:
        return
    dtype = fingerprint_dtype(expected)
    remedy = f"give the right {what}"
    if loaded_as is not None and torch.promote_types(loaded_as, dtype) != loaded_as:
        wide, narrow = _dtype_name(dtype), _dtype_name(loaded_as)
        remedy = f"load it in {wide} (in {narrow} its weights are rounded), {remedy}"
    raise MaskftError(
        f"The {what} is not the one this mask was learned on: its masked weights have the fingerprint {actual}, the "
        f"adapter expects {expected}; {remedy}, or {how_to_ignore} to use it all the same."
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
