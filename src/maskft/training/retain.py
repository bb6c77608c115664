"""Rows on which a model is to be again as it was before its fine-tuning, and what that model says there.

The loss on them is the divergence KL(before || now) of each trained token, as in the distillation of Hinton et al.
(arXiv 1503.02531). The model before fine-tuning is asked once for each row.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from maskft.adapters.model_files import weights_hash
from maskft.data.forms import Row
from maskft.data.rows import Reader, answered, load_rows, to_dataset, tokenise_rows
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError
from maskft.evaluation.generation import generate_answers
from maskft.scoring.nll import scored_logits
from maskft.storage.json_text import json_hash, json_objects
from maskft.training.ranks import on_first_rank

logger = logging.getLogger(__name__)

NUM_LIKELIEST = 64
"""Tokens whose probability is kept for each place; the others are kept as one sum."""
_LEAST = -100.0  # log-probability that stands for none, for KL takes no infinity


@dataclass(frozen=True)
class Taught:
    """A tokenised row and what the model before fine-tuning says at its trained tokens.

    Attributes:
        row: `input_ids` and `labels` (-100: not trained).
        likeliest: token ids, int32, (tokens, k).
        log_probs: float32, (tokens, k + 1): theirs, and that of all other tokens together; (tokens, k) where k is the
            whole vocabulary.
    """

    row: dict[str, Any]
    likeliest: Tensor
    log_probs: Tensor


@torch.no_grad()
def teach(before: nn.Module, rows: Dataset, *, batch_size: int, num_likeliest: int = NUM_LIKELIEST) -> list[Taught]:
    """What the model `before` fine-tuning says on tokenised rows, each of which has a trained token.

    Args:
        batch_size: rows that share a forward.
        num_likeliest: k; a vocabulary of up to 16 times as many tokens is kept whole.
    """
    before.eval()
    taught = []
    for start in range(0, len(rows), batch_size):
        batch = [dict(row) for row in rows.select(range(start, min(start + batch_size, len(rows))))]
        logits, _, at = scored_logits(before, batch)
        k = logits.shape[-1] if logits.shape[-1] <= 16 * num_likeliest else num_likeliest
        likeliest = logits.topk(k).indices
        log_probs = coarse_log_probs(logits, likeliest)
        sizes = at.sum(1).tolist()
        parts = zip(likeliest.int().cpu().split(sizes), log_probs.cpu().split(sizes), strict=True)
        taught += [Taught(row, *part) for row, part in zip(batch, parts, strict=True)]
    return taught


def coarse_log_probs(logits: Tensor, likeliest: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together where there are others.

    Args:
        logits: (tokens, vocabulary).
        likeliest: int64, (tokens, k).

    Returns:
        (tokens, k + 1); (tokens, k) where k is the vocabulary.
    """
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, likeliest)
    if likeliest.shape[-1] < logits.shape[-1]:
        # Summed over the others themselves: 1 minus the sum of the likeliest is rounding where they are nearly all.
        others = log_probs.scatter(-1, likeliest, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, others], -1)
    return chosen.clamp(min=_LEAST)


def retained_loss(model: nn.Module, batch: Sequence[Taught]) -> Tensor:
    """KL(before || model) in nats, the mean over the trained tokens of a batch; at most that of whole distributions."""
    logits, _, _ = scored_logits(model, [taught.row for taught in batch])
    likeliest = torch.cat([taught.likeliest for taught in batch]).to(logits.device, torch.int64)
    before = torch.cat([taught.log_probs for taught in batch]).to(logits.device)
    divergence = F.kl_div(coarse_log_probs(logits, likeliest), before, reduction="sum", log_target=True)
    return divergence / len(logits)


def batches_of(taught: Sequence[Taught], size: int, seed: int) -> Callable[[int], list[Taught]]:
    """The n-th batch, by n: rows go round in one drawn order, so that a resumed run takes those it would have taken."""
    order = torch.randperm(len(taught), generator=torch.Generator().manual_seed(seed)).tolist()
    return lambda n: [taught[order[i % len(order)]] for i in range(n * size, (n + 1) * size)]


_NO_ANSWER = "\ue000"  # of a row that has none; no text holds this character by chance


def read_general_rows(dataset_name: str) -> Dataset:
    """Rows in the forms of training rows, of which some or all may lack an answer; see :func:`answer_rows`."""
    return load_rows(dataset_name, reader=Reader(filled=partial(with_answer, answer=_NO_ANSWER)))


def with_answer(row: Any, answer: str) -> Any:
    """A user's row with that answer where it has none, and as it is where it has one or none of the forms."""
    held = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    if "prompt" in held and "completion" not in held:
        turn = [{"role": "assistant", "content": answer}]
        return held | {"completion": answer if isinstance(held["prompt"], str) else turn}
    if "instruction" in held and "output" not in held:
        return held | {"output": answer}
    turns = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}
    for key, (role, content, assistant) in turns.items():
        said = held.get(key)
        last = said[-1] if isinstance(said, list) and said and isinstance(said[-1], dict) else {}
        if last.get(role) not in (None, "assistant", "gpt", "function_call"):
            return held | {key: [*held[key], {role: assistant, content: answer}]}
    return row


def answer_rows(
    splits: dict[str, Dataset],
    before: PreTrainedModel,
    tokenise: RowTokeniser,
    path: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Dataset]:
    """Rows of :func:`read_general_rows` with their tokens; what lacks an answer gets that of the model `before`.

    Answers are greedy. They are kept in `path`, one a line, so that a run which goes on there asks for those alone that
    are missing.

    Args:
        max_new_tokens: tokens of an answer.
        batch_size: prompts answered at once.
    """
    asked = [_asked(row) for rows in splits.values() for row in rows if _lacks_answer(row)]
    about = {"model": weights_hash(before.name_or_path), "max_new_tokens": max_new_tokens}
    prompts = {json_hash(about | {"prompt": prompt}): prompt for prompt in asked}

    def write() -> dict[str, str]:
        known = _read_answers(path)
        missing = [key for key in prompts if key not in known]
        if missing:
            logger.info("The model before fine-tuning answers %d general prompts.", len(missing))
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            texts = generate_answers(
                before, tokenise.tokenizer, [prompts[key] for key in keys], max_new_tokens=max_new_tokens
            )
            with path.open("a", encoding="utf-8") as file:
                for key, text in zip(keys, texts, strict=True):
                    known[key] = text
                    line = {"key": key, "prompt": prompts[key], "answer": text}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return {key: known[key] for key in prompts}

    answers = on_first_rank(write) if prompts else {}
    return {
        name: _tokenised(name, [_completed(row, about, answers) for row in rows], tokenise)
        for name, rows in splits.items()
    }


def _read_answers(path: Path) -> dict[str, str]:
    """The answers of a file, by their keys; a line that a kill has cut is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.read_bytes() if path.exists() else b""
    whole = held[: held.rfind(b"\n") + 1]
    if whole != held:
        path.write_bytes(whole)
    rows = json_objects(path) if whole else []
    if not all(isinstance(row.get(name), str) for row in rows for name in ("key", "answer")):
        raise MaskftError(f"{path} holds lines that are no answers; remove it, and all are asked for again.")
    return {row["key"]: row["answer"] for row in rows}


def _completed(row: Row, about: Row, answers: dict[str, str]) -> Row:
    if not _lacks_answer(row):
        return row
    answer = answers[json_hash(about | {"prompt": _asked(row)})]
    if isinstance(row["completion"], str):
        return row | {"completion": answer}
    return row | {"completion": [*row["completion"][:-1], {"role": "assistant", "content": answer}]}


def _tokenised(name: str, rows: list[Row], tokenise: RowTokeniser) -> Dataset:
    tokenised = answered(tokenise_rows(to_dataset(rows), tokenise))
    if len(tokenised) < len(rows):
        lost = len(rows) - len(tokenised)
        logger.warning("%d of the %d %s rows have no token to score, and are left out.", lost, len(rows), name)
    return tokenised


def _lacks_answer(row: Row) -> bool:
    said = row["completion"]
    return bool((said if isinstance(said, str) else said[-1].get("content")) == _NO_ANSWER)


def _asked(row: Row) -> Any:
    """What stands before a row's last answer: a text, or messages."""
    return row["prompt"] if isinstance(row["completion"], str) else row["prompt"] + row["completion"][:-1]
