"""`--dry_run`: what would be trained, by the tokens that training would see."""

from typing import Any

import numpy as np
from datasets import Dataset
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from maskft.adapters.model_files import read_generation_config
from maskft.data.tokens import end_token_ids
from maskft.report import PageTable, narrow_table
from maskft.terminal import PlainConsole
from maskft.training.trainer import check_end_token_trained

_NUM_SHOWN = 2


def show_rows(
    splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, model: str, max_length: int | None
) -> dict[str, Any]:
    """Print how many rows and tokens each split has, and two rows with what is trained on in colour; no report.

    Raises:
        MaskftError: no row trains an end token of the model of that name.
    """
    ends = end_token_ids(tokenizer, read_generation_config(model))
    check_end_token_trained(splits["train"], ends, max_length=max_length)
    console, shown = PlainConsole(), []
    for name, rows in splits.items():
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        num_trained = sum(label != -100 for labels in rows["labels"] for label in labels)
        numbers = (len(rows), lengths.sum(), num_trained, int(np.median(lengths)), lengths.max())
        shown.append((name, *(f"{number:,}" for number in numbers)))
    header = ("rows of", "number", "tokens", "trained on", "median length", "longest")
    console.print(narrow_table(PageTable(header, shown), console.width))
    for row in splits["train"].select(range(min(_NUM_SHOWN, len(splits["train"])))):
        console.print(coloured(row, tokenizer), soft_wrap=True)
    console.print("Green and in brackets ⟦ ⟧ is what is trained on. Nothing was trained or written.")
    return {}


def coloured(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Text:
    """A row's tokens as text, those with a loss in green and between brackets."""
    text, start, labels = Text(), 0, row["labels"]
    for end in range(1, len(labels) + 1):
        if end == len(labels) or (labels[end] == -100) != (labels[start] == -100):
            part = tokenizer.decode(row["input_ids"][start:end])
            text.append(part) if labels[start] == -100 else text.append(f"⟦{part}⟧", "bold green")
            start = end
    return text
