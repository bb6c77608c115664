"""Several processes: they have to be started alike, and some things one of them does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

from maskft.errors import MaskftError

T = TypeVar("T")


def require_equal_ranks(facts: dict[str, Any]) -> None:
    """Compare what the processes of a run were started with: values that JSON can hold, by name.

    Every process has to call it, and gets the MaskftError where one has another value than the first.
    """
    if _is_alone():
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    for rank, other in enumerate(gathered[1:], start=1):
        for name in gathered[0] | other:
            here, there = gathered[0].get(name), other.get(name)
            if here != there:
                raise MaskftError(
                    f"Rank {rank} was started with `{name}` = {there!r} and rank 0 with {here!r}; start all processes "
                    "with the same settings, data, checkpoints and versions."
                )


def on_first_rank(act: Callable[[], T]) -> T:
    """Do something on the first process alone; every process has to call it.

    What `act` returned, which has to pickle, or its MaskftError or OSError, comes on every process alike.
    """
    if _is_alone():
        return act()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = act()
        except (MaskftError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
