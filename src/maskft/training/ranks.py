"""Several processes: they have to be started alike, and some things one of them does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from maskft.errors import MaskftError

T = TypeVar("T")


def require_equal_ranks(facts: dict[str, Any]) -> None:
    """Compare what the processes of a run were started with: values that JSON can hold, by name.

    Every process has to call it, and gets the MaskftError where one has another value than the first.
    """
    first, *others = gather_object([facts])
    for rank, other in enumerate(others, start=1):
        for name in first | other:
            here, there = first.get(name), other.get(name)
            if here != there:
                raise MaskftError(
                    f"Rank {rank} was started with `{name}` = {there!r} and rank 0 with {here!r}; start all processes "
                    "with the same settings, data, checkpoints and versions."
                )


def on_first_rank(act: Callable[[], T]) -> T:
    """Do something on the first process alone; every process has to call it.

    What `act` returned, which has to pickle, or its MaskftError or OSError, comes on every process alike.
    """
    box: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            box[0] = act()
        except (MaskftError, OSError) as error:
            box[1] = error
    result, failure = broadcast_object_list(box)
    if failure is not None:
        raise failure
    done: T = result
    return done
