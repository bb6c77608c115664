"""The forms that a row of a user may have, and the one that they all become.

Read are TRL's forms (`messages`; `prompt` and `completion`; `text`), ShareGPT's (`conversations`) and Alpaca's
(`instruction`, `input`, `output`), with TRL's `tools` and `chat_template_kwargs` and a `system` column beside them.
All become `prompt` and `completion`:

- two texts; the prompt is empty where the loss falls on the whole text;
- two lists of messages, the completion beginning with an assistant's. Those of `messages` are marked with
  `assistant_only_loss`: the loss falls on every assistant turn of the completion and on nothing else.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from datasets import Json
from trl import maybe_convert_to_chatml

from maskft.errors import MaskftError, first_line
from maskft.storage.json_text import canonical_json, parse_json

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SAYS_MORE = ("tool_calls", "reasoning_content", "thinking")
_MESSAGE_KEYS = ("role", "content", "name", "tool_call_id", *_SAYS_MORE)
_BESIDE = ("system", "tools", "chat_template_kwargs")
_FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
_MAX_SHOWN = 80

ALLOWED = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": "..."}, {"conversations": [...]} or '
    '{"instruction": "...", "input": "...", "output": "..."}'
)


def read_row(row: Any, columns: Mapping[str, str]) -> tuple[Row, set[str]]:
    """A user's row in the one form, and those of its columns that hold something and are not read.

    Args:
        columns: names of the row's columns by what they are read as: `prompt`, `completion`, `text`.

    Raises:
        MaskftError: it has none of the forms, or holds what cannot be trained on.
    """
    if not isinstance(row, dict):
        raise MaskftError(f"a row must be an object of the form {ALLOWED}, but this one is {_kind(row)}.")
    # Parquet and hub rows have every column; one that holds nothing does not count.
    held = {key: value for key, value in row.items() if value is not None}
    if lacking := [column for column in columns.values() if column not in held]:
        raise MaskftError(f"the column {lacking[0]!r} is missing or null (keys found: {listed(set(row))}).")
    form = columns or {key: key for key in _form(held)}
    given = {name: held[column] for name, column in form.items()}
    beside = {key: held[key] for key in _BESIDE if held.get(key) not in (None, "", [], {})}
    read = _conversation(given, beside) or _texts(given, beside)
    try:  # whether it can be kept
        Json().decode_example(json.dumps(read, ensure_ascii=False, allow_nan=False).encode().decode())
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise MaskftError(f"the row holds half of a surrogate pair ({code}), which is no text; repair it.") from error
    except ValueError as error:
        raise MaskftError(f"the row holds a number that JSON has not ({first_line(error)}); repair it.") from error
    return read, set(held).difference(form.values(), _BESIDE)


def _form(held: Row) -> tuple[str, ...]:
    keys = set(held)
    if keys >= {"messages", "completion"}:
        raise MaskftError("the row holds both 'messages' and 'completion'; keep one of them.")
    for form in _FORMS:
        if keys.issuperset(form):
            return (*form, "input") if "input" in keys and "instruction" in form else form
    if keys >= {"prompt", "chosen"}:
        raise MaskftError("the row shows two answers; name the one to learn: --dataset_completion_field chosen.")
    hint = "--dataset_prompt_field and --dataset_completion_field, or with --dataset_text_field"
    told = f"a row with the keys {listed(keys)} has none of the allowed forms ({ALLOWED})"
    raise MaskftError(f"{told}; name its columns with {hint}.")


def _texts(given: Row, beside: Row) -> Row:
    if beside:
        raise MaskftError(f"{listed(beside)} beside plain text is not shown to the model; give messages instead.")
    texts = {key: _text(value, f"'{key}'") for key, value in given.items()}
    return {"prompt": "", "completion": texts["text"]} if "text" in texts else texts


def _conversation(given: Row, beside: Row) -> Row | None:
    """The row as a conversation; None where it is plain text."""
    if "instruction" in given:
        asked = [_text(given[key], f"'{key}'", may_be_empty=key == "input") for key in given if key != "output"]
        prompt = [{"role": "user", "content": "\n".join(filter(None, asked))}]
        given = {"prompt": prompt, "completion": [{"role": "assistant", "content": given["output"]}]}
    kinds = {key: _kind(value) for key, value in given.items()}
    if "a list" not in kinds.values() and not given.keys() & {"messages", "conversations"}:
        return None
    if given.keys() == {"prompt", "completion"} and set(kinds.values()) != {"a list"}:
        told = f"'prompt' is {kinds['prompt']} and 'completion' is {kinds['completion']}"
        raise MaskftError(f"{told}, but both must be strings or both lists of messages.")
    parts = {key: _messages(value, f"'{key}'") for key, value in given.items()}
    messages = [message for part in parts.values() for message in part]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise MaskftError("the conversation has no assistant turn, so there is nothing to learn; remove the row.")
    start = len(parts.get("prompt", messages[: turns[0]]))
    if start not in turns:
        raise MaskftError(f"'completion' must begin with the assistant, not with {messages[start]['role']}.")
    if turns[0] == 0:
        told = "the conversation begins with an assistant message, which answers nothing"
        raise MaskftError(f"{told}; begin it with a system or user message.")
    if "system" in beside and messages[0]["role"] in ("system", "developer"):
        raise MaskftError("the row has a 'system' column and a system message too; keep one of them.")
    system = [{"role": "system", "content": _text(beside.pop("system"), "'system'")}] if "system" in beside else []
    completion = messages[start : turns[-1] + 1]
    read: Row = {"prompt": system + messages[:start], "completion": completion}
    read |= {key: _json(value, f"'{key}'", list if key == "tools" else dict) for key, value in beside.items()}
    # TRL's loss on a completion of one message falls on all of it; of more nothing but the assistant's is wanted.
    return read if "prompt" in parts and len(completion) == 1 else read | {"assistant_only_loss": True}


def _messages(value: Any, field: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise MaskftError(f"{field} must be a list of messages, at least one, but it is {found}.")
    messages = maybe_convert_to_chatml({"messages": [dict(m) if isinstance(m, dict) else m for m in value]})["messages"]
    return [_message(message, f"{field}, message {i}") for i, message in enumerate(messages)]


def _message(value: Any, field: str) -> Row:
    """One message with the keys that chat templates know; no other key is lost in silence."""
    if not isinstance(value, dict):
        raise MaskftError(f'{field} must be {{"role": ..., "content": "..."}}, but it is {_kind(value)}.')
    given, message = value.get("role"), {key: held for key, held in value.items() if held not in (None, [], "")}
    role = _SHAREGPT.get(given, given) if isinstance(given, str) else None
    if role not in ROLES:
        raise MaskftError(f"{field}: the role is {shown(repr(given))}, but it must be one of {listed(ROLES)}.")
    if other := [key for key in message if key not in _MESSAGE_KEYS]:
        told = f"{field} has the keys {listed(other)} besides {listed(_MESSAGE_KEYS)}"
        raise MaskftError(f"{told}; remove them or write them into the content.")
    message["role"] = role
    if given == "function_call":
        calls = _json(message.pop("content", ""), f"{field}, the function call", (list, dict))
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    elif value.get("content") is not None or not message.keys() & {*_SAYS_MORE}:
        may_be_empty = role not in ("user", "assistant") or bool(message.keys() & {*_SAYS_MORE})
        message["content"] = _text(value.get("content"), f"{field} ({role}), the content", may_be_empty=may_be_empty)
    return message


def _text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """A text, or the text of parts such as `{"type": "text", "text": "..."}`."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise MaskftError(f"{field} must be a string, but it is {_kind(value)}.")
    if not value.strip() and not may_be_empty:
        raise MaskftError(f"{field} is empty; write a text or remove the row.")
    return value


def _json(value: Any, field: str, kind: type | tuple[type, ...]) -> Any:
    """A value, or that of a JSON text, as TRL takes one for `tools`."""
    if isinstance(value, str):
        value = parse_json(value.encode("utf-8", "surrogatepass"), field, "correct it")
    if not isinstance(value, kind):
        raise MaskftError(f"{field} must be {'an object' if kind is dict else 'a list'}, but it is {_kind(value)}.")
    return value


def problem_of(row: Row) -> str:
    """Equal for rows that belong together: those of one prompt or whole text, and the turns of one conversation."""
    prompt = row["prompt"] or row["completion"]
    if isinstance(prompt, str):
        return prompt
    return canonical_json(list(takewhile(lambda message: message["role"] != "assistant", prompt))).decode()


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
