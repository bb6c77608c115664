"""Rows as tokens: rendered, labelled and cut in one place, for training, validation, verdict and evaluation alike.

What is trained is what TRL's SFTTrainer trains on such rows (`trl.trainer.sft_trainer`, `_prepare_dataset`): all of a
plain text, the completion after a prompt, and of `messages` every assistant turn. For these TRL has training templates,
which mark what the assistant says; where it has none for a chat template, each turn becomes a row of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from maskft.adapters.model_files import Limits
from maskft.data.forms import Row, shown
from maskft.errors import MaskftError, first_line

_ANOTHER = "give another template with --chat_template_path"


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
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: SFTConfig, limits: Limits | None = None) -> Self:
        """That of a run with these settings."""
        names = ("max_length", "truncation_mode", "assistant_only_loss", "completion_only_loss")
        return cls(tokenizer, **{name: getattr(settings, name) for name in names}, limits=limits)

    def __call__(self, row: Row) -> list[Row]:
        """The row's tokens, in one part or one for each assistant turn, each with whether its answer `is_cut`.

        An answer that `is_unfinished`, since its writer was stopped, is not trained to end there.

        Raises:
            MaskftError: the chat template refuses the row or leaves out what is said in it, or the model is too small.
        """
        parts = self._texts(row) if isinstance(row["completion"], str) else self._turns(row)
        if row.get("is_unfinished"):
            parts[-1] = parts[-1][0], self._without_end(parts[-1][1])
        return [self._cut(*part) for part in parts]

    def _cut(self, ids: list[int], labels: list[int]) -> Row:
        is_end_kept = self.truncation_mode == "keep_end" and self.max_length is not None
        kept = slice(-(self.max_length or 0), None) if is_end_kept else slice(self.max_length)
        if self.limits is not None:
            self.limits.check(ids[kept], self.tokenizer)
        part: Row = {"input_ids": ids[kept], "labels": labels[kept]}
        is_less = sum(label != -100 for label in labels) > sum(label != -100 for label in part["labels"])
        return part | {"is_cut": is_less and has_answer(part)}

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
                raise MaskftError("`assistant_only_loss` needs a chat template with generation marks; leave it out.")
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
        tokens = self._render(row, messages, tokenize=True, return_assistant_tokens_mask=True, **template)
        start = 0
        if any(message["role"] == "assistant" for message in row["prompt"]):
            asked = self._render(row, row["prompt"], tokenize=True, add_generation_prompt=True, **template)
            start = common_prefix_length(asked["input_ids"], tokens["input_ids"])
        pairs = enumerate(zip(tokens["input_ids"], tokens["assistant_masks"], strict=True))
        return tokens["input_ids"], [token if marked and i >= start else -100 for i, (token, marked) in pairs]

    def _without_end(self, labels: list[int]) -> list[int]:
        tokens = end_token_ids(self.tokenizer, None)
        ends = [i for i, label in enumerate(labels) if label in tokens]
        return labels[: ends[-1]] + [-100] * (len(labels) - ends[-1]) if ends else labels

    def _labelled(self, prompt: list[int], ids: list[int]) -> tuple[list[int], list[int]]:
        num_shared = 0 if self.completion_only_loss is False else common_prefix_length(prompt, ids)
        return ids, [-100] * num_shared + ids[num_shared:]

    def _render(self, row: Row, messages: list[Row], *, tokenize: bool = False, **given: Any) -> Any:
        given |= {"tools": row.get("tools")} | (row.get("chat_template_kwargs") or {})
        return render(self.tokenizer, messages, tokenize=tokenize, **given)

    def _require_shown(self, row: Row, rendered: str, messages: list[Row], **given: Any) -> None:
        """Refuse a template that renders the row's tools as none."""
        if row.get("tools") and rendered == self._render(row | {"tools": None}, messages, **given):
            told = "the chat template does not show the row's tools, so the model would learn to call what it never saw"
            raise MaskftError(f"{told}; {_ANOTHER}.")

    @cached_property
    def _marking_template(self) -> Any:
        """The chat template that marks what the assistant says; None where there is none."""
        try:
            own = self.tokenizer.get_chat_template()
            return own if has_generation_markers(own) else get_training_chat_template(self.tokenizer)
        except Exception:  # it tries the template on messages that not every template takes
            return None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Row], **given: Any) -> Any:
    """What the tokenizer's `apply_chat_template` gives; MaskftError where there is no template, or it refuses."""
    if tokenizer.chat_template is None:
        raise MaskftError("messages need a chat template, and the tokenizer has none; give --chat_template_path.")
    return refused_in_words(tokenizer.apply_chat_template, messages, **given)


def refused_in_words(apply_chat_template: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """What the function returns; whatever a chat template raises is a MaskftError."""
    try:
        return apply_chat_template(*args, **given)
    except Exception as error:  # a template is a program, and raises what it likes
        told = f"the chat template cannot render the messages ({type(error).__name__}: {first_line(error)})"
        raise MaskftError(f"{told}; correct them, or {_ANOTHER}.") from error


def _require_said(rendered: str, messages: list[Row]) -> None:
    """Refuse a rendering that lacks what a message says; white space does not count."""
    rendered = "".join(rendered.split())
    for message in messages:
        for text in _said(message):
            if "".join(text.split()) not in rendered:
                told = f"the chat template leaves out {shown(repr(text))}, which the {message['role']} says"
                raise MaskftError(f"{told}; {_ANOTHER}.")


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
    """The tokens at which generation stops; MaskftError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        told = "The tokenizer has no end token, so the model could not learn to stop"
        raise MaskftError(f"{told}; set eos_token, the chat template's end-of-turn token, in tokenizer_config.json.")
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (tokenizer.eos_token_id, *configured) if token is not None}
