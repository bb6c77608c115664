"""Rows as tokens, as TRL's trainer has them, and the proof that the end token is among those that are trained."""

import logging
from collections.abc import Set
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from maskft.errors import MaskftError

logger = logging.getLogger(__name__)


def tokenise_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """`input_ids` and `labels` (-100 on the prompt) of a row of `load_rows`, as TRL's trainer prepares it.

    Held-out rows are then scored on the very tokens that are trained: the completion's, its end token included.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        whole = prompt + completion + ("" if completion.endswith(end) else end)
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
    else:
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    pairs = enumerate(zip(prompt_ids, ids, strict=False))
    num_shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt_ids), len(ids)))
    labels = [-100] * num_shared + ids[num_shared:]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def tokenise_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> Dataset:
    """All rows by :func:`tokenise_row`."""
    return Dataset.from_list([tokenise_row(row, tokenizer, max_length) for row in rows])


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> set[int]:
    """The tokens at which generation stops: the tokenizer's end token and those of the generation config.

    Raises:
        MaskftError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise MaskftError(
            "The tokenizer has no end token, so the model could not learn to stop: set eos_token (the chat template's "
            "end-of-turn token, if it has one) in tokenizer_config.json."
        )
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (tokenizer.eos_token_id, *configured) if token is not None}


def check_end_token_trained(
    processed_dataset: Dataset, end_ids: Set[int], *, max_length: int | None, num_rows: int | None = None
) -> None:
    """Make sure that the model is trained to stop, before training begins; a warning tells of rows that do not do so.

    Args:
        processed_dataset: `SFTTrainer.train_dataset`, with `labels` (-100: no loss), each row cut at `max_length`.
        num_rows: rows given to the trainer, of which TRL drops those whose prompt alone fills `max_length`; None where
            rows are packed.

    Raises:
        MaskftError: no row trains an end token, or no row is left.
    """
    num_rows = len(processed_dataset) if num_rows is None else num_rows
    ends = np.fromiter(end_ids, dtype=np.int64)
    num_trained = num_without_end = num_cut = 0
    for batch in processed_dataset.select_columns("labels").with_format("numpy").iter(batch_size=1000):
        for labels in batch["labels"]:
            has_loss = bool((labels != -100).any())
            num_trained += has_loss
            if has_loss and not np.isin(labels, ends).any():
                num_without_end += 1
                num_cut += max_length is not None and len(labels) >= max_length
    if num_trained == 0:
        raise MaskftError(
            f"None of the {num_rows} rows has a token to train on: every prompt alone is as long as "
            f"max_length={max_length}; raise max_length or shorten the prompts."
        )
    if num_without_end == num_trained:
        raise MaskftError(_never_trained(num_trained, num_cut, end_ids, max_length))
    cut = f"{num_cut} of them because they are cut at max_length={max_length}"
    prompts = f"since their prompt alone is as long as max_length={max_length}"
    for number, what in (
        (num_without_end, f"do not train the end token, {cut}"),
        (num_rows - num_trained, f"have no token to train on, {prompts}"),
    ):
        if number:
            logger.warning("%d of %d training rows (%.1f %%) %s.", number, num_rows, 100 * number / num_rows, what)


def _never_trained(num_rows: int, num_cut: int, end_ids: Set[int], max_length: int | None) -> str:
    problem = f"None of the {num_rows} rows with a loss trains an end token (ids {sorted(end_ids)})"
    if num_cut == num_rows:
        return f"{problem}: all of them are cut at max_length={max_length}; raise max_length."
    cut = f" ({num_cut} rows are also cut at max_length={max_length})" if num_cut else ""
    return (
        f"{problem}, so the model would not learn to stop{cut}: use a chat template that closes the assistant's turn "
        "with an end-of-turn token, and name that token as the tokenizer's eos_token."
    )
