"""Greedy answers to chat prompts."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    advance: Callable[[int], object] | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt (a list of chat messages), without special tokens, in their order.

    `advance` is called with the number of prompts after each batch.
    """
    was_training = model.training
    model.eval()
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    answers = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in places],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for place, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[place] = text
        if advance is not None:
            advance(len(places))
    model.train(was_training)
    return answers
