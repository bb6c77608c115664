"""Rows as tokens: rendered, labelled and cut in one place, for training, validation, verdict and evaluation alike.

What is trained is what TRL's SFTTrainer trains on such rows (`trl.trainer.sft_trainer`, `_prepare_dataset`): all of a
plain text, the completion after a prompt, and of `messages` every assistant turn. For these TRL has training templates,
which mark what the assistant says; where it has none for a chat template, each turn becomes a row of its own.
"""

import logging
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from maskft.data.forms import Row, shown
from maskft.data.model_files import Limits
from maskft.errors import MaskftError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowTokeniser:
    """Makes token rows, `input_ids` and `labels` (-100: no loss), of a row in the one form of :mod:`maskft.data.forms`.

    Attributes:
        max_length, truncation_mode, assistant_only_loss, completion_only_loss: as in TRL's `SFTConfig`.
        limits: sizes of the model that the tokens are for.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None
    limits: Limits | None = None

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, settings: SFTConfig, limits: Limits | None = None
    ) -> "RowTokeniser":
        """That of a run with these settings."""
        names = ("max_length", "truncation_mode", "assistant_only_loss", "completion_only_loss")
        return cls(tokenizer, **{name: getattr(settings, name) for name in names}, limits=limits)

    def __call__(self, row: Row) -> list[Row]:
        """The row's tokens, in one part or one for each assistant turn, each with whether its answer `is_cut`.

        Raises:
            MaskftError: the chat template refuses the row or leaves out what is said in it, or the model is too small.
        """
        parts = self._texts(row) if isinstance(row["completion"], str) else self._turns(row)
        return [self._cut(*part) for part in parts]

    def _cut(self, ids: list[int], labels: list[int]) -> Row:
        kept = (
            slice(-self.max_length, None)
            if self.max_length and self.truncation_mode == "keep_end"
            else slice(self.max_length)
        )
        cut = labels[kept]
        if self.limits is not None:
            self.limits.check(ids[kept], self.tokenizer)
        num_lost = sum(label != -100 for label in labels) - sum(label != -100 for label in cut)
        return {"input_ids": ids[kept], "labels": cut, "is_cut": num_lost > 0 and has_answer({"labels": cut})}

    def _texts(self, row: Row) -> list[tuple[list[int], list[int]]]:
        if self.assistant_only_loss:
            raise MaskftError("`assistant_only_loss` is for messages, and the row is plain text; leave it out.")
        end = self.tokenizer.eos_token or ""
        whole = row["prompt"] + row["completion"]
        prompt = self.tokenizer(row["prompt"])["input_ids"] if row["prompt"] else []
        return [self._labelled(prompt, self.tokenizer(whole if whole.endswith(end) else whole + end)["input_ids"])]

    def _turns(self, row: Row) -> list[tuple[list[int], list[int]]]:
        messages, start = row["prompt"] + row["completion"], len(row["prompt"])
        if row.get("assistant_only_loss") or self.assistant_only_loss:
            if self._marking_template is not None:
                return [self._marked(row, messages)]
            if self.assistant_only_loss:
                raise MaskftError(
                    "`assistant_only_loss` needs a chat template with {% generation %} marks; leave it out."
                )
        turns = [i for i in range(start, len(messages)) if messages[i]["role"] == "assistant"]
        return [self._answer(row, messages[: turn + 1]) for turn in turns]

    def _answer(self, row: Row, messages: list[Row]) -> tuple[list[int], list[int]]:
        """The tokens of the messages, trained on the last alone."""
        asked = self._render(row, messages[:-1], add_generation_prompt=True)
        whole = self._render(row, messages)
        _require_said(whole[common_prefix_length(asked, whole) :], messages[-1:])
        _require_said(whole, [m for m in messages if m["role"] in ("system", "developer", "user")])
        self._require_shown(row, asked, messages[:-1], add_generation_prompt=True)
        prompt, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
        return self._labelled(prompt, ids)

    def _marked(self, row: Row, messages: list[Row]) -> tuple[list[int], list[int]]:
        """The tokens of the messages, trained on what the template marks after the prompt."""
        template = {"chat_template": self._marking_template}
        text = self._render(row, messages, **template)
        _require_said(text, [message for message in messages if message["role"] != "tool"])
        self._require_shown(row, text, messages, **template)
        tokens = self._render(
            row, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template
        )
        start = 0
        if any(message["role"] == "assistant" for message in row["prompt"]):
            asked = self._render(row, row["prompt"], tokenize=True, add_generation_prompt=True, **template)
            start = common_prefix_length(asked["input_ids"], tokens["input_ids"])
        pairs = enumerate(zip(tokens["input_ids"], tokens["assistant_masks"], strict=True))
        return tokens["input_ids"], [token if marked and i >= start else -100 for i, (token, marked) in pairs]

    def _labelled(self, prompt: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
        num_shared = 0 if self.completion_only_loss is False else common_prefix_length(prompt, ids)
        return ids, [-100] * num_shared + ids[num_shared:]

    def _render(self, row: Row, messages: list[Row], *, tokenize: bool = False, **given: Any) -> Any:
        given |= {"tools": row.get("tools")} | (row.get("chat_template_kwargs") or {})
        return render(self.tokenizer, messages, tokenize=tokenize, **given)

    def _require_shown(self, row: Row, rendered: str, messages: list[Row], **given: Any) -> None:
        """Refuse a template that renders the row's tools as none."""
        if row.get("tools") and rendered == self._render(row | {"tools": None}, messages, **given):
            raise MaskftError(
                "the chat template does not show the row's tools to the model, which would learn to call what it never "
                "saw; give another template with --chat_template_path."
            )

    @cached_property
    def _marking_template(self) -> Any:
        """The chat template that marks what the assistant says; None where there is none."""
        try:
            own = self.tokenizer.chat_template
            return own if own and has_generation_markers(own) else get_training_chat_template(self.tokenizer)
        except Exception:  # it tries the template on messages that not every template takes
            return None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Row], **given: Any) -> Any:
    """What the tokenizer's `apply_chat_template` gives.

    Raises:
        MaskftError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise MaskftError(
            "messages need a chat template, and the tokenizer has none; give one with --chat_template_path."
        )
    return refused_in_words(tokenizer.apply_chat_template, messages, **given)


def refused_in_words(apply_chat_template: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """What the function returns; whatever a chat template raises is a MaskftError."""
    try:
        return apply_chat_template(*args, **given)
    except Exception as error:  # a template is a program, and raises what it likes
        raise MaskftError(
            f"the chat template cannot render the messages ({type(error).__name__}: {first_line(error)}); correct "
            "them, or give another template with --chat_template_path."
        ) from error


def _require_said(rendered: str, messages: list[Row]) -> None:
    """Refuse a rendering that lacks what a message says; white space does not count."""
    rendered = "".join(rendered.split())
    for message in messages:
        for text in _said(message):
            if "".join(text.split()) not in rendered:
                raise MaskftError(
                    f"the chat template leaves out {shown(repr(text))}, which the {message['role']} says; give another "
                    "template with --chat_template_path."
                )


def _said(message: Row) -> list[str]:
    texts = [str(message[key]) for key in ("content", "reasoning_content", "thinking") if message.get(key)]
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        arguments = function.get("arguments") or ""
        texts += [str(function.get("name", "")), *([arguments] if isinstance(arguments, str) else map(str, arguments))]
    return texts


def has_answer(row: Row) -> bool:
    """Whether a token row has one to train on; the first is never scored, since nothing stands before it."""
    return any(label != -100 for label in row["labels"][1:])


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


def check_end_token_trained(token_rows: Dataset, end_ids: Set[int], *, max_length: int | None) -> None:
    """Make sure that the model is trained to stop, before training begins; a warning tells of rows that do not do so.

    Args:
        token_rows: with `labels`, each row cut at `max_length`.

    Raises:
        MaskftError: no row trains an end token.
    """
    ends, num_rows = np.fromiter(end_ids, dtype=np.int64), len(token_rows)
    lacking = [
        row
        for row in token_rows.select_columns("labels").with_format("numpy")["labels"]
        if not np.isin(row, ends).any()
    ]
    num_cut = sum(max_length is not None and len(labels) >= max_length for labels in lacking)
    if len(lacking) < num_rows:
        if lacking:
            told = (
                "%d of %d training rows (%.1f %%) do not train the end token, %d of them for max_length=%s cuts them."
            )
            logger.warning(told, len(lacking), num_rows, 100 * len(lacking) / num_rows, num_cut, max_length)
        return
    problem = f"None of the {num_rows} rows trains an end token (ids {sorted(end_ids)})"
    if num_cut == num_rows:
        raise MaskftError(f"{problem}: all of them are cut at max_length={max_length}; raise max_length.")
    cut = f" ({num_cut} rows are also cut at max_length={max_length})" if num_cut else ""
    raise MaskftError(
        f"{problem}, so the model would not learn to stop{cut}: use a chat template that closes the assistant's turn "
        "with an end-of-turn token, and name that token with --eos_token."
    )
