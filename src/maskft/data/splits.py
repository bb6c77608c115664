"""Rows set aside: all rows of one problem lie on one side, and an overlap with the training rows is told."""

import logging
import random

from datasets import Dataset

from maskft.data.forms import problem_of
from maskft.errors import MaskftError

logger = logging.getLogger(__name__)


def split_validation(rows: Dataset, *, validation_split_percentage: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training and validation rows, each at least one, in the order of `rows`; the seed alone decides the cut.

    Rows of one problem stay together, as the turns of a conversation do, whose prompts contain the earlier answers. The
    cut comes as near below the percentage (1 to 99) as whole groups allow.

    Raises:
        MaskftError: there are fewer than two different prompts.
    """
    groups = rows_by_problem(rows)
    if len(groups) < 2:
        told = f"Rows to train on and to hold out need two prompts, and {len(rows)} here have one in all"
        raise MaskftError(f"{told}; give more rows, or a set of its own to hold out.")
    held_out = _draw(groups, max(1, round(len(rows) * validation_split_percentage / 100)), seed)
    return rows.select(sorted(set(range(len(rows))) - held_out)), rows.select(sorted(held_out))


def _draw(groups: list[list[int]], target: int, seed: int) -> set[int]:
    """Whole groups of at most `target` rows together, but one group at least, and not all of them."""
    random.Random(seed).shuffle(groups)
    drawn: set[int] = set()
    for group in groups:
        if len(drawn) + len(group) <= target:
            drawn.update(group)
    # Every group may be larger than the target; and one small group must stay for training.
    smallest = min(groups, key=len)
    drawn = drawn or set(smallest)
    return drawn if len(drawn) < sum(map(len, groups)) else drawn - set(groups[0])


def problems_of(rows: Dataset) -> list[str]:
    """What each row is about, see :func:`maskft.data.forms.problem_of`."""
    return [problem_of(row) for row in rows.select_columns(["prompt", "completion"])]


def rows_by_problem(rows: Dataset) -> list[list[int]]:
    """Indices of the rows of each problem, in the order in which the problems come."""
    groups: dict[str, list[int]] = {}
    for index, problem in enumerate(problems_of(rows)):
        groups.setdefault(problem, []).append(index)
    return list(groups.values())


def num_overlapping(rows: Dataset, other_rows: Dataset) -> int:
    """How many of `other_rows` are of a problem of `rows`; see :func:`problems_of`."""
    problems = set(problems_of(rows))
    return sum(problem in problems for problem in problems_of(other_rows))


def check_overlap(train_rows: Dataset, validation_rows: Dataset, *, is_refused: bool) -> None:
    """Warn of validation rows of a problem that is trained on, or refuse them where they are to show a gain."""
    num_shared = num_overlapping(train_rows, validation_rows)
    told = f"{num_shared} of {len(validation_rows)} validation rows have the prompt of a training row"
    if num_shared and is_refused:
        raise MaskftError(f"{told}, so they can show no gain; give other problems.")
    if num_shared:
        logger.warning("%s: what is measured on them is no measure of new rows.", told)
