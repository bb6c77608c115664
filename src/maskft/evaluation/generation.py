"""Answers to prompts, in batches that depend on the set of prompts alone, not on their order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from maskft.data.tokens import end_token_ids
from maskft.errors import MaskftError

_ROUND = 32


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: greedily where `temperature` is 0, else sampled from `seed`.

    Attributes:
        max_new_tokens: tokens after which an answer is cut.
        stop: texts that end an answer and are not part of it.
        batch_size: prompts answered at once.
    """

    max_new_tokens: int
    stop: Sequence[str] = ()
    batch_size: int = 16
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer: its text before the first stop text, the tokens generated, and whether the prompt had to be cut."""

    text: str
    num_tokens: int
    is_prompt_cut: bool = False


class _StopAtText(StoppingCriteria):
    """Ends each row once a stop text stands in what was generated for it; the prompt is never looked at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        self.lookback = _lookback(stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        start = max(self.prompt_length, input_ids.shape[1] - self.lookback)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        done = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


def generate_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    ids: Sequence[str] | None = None,
    add_special_tokens: bool = False,
    done: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answers batch by batch, as (place of the prompt, answer).

    Prompts are sorted by length, ties by `ids`, so that little is padded, and the same prompts share a batch in
    whatever order they come. A batch for which `done` says so is left out, and no other changes.

    Args:
        model: a causal language model in evaluation mode.
        prompts: text as the model shall see it, chat template applied.
        ids: what breaks ties, one for each prompt; default: the prompts' own text.
        add_special_tokens: whether the tokenizer adds its own, a beginning-of-sequence token, say.
        done: is told the places of a batch; true where it need not be answered.

    Raises:
        MaskftError: `max_new_tokens` leaves no room for a prompt in the model's context.
    """
    room = max_prompt_length(model, decoding.max_new_tokens)
    encoded = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"] if prompts else []
    names = list(prompts if ids is None else ids)
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), names[i]))
    for start in range(0, len(order), decoding.batch_size):
        places = order[start : start + decoding.batch_size]
        if done is not None and done(places):
            continue
        answers = _answer(model, tokenizer, [encoded[i] for i in places], decoding, room, [names[i] for i in places])
        yield list(zip(places, answers, strict=True))


def max_prompt_length(model: Any, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have so that its answer still fits into the model's context; None for no limit.

    Raises:
        MaskftError: the answer alone fills the context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return None
    if max_new_tokens >= context:
        raise MaskftError(
            f"`max_new_tokens` is {max_new_tokens}, but the model's context has {context} tokens for prompt and "
            "answer together; lower it."
        )
    return int(context) - max_new_tokens


@torch.no_grad()
def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    decoding: Decoding,
    room: int | None,
    names: list[str],
) -> list[Answer]:
    # As lm-eval does, a prompt that is too long loses its beginning.
    kept = [prompt if room is None else prompt[-room:] for prompt in prompts]
    if decoding.temperature > 0:
        torch.manual_seed(int(sha256(repr((decoding.seed, names)).encode()).hexdigest()[:15], 16))
    ends = _end_ids(model, tokenizer)
    with _plain_generation(model):
        generated = _generate(model, tokenizer, kept, decoding, ends)
    answers = []
    for row, prompt in zip(generated, prompts, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        for stop in decoding.stop:
            text = text.split(stop)[0]
        answers.append(Answer(text, len(row), room is not None and len(prompt) > room))
    return answers


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without what the model's generation_config.json adds to a protocol: penalties, beams, cut distributions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configured = base.generation_config
    base.generation_config = GenerationConfig(bos_token_id=configured.bos_token_id)
    try:
        yield
    finally:
        base.generation_config = configured


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], decoding: Decoding, ends: set[int]
) -> list[list[int]]:
    """The tokens generated for each prompt, the end token included.

    Transformers computes every row of a batch until the longest answer ends. Here it goes on in rounds, and rows that
    have ended leave the batch and its cache after each.
    """
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = ids.shape[1]
    criteria = StoppingCriteriaList([_StopAtText(tokenizer, decoding.stop, length)] if decoding.stop else [])
    sampled = decoding.temperature > 0
    generated: list[list[int]] = [[] for _ in prompts]
    places, cache = list(range(len(prompts))), None
    while places:
        num_left = length + decoding.max_new_tokens - ids.shape[1]
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=min(_ROUND, num_left),
            do_sample=sampled,
            temperature=decoding.temperature if sampled else None,
            top_p=None,
            top_k=0 if sampled else None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            stopping_criteria=criteria,
            return_dict_in_generate=True,
            use_cache=True,  # training with activation checkpointing turns it off
        )
        new = output.sequences[:, ids.shape[1] :].tolist()
        going = []
        for row, place in enumerate(places):
            end = next((i + 1 for i, token in enumerate(new[row]) if token in ends), None)
            generated[place] += new[row][:end]
            text = tokenizer.decode(generated[place][-len(new[row]) - _lookback(decoding.stop) :])
            if end is None and not any(stop in text for stop in decoding.stop):
                going.append(row)
            elif end is None:  # padded from the stop text on
                while generated[place] and generated[place][-1] == tokenizer.pad_token_id:
                    generated[place].pop()
        if not going or output.sequences.shape[1] >= length + decoding.max_new_tokens:
            break
        kept = torch.tensor(going, device=ids.device)
        ids, cache = output.sequences[kept], output.past_key_values
        mask = torch.cat([mask[kept], mask.new_ones(len(going), len(new[0]))], 1)
        if len(going) < len(places):
            cache.batch_select_indices(kept)
        places = [places[row] for row in going]
    return generated


def _lookback(stop: Sequence[str]) -> int:
    """Tokens at the end of an answer that may hold a stop text just completed."""
    # A token holds a byte at least; and one more may have begun before the stop text.
    return 1 + max((len(text.encode()) for text in stop), default=0)


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: those that training takes for end tokens, so that what was learned counts."""
    if tokenizer.eos_token_id is not None:
        return end_token_ids(tokenizer, model.generation_config)
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in configured if token is not None}


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt (all texts, or all lists of chat messages), in their order.

    Special tokens are left out of the answers; texts are prompts as they are, with the tokenizer's own special tokens.
    `advance` is called with the number of prompts after each batch.
    """
    was_training = model.training
    model.eval()
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    are_texts = all(isinstance(prompt, str) for prompt in prompts)
    answers = [""] * len(texts)
    decoding = Decoding(max_new_tokens=max_new_tokens, batch_size=batch_size)
    for batch in generate_batches(model, tokenizer, texts, decoding, add_special_tokens=are_texts):
        for place, answer in batch:
            answers[place] = answer.text
        if advance is not None:
            advance(len(batch))
    model.train(was_training)
    return answers
