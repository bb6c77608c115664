"""The k largest of several tensors on an accelerator, without waiting for it: no value comes back to the host.

The k-th largest is found digit by digit from the top (radix selection, 11 bits at a time): the values whose upper
digits are those of the k-th are counted by their next one. Counts, digits and ranks stay tensors on the device, every
shape is known beforehand, and several tensors are counted one after the other into one histogram, so they are never
joined. float32 takes three passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskft.masks.keys import KEY_DTYPES, ordered_key, value_of_key, wide

_DIGIT_BITS = 11
_NUM_DIGITS = 1 << _DIGIT_BITS


def kth_largest_on_device(scores: Sequence[Tensor], k: int, *, abs_: bool) -> Tensor:
    """The k-th largest score (or size of one) over all tensors, k from 1; a float32 or float64 scalar."""
    key, _ = _kth_key(scores, k, abs_)
    return value_of_key(key, wide(scores[0].new_empty(0)).dtype)


def top_on_device(scores: Sequence[Tensor], k: int, *, abs_: bool) -> list[Tensor]:
    """Masks of the k largest scores (or sizes) over all tensors, 0 < k < their number; of equal ones the earlier."""
    kth, num_wanted = _kth_key(scores, k, abs_)
    masks = []
    for tensor in scores:
        keys = _keys(tensor, abs_)
        ties = keys == kth
        mask = (keys > kth) | (ties & (ties.cumsum(0, dtype=torch.int32) <= num_wanted))
        num_wanted = num_wanted - ties.sum(dtype=torch.int64)
        masks.append(mask.view(tensor.shape))
    return masks


def _keys(tensor: Tensor, abs_: bool) -> Tensor:
    return ordered_key(tensor.abs() if abs_ else tensor)


def _kth_key(scores: Sequence[Tensor], k: int, abs_: bool) -> tuple[Tensor, Tensor]:
    """The key of the k-th largest, and how many keys equal to it are among the k largest; scalars on the device."""
    dtype = KEY_DTYPES[wide(scores[0].new_empty(0)).dtype]
    num_bits = 8 * dtype.itemsize
    device = scores[0].device
    wanted = torch.full((), k, dtype=torch.int64, device=device)
    upper = torch.zeros((), dtype=dtype, device=device)
    shift = num_bits
    while shift:
        above, shift = shift, max(shift - _DIGIT_BITS, 0)
        # The topmost digit of a signed key is ordered as an unsigned one once its sign bit is flipped.
        flip = 1 << (above - shift - 1) if above == num_bits else 0
        counts = torch.zeros(_NUM_DIGITS, dtype=torch.int64, device=device)
        for tensor in scores:
            keys = _keys(tensor, abs_)
            digits = ((keys >> shift) & ((1 << (above - shift)) - 1)) ^ flip
            if above < num_bits:
                digits = torch.where((keys >> above) == upper, digits, _NUM_DIGITS)
            counts += _histogram(digits)
        not_below = counts.flip(0).cumsum(0)
        place = (not_below < wanted).sum().unsqueeze(0)
        digit = (_NUM_DIGITS - 1 - place).squeeze(0)
        num_equal = counts.gather(0, digit.unsqueeze(0)).squeeze(0)
        wanted = wanted - (not_below.gather(0, place).squeeze(0) - num_equal)
        digit = (digit ^ flip).to(dtype)
        if above == num_bits:  # the sign comes with the topmost digit
            digit = digit << (num_bits - (above - shift)) >> (num_bits - (above - shift))
            upper = digit
        else:
            upper = (upper << (above - shift)) | digit
    return upper, wanted


def _histogram(digits: Tensor) -> Tensor:
    """Counts of 0 to _NUM_DIGITS - 1; what is above is left out."""
    if digits.device.type == "cpu":
        return torch.bincount(digits, minlength=_NUM_DIGITS + 1)[:_NUM_DIGITS]
    # There, bincount would wait for the largest value.
    return torch.histc(digits.to(torch.int32), bins=_NUM_DIGITS + 1, min=0, max=_NUM_DIGITS + 1)[:_NUM_DIGITS]
