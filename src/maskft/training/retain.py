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
from typing import Annotated, Any

import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskft.adapters.model_files import load_model, weights_hash
from maskft.data.forms import Row
from maskft.data.rows import Reader, answered, load_rows, to_dataset, tokenise_rows
from maskft.data.splits import problems_of, split_validation
from maskft.data.tokens import RowTokeniser
from maskft.errors import MaskftError, require_flags
from maskft.evaluation.generation import generate_answers
from maskft.scoring.nll import scored_logits
from maskft.scoring.verdict import RestoreVerdict, restore_verdict, split_guard_rows, without_and_with
from maskft.storage.json_text import json_hash, json_objects
from maskft.training.arguments import TrainingSettings, flag, other_flags
from maskft.training.ranks import on_first_rank
from maskft.training.resume import ANSWERS
from maskft.training.trainer import MaskTrainer
from maskft.values import check_value

logger = logging.getLogger(__name__)

MORE = "--retain_dataset_name or --retain_split_percentage"
"""What gives more held-out general rows."""
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


@dataclass
class RetainArguments:
    """The general rows, and what the task may pay for them."""

    _argument_group_name = "General rows"

    retain_dataset_name: str | None = flag(
        None,
        "General rows, on which the model shall be as before fine-tuning, in the forms of --dataset_name. Rows without "
        "an answer are answered by the model before fine-tuning.",
    )
    retain_split_percentage: int = flag(25, "Share of the general rows held out for validation, in percent.")
    retain_max_new_tokens: int = flag(256, "Tokens of an answer that the model before fine-tuning writes, at most.")
    retain_weight: float = flag(1.0, "Weight of the general rows' divergence beside the task's cross-entropy.")
    max_task_loss: float = flag(0.01, "What the task may lose, in nats per token.")

    def __post_init__(self) -> None:
        if other_flags(self):
            require_flags(self, "retain_dataset_name")
        number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
        for name, hint in {
            "retain_split_percentage": Annotated[int, Field(ge=1, le=90)],
            "retain_max_new_tokens": Annotated[int, Field(ge=1)],
            "retain_weight": number,
            "max_task_loss": number,
        }.items():
            setattr(self, name, check_value(name, getattr(self, name), hint))


class Retaining:
    """General rows of a run, which keep its model near the one before fine-tuning.

    Attributes:
        given: what the user asks for.
        reference: name of the model before fine-tuning.
        splits: general rows by `retained`, `retained validation` and, for a verdict, `retained guard`.
        batch: the n-th batch of them, by n.
    """

    def __init__(self, given: RetainArguments, reference: str) -> None:
        self.given, self.reference, self.trainer = given, reference, RetainTrainer
        self.splits: dict[str, Dataset] = {}
        self.taught: list[Taught] = []
        self.batch: Callable[[int], list[Taught]]

    def read(self, settings: TrainingSettings, *, require_gain: bool) -> dict[str, Dataset]:
        """Read and split the general rows; what an earlier run with the same models has read and asked serves again."""
        if self.splits:
            return self.splits
        if settings.deepspeed_plugin is not None:
            raise MaskftError("General rows are for runs alone, under DDP and FSDP2, not DeepSpeed; configure another.")
        if settings.temperature_scaling:
            raise MaskftError("`temperature_scaling` would move the model from what general rows hold; leave it out.")
        rows = read_general_rows(str(self.given.retain_dataset_name))
        share, seed = self.given.retain_split_percentage, settings.seed
        train, held_out = split_validation(rows, validation_split_percentage=share, seed=seed)
        self.splits = {"retained": train, "retained validation": held_out}
        if require_gain:
            choosing, judging = split_guard_rows(held_out, seed, kind="held-out general", more=MORE)
            self.splits |= {"retained validation": choosing, "retained guard": judging}
        return self.splits

    def ask(self, dtype: str, tokenizer: PreTrainedTokenizerBase, settings: Any) -> PreTrainedModel:
        """Have the model before fine-tuning answer the rows, and note what it says there; returns it."""
        self.batch_size = settings.per_device_eval_batch_size
        before = load_model(self.reference, dtype, settings.model_init_kwargs).to(settings.device)
        limits = {"max_new_tokens": self.given.retain_max_new_tokens, "batch_size": self.batch_size}
        with computing(settings):
            path, tokenise = Path(str(settings.output_dir)) / ANSWERS, RowTokeniser.of(tokenizer, settings)
            self.splits = answer_rows(self.splits, before, tokenise, path, **limits)
            self.taught = teach(before, self.splits["retained"], batch_size=self.batch_size)
        self.deal(settings)
        return before

    def deal(self, settings: Any, nth: int = 0) -> None:
        """Put the rows into an order of their own for the n-th run over them."""
        # Half a batch: 8 beside 16 rows of sums took the general NLL from 2.00 to 1.59 in the first measurement.
        self.batch = batches_of(self.taught, max(1, settings.per_device_train_batch_size // 2), settings.seed + nth)

    def prepare(
        self, tuned: PreTrainedModel, task_rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Any
    ) -> None:
        """What comes before a run over a fine-tuned model; nothing, once the rows are asked."""

    def judge(self, model: PeftModel, task_rows: Dataset, settings: Any) -> RestoreVerdict:
        """The verdict on rows of both kinds that chose nothing."""
        kinds = (task_rows, self.splits.get("retained guard", self.splits["retained validation"]))
        with computing(settings):
            task, retained = (without_and_with(model, rows, batch_size=self.batch_size) for rows in kinds)
        problems = (problems_of(kinds[0]), problems_of(kinds[1]))
        return restore_verdict(task, retained, problems, self.given.max_task_loss)

    def told(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """What a report says of a run beside its log."""
        return None


class RetainTrainer(MaskTrainer):
    """A trainer whose loss has the general rows beside the task's."""

    _taken = (-1, 0)  # the step, and how many of its batches have been taken

    def __init__(self, *args: Any, restoring: Retaining, **kwargs: Any) -> None:
        self.restoring = restoring
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return loss
        step, number = self._taken
        number = number + 1 if step == self.state.global_step else 0
        self._taken = (self.state.global_step, number)
        # Counted from the step, so that a resumed run takes the rows it would have taken.
        number += self.state.global_step * self.args.gradient_accumulation_steps
        batch = self.restoring.batch(number * self.args.world_size + self.args.process_index)
        divergence = retained_loss(model, batch)
        self._metrics["train"]["retained_kl"].append(divergence.item())
        # The task's loss is a part of the mean over all tokens of a step, this one is the mean of one batch.
        return loss + self.restoring.given.retain_weight * divergence / self.current_gradient_accumulation_steps


def computing(settings: Any) -> torch.autocast:
    """What scores are computed under; autocast's cache would hold the first of the weights that are scaled."""
    return torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16, cache_enabled=False)


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

    Answers are greedy; those that reach the limit are told of, and no row says that they end there. They are kept in
    `path`, one a line, so that a run which goes on there asks for those alone that are missing.

    Args:
        max_new_tokens: tokens of an answer.
        batch_size: prompts answered at once.
    """
    asked = [_asked(row) for rows in splits.values() for row in rows if _lacks_answer(row)]
    about = {"model": weights_hash(before.name_or_path), "max_new_tokens": max_new_tokens}
    prompts = {json_hash(about | {"prompt": prompt}): prompt for prompt in asked}

    def write() -> dict[str, Row]:
        known = _read_answers(path)
        missing = [key for key in prompts if key not in known]
        if missing:
            logger.info("The model before fine-tuning answers %d general prompts.", len(missing))
        for start in range(0, len(missing), batch_size):
            keys = missing[start : start + batch_size]
            texts, have_ended = generate_answers(
                before, tokenise.tokenizer, [prompts[key] for key in keys], max_new_tokens=max_new_tokens
            )
            with path.open("a", encoding="utf-8") as file:
                for key, text, has_ended in zip(keys, texts, have_ended, strict=True):
                    known[key] = {"key": key, "prompt": prompts[key], "answer": text, "is_unfinished": not has_ended}
                    file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
        return {key: known[key] for key in prompts}

    answers = on_first_rank(write) if prompts else {}
    if num_cut := sum(answer["is_unfinished"] for answer in answers.values()):
        told = "%d of %d general answers were cut at %d tokens, and none of these is trained or scored to end there."
        logger.info(told, num_cut, len(answers), max_new_tokens)
    return {
        name: _tokenised(name, [_completed(row, about, answers) for row in rows], tokenise)
        for name, rows in splits.items()
    }


def _read_answers(path: Path) -> dict[str, Row]:
    """The answers of a file, by their keys; a line that a kill has cut is taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.read_bytes() if path.exists() else b""
    whole = held[: held.rfind(b"\n") + 1]
    if whole != held:
        path.write_bytes(whole)
    rows = json_objects(path) if whole else []
    kinds = {"key": str, "answer": str, "is_unfinished": bool}
    if not all(isinstance(row.get(name), kind) for row in rows for name, kind in kinds.items()):
        raise MaskftError(f"{path} holds lines that are no answers; remove it, and all are asked for again.")
    return {row["key"]: row for row in rows}


def _completed(row: Row, about: Row, answers: dict[str, Row]) -> Row:
    if not _lacks_answer(row):
        return row
    said = answers[json_hash(about | {"prompt": _asked(row)})]
    answer: Any = said["answer"]
    if not isinstance(row["completion"], str):
        answer = [*row["completion"][:-1], {"role": "assistant", "content": answer}]
    return row | {"completion": answer, "is_unfinished": said["is_unfinished"]}


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
