"""Answers to prompts, and what a model's own configuration may not add to any answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from maskft.data.tokens import end_token_ids, render


@contextmanager
def plain_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """Without what the model's generation_config.json adds: penalties, beams, cut distributions.

    Answers end at the tokens that training takes for end tokens, so that what was learned counts; it gives these.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configured = base.generation_config
    ends: Any = configured.eos_token_id
    if tokenizer.eos_token_id is not None:
        ends = sorted(end_token_ids(tokenizer, configured))
    base.generation_config = GenerationConfig(bos_token_id=configured.bos_token_id, eos_token_id=ends)
    try:
        yield ends
    finally:
        base.generation_config = configured


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    temperature: float = 0.0,
) -> tuple[list[str], list[bool]]:
    """The model's answer to each prompt, a text as it is or a list of chat messages, without special tokens.

    Answers are greedy at temperature 0, and drawn from the whole distribution above it. Prompts of like length share a
    batch; the model is left in the mode it had.

    Returns:
        The answers, and whether the model ended each: the others were cut at `max_new_tokens`.
    """
    was_training = model.training
    model.eval()
    chat = {"add_generation_prompt": True, "return_dict": True}
    encoded = [(tokenizer(p) if isinstance(p, str) else render(tokenizer, p, **chat))["input_ids"] for p in prompts]
    pad_id: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i]))
    answers, have_ended = [""] * len(encoded), [False] * len(encoded)
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        rows = [torch.tensor(encoded[i], device=model.device) for i in here]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        with plain_generation(model, tokenizer) as ends:
            settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "do_sample": False}
            if temperature:
                settings |= {"do_sample": True, "temperature": temperature, "top_k": 0}
            # Training with activation checkpointing turns the cache off.
            output = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
        new = output[:, ids.shape[1] :]
        are_ends = torch.isin(new, torch.tensor([] if ends is None else ends, device=new.device)).any(1).tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, answer, has_ended in zip(here, texts, are_ends, strict=True):
            answers[i], have_ended[i] = answer, has_ended
    model.train(was_training)
    return answers, have_ended
