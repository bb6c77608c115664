"""Greedy answers to prompts, and what a model's own configuration may not add to any answer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from maskft.data.tokens import end_token_ids


@contextmanager
def plain_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Without what the model's generation_config.json adds: penalties, beams, cut distributions.

    Answers end at the tokens that training takes for end tokens, so that what was learned counts.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configured = base.generation_config
    ends: Any = configured.eos_token_id
    if tokenizer.eos_token_id is not None:
        ends = sorted(end_token_ids(tokenizer, configured))
    base.generation_config = GenerationConfig(bos_token_id=configured.bos_token_id, eos_token_id=ends)
    try:
        yield
    finally:
        base.generation_config = configured


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[str]:
    """The model's greedy answer to each prompt (all texts, or all lists of chat messages), in their order.

    Special tokens are left out of the answers; texts are prompts as they are, with the tokenizer's own special tokens.
    Prompts of like length share a batch; the model is left in the mode it had.
    """
    was_training = model.training
    model.eval()
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    # A chat template writes its own beginning of the sequence.
    are_texts = all(isinstance(prompt, str) for prompt in prompts)
    encoded = tokenizer(texts, add_special_tokens=are_texts)["input_ids"] if texts else []
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(texts)), key=lambda i: (len(encoded[i]), texts[i]))
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        length = len(encoded[here[-1]])
        padding = [length - len(encoded[i]) for i in here]
        ids = torch.tensor([[pad_id] * p + encoded[i] for p, i in zip(padding, here, strict=True)], device=model.device)
        mask = torch.tensor([[0] * p + [1] * (length - p) for p in padding], device=model.device)
        with plain_generation(model, tokenizer):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad_id,
                use_cache=True,  # training with activation checkpointing turns it off
            )
        for i, answer in zip(here, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
            answers[i] = answer
    model.train(was_training)
    return answers
