"""The forms that a training row may have, and what is said of a row that has none of them.

- `{"prompt": "...", "completion": "..."}`: plain text; TRL appends the tokenizer's end token.
- `{"prompt": [messages], "completion": [one assistant message]}`: rendered by the chat template.
- `{"messages": [...]}`: a conversation. It becomes one prompt-completion row for each assistant turn, the prompt being
  everything before that turn. TRL masks the prompt, so the loss falls on every assistant turn and on nothing else,
  whatever the chat template (TRL's `assistant_only_loss` needs a template with `{% generation %}` marks).

A message is `{"role": ..., "content": "..."}`.
"""

from collections.abc import Iterable
from typing import Any

from maskft.errors import MaskftError

FIELDS = ("prompt", "completion", "messages")
ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_SHOWN = 80

ALLOWED = (
    '{"prompt": "...", "completion": "..."}, the same two keys with lists of {"role", "content"} messages, '
    'or {"messages": [...]}'
)
# The keys of other tools' forms, and the sentence that helps with each.
_CONVERSIONS = (
    ({"instruction"}, "write the instruction (with the input, if any) as 'prompt' and the answer as 'completion'"),
    ({"question", "answer"}, "rename 'question' to 'prompt' and 'answer' to 'completion'"),
    ({"conversations"}, "rename 'conversations' to 'messages', 'from' to 'role' and 'value' to 'content'"),
    ({"prompt", "chosen"}, "rename 'chosen' to 'completion' and leave 'rejected' out"),
    ({"prompt", "response"}, "rename 'response' to 'completion'"),
    ({"text"}, "cut the text where the answer begins into 'prompt' and 'completion'"),
)
_DEFAULT_CONVERSION = "rename the column with the question to 'prompt' and the one with the answer to 'completion'"

Row = dict[str, Any]


def expand(row: Any, location: str) -> tuple[str, list[Row]]:
    """The name of a row's form, and the prompt-completion rows that it stands for.

    Raises:
        MaskftError: it has none of the forms, or holds what cannot be trained on.
    """
    try:
        return _expand(row)
    except MaskftError as error:
        raise MaskftError(f"{location}: {error}") from error


def _expand(row: Any) -> tuple[str, list[Row]]:
    if not isinstance(row, dict):
        raise MaskftError(f"a row must be an object of the form {ALLOWED}, but this one is {_kind(row)}.")
    # Parquet and hub rows have every column; one that holds nothing does not count.
    has = {key for key in FIELDS if row.get(key) is not None}
    if has >= {"messages", "completion"}:
        raise MaskftError(
            "the row holds both 'messages' and 'completion'; keep 'messages' alone, or 'prompt' and 'completion'."
        )
    if "messages" in has:
        return "messages", _turns(row["messages"])
    if has != {"prompt", "completion"}:
        raise _of_no_form(set(row), has)
    kinds = [type(row["prompt"]), type(row["completion"])]
    if kinds == [str, str]:
        texts = {key: _text(row[key], f"'{key}'") for key in ("prompt", "completion")}
        return "prompt-completion with strings", [texts]
    if kinds == [list, list]:
        return "prompt-completion with messages", [_conversation(row)]
    raise MaskftError(
        f"'prompt' is {_kind(row['prompt'])} and 'completion' is {_kind(row['completion'])}, but both must be strings "
        "or both lists of messages."
    )


def _of_no_form(keys: set[Any], has: set[str]) -> MaskftError:
    conversion = next((help_ for other, help_ in _CONVERSIONS if other <= keys), None)
    if keys & set(FIELDS) and conversion is None:
        pair = {"prompt", "completion"}
        missing = listed(pair - has if keys & pair else {"messages"})
        return MaskftError(f"{missing} is missing or null (keys found: {listed(keys)}); a row has the form {ALLOWED}.")
    return MaskftError(
        f"a row with the keys {listed(keys)} has none of the allowed forms ({ALLOWED}); "
        f"{conversion or _DEFAULT_CONVERSION}."
    )


def _conversation(row: Row) -> Row:
    prompt, completion = (_messages(row[key], f"'{key}'") for key in ("prompt", "completion"))
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise MaskftError(
            f"'completion' must hold exactly one message, of the assistant, but its roles are {listed(roles)}; write a "
            'longer conversation as {"messages": [...]}.'
        )
    _check_start(prompt)
    return {"prompt": prompt, "completion": completion}


def _turns(value: Any) -> list[Row]:
    messages = _messages(value, "'messages'")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise MaskftError("'messages' has no assistant turn, so there is nothing to learn; remove the row.")
    _check_start(messages)
    return [{"prompt": messages[:i], "completion": [messages[i]]} for i in turns]


def _check_start(messages: list[dict[str, str]]) -> None:
    if messages[0]["role"] == "assistant":
        raise MaskftError(
            "the conversation begins with an assistant message, which answers nothing; begin it with a system or user "
            "message."
        )


def _messages(value: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise MaskftError(f"{field} must be a list of messages, but it is {_kind(value)}.")
    if not value:
        raise MaskftError(f"{field} is an empty list; give at least one message.")
    return [_message(message, f"{field}, message {i}") for i, message in enumerate(value)]


def _message(value: Any, field: str) -> dict[str, str]:
    """One message with `role` and `content` alone; no other key is lost in silence."""
    if not isinstance(value, dict):
        raise MaskftError(f'{field} must be {{"role": ..., "content": "..."}}, but it is {_kind(value)}.')
    role = value.get("role")
    if role not in ROLES:
        raise MaskftError(f"{field}: the role is {shown(repr(role))}, but it must be one of {listed(ROLES)}.")
    other = [key for key, held in value.items() if key not in ("role", "content") and held not in (None, [], "")]
    if other:
        told = f"{field} has the keys {listed(other)} besides 'role' and 'content'"
        raise MaskftError(f"{told}; remove them or write them into the content.")
    may_be_empty = role not in ("user", "assistant")
    content = _text(value.get("content"), f"{field} ({role}), the content", may_be_empty=may_be_empty)
    return {"role": role, "content": content}


def _text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise MaskftError(f"{field} must be a string, but it is {_kind(value)}.")
    if not value.strip() and not may_be_empty:
        raise MaskftError(f"{field} is empty; write a text or remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MaskftError(
            f"{field} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at character {error.start}), "
            "which is no text; repair or remove the row."
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def listed(names: Iterable[Any]) -> str:
    """At most eight names in quotes, those of a set in order."""
    names = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown(repr(name)) for name in names[:8]) + more or "none"


def shown(text: str) -> str:
    """At most `_MAX_SHOWN` characters of the first line of a text, fit for a terminal."""
    line = (text.splitlines() or [""])[0]
    line = line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 3] + "..."
    return line.encode("utf-8", "backslashreplace").decode("utf-8")
