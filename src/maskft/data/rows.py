"""Training rows: read, checked, hashed.

Rows are taken in three of TRL's forms, one form for a whole data set:

- `{"prompt": "...", "completion": "..."}`: plain text; TRL appends the tokenizer's end token.
- `{"prompt": [messages], "completion": [one assistant message]}`: rendered by the chat template.
- `{"messages": [...]}`: a conversation. It becomes one prompt-completion row for each assistant turn, the
  prompt being everything before that turn. TRL masks the prompt, so the loss falls on every assistant turn
  and on nothing else, whatever the chat template (TRL's `assistant_only_loss` needs a template with
  `{% generation %}` marks).

A message is `{"role": ..., "content": "..."}`. Nothing that is read is executed: no pickle, no loading
script; and Transformers renders chat templates in a sandbox.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from maskft.errors import MaskftError
from maskft.storage.json_text import canonical_json, json_lines, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")

_FIELDS = ("prompt", "completion", "messages")
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
_SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_ROWS_PER_BLOCK = 10_000
_MAX_SHOWN = 80

_ALLOWED = (
    '{"prompt": "...", "completion": "..."}, the same two keys with lists of {"role", "content"} messages, '
    'or {"messages": [...]}'
)
# The keys of other tools' forms, and the sentence that helps with each.
_CONVERSIONS = (
    (
        {"instruction"},
        "write the instruction (with the input, if any) as 'prompt' and the answer as 'completion'",
    ),
    ({"question", "answer"}, "rename 'question' to 'prompt' and 'answer' to 'completion'"),
    ({"conversations"}, "rename 'conversations' to 'messages', 'from' to 'role' and 'value' to 'content'"),
    ({"prompt", "chosen"}, "rename 'chosen' to 'completion' and leave 'rejected' out"),
    ({"prompt", "response"}, "rename 'response' to 'completion'"),
    ({"text"}, "cut the text where the answer begins into 'prompt' and 'completion'"),
)
_DEFAULT_CONVERSION = "rename the column with the question to 'prompt' and the one with the answer to 'completion'"

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_FEATURES = {
    "text": Features({"prompt": Value("string"), "completion": Value("string")}),
    "conversation": Features({"prompt": _MESSAGES, "completion": _MESSAGES}),
}

Row = dict[str, Any]


# --- reading ---------------------------------------------------------------------------------------------


def load_rows(dataset_name: str, *, dataset_config: str | None = None, split: str = "train") -> Dataset:
    """Read and check a data set.

    Args:
        dataset_name: a `.jsonl`, `.json` or `.parquet` file, a folder with files of one of these kinds, or
            the name of a data set on the Hugging Face hub. Other columns than a form's own are dropped.
        dataset_config: configuration of a hub data set.
        split: split of a hub data set; in a folder, the files named after it (`train.jsonl`,
            `train-00001.parquet`), or all files when none is named after a split.

    Returns:
        A data set with exactly the columns `prompt` and `completion`: both strings, or both lists of messages
        (`completion` then has one, of the assistant).

    Raises:
        MaskftError: no such data, no rows, or a row that cannot be used, with its file and line (for JSON
            arrays, Parquet and the hub: its index, counted from 0).
    """
    suffix = Path(dataset_name).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise MaskftError(
            f"{dataset_name} is refused: reading a {suffix} file can run code hidden in it; convert it to "
            ".jsonl, .json or .parquet."
        )
    path = Path(dataset_name).expanduser()
    if path.exists():
        if dataset_config is not None:
            raise MaskftError(
                f"A dataset config ({dataset_config!r}) belongs to a hub data set, but {dataset_name} is a "
                "local path: leave it out."
            )
        located = _folder_rows(path, split) if path.is_dir() else _file_rows(path, split)
    elif suffix in _DATA_SUFFIXES or dataset_name.startswith((".", "/", "~")):
        raise MaskftError(f"There is no data file or folder {dataset_name}: check the path.")
    else:
        located = _hub_rows(dataset_name, dataset_config, split)
    try:
        return _build(located, dataset_name)
    except OSError as error:
        raise MaskftError(
            f"{dataset_name} cannot be read ({_shown(str(error))}): check the path and its permissions."
        ) from error


def load_held_out(dataset_name: str, split: str, *, dataset_config: str | None = None) -> Dataset:
    """Rows to validate or test on: those of a single file, or of that split of a folder or hub data set."""
    split = "train" if Path(dataset_name).expanduser().is_file() else split
    return load_rows(dataset_name, dataset_config=dataset_config, split=split)


def _build(located: Iterable[tuple[str, Any]], source: str) -> Dataset:
    """Check (place, row) pairs and gather them, in blocks so that Python objects do not pile up."""
    form, form_place = "", ""
    pending: list[Row] = []
    blocks: list[Dataset] = []

    def flush() -> None:
        columns = {key: [row[key] for row in pending] for key in ("prompt", "completion")}
        kind = "text" if form == "text" else "conversation"
        blocks.append(Dataset.from_dict(columns, features=_FEATURES[kind]))
        pending.clear()

    for place, row in located:
        row_form = _form(row, place)
        expanded = _EXPAND[row_form](row, place)
        if not form:
            form, form_place = row_form, place
        elif row_form != form:
            raise MaskftError(
                f"{place}: this row is of the form {_NAMES[row_form]} but {form_place} is of the form "
                f"{_NAMES[form]}; write all rows of a data set in one form."
            )
        pending.extend(expanded)
        if len(pending) >= _ROWS_PER_BLOCK:
            flush()
    if pending:
        flush()
    if not blocks:
        raise MaskftError(f"{source} holds no rows: give a data set with at least one row of the form {_ALLOWED}.")
    return concatenate_datasets(blocks)


def _file_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    if split != "train":
        raise MaskftError(
            f"The split {split!r} cannot be taken from the single file {path}: give the file of that split, "
            "or a folder or hub data set that has it."
        )
    return _read_file(path)


def _folder_rows(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _DATA_SUFFIXES)
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise MaskftError(f"The folder {folder} holds no data: put .jsonl, .json or .parquet files there.")
    of_split = [path for path in files if _is_of_split(path, split)]
    # A folder with train and test files must not have its test rows trained on.
    if not of_split and (split != "train" or any(_is_of_split(file, word) for file in files for word in _SPLIT_WORDS)):
        raise MaskftError(
            f"The folder {folder} holds no file of the split {split!r} (it holds "
            f"{_listed(file.name for file in files)}): name one {split}.jsonl, {split}.json or "
            f"{split}.parquet, or give a file instead of the folder."
        )
    files = of_split or files
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) > 1:
        raise MaskftError(
            f"The folder {folder} holds data of several kinds ({_listed(kinds)}): keep one kind or give a file."
        )
    return (located for path in files for located in _read_file(path))


def _is_of_split(path: Path, split: str) -> bool:
    stem = path.stem.lower()
    return stem == split or stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".json" and _first_character(path) == b"[":
        return _read_json_array(path)
    if suffix in _DATA_SUFFIXES:
        return json_lines(path)
    raise MaskftError(f"{path} is a file of the kind {suffix or '(no ending)'}: give a .jsonl, .json or .parquet file.")


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(codecs.BOM_UTF8).lstrip()
            if text:
                return text[:1]
    return b""


def _read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), str(path))):
        yield f"{path}, row {index}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            keys = file.schema_arrow.names
            columns = [name for name in _FIELDS if name in keys]
            for batch in file.iter_batches(batch_size=1000, columns=columns or keys[:1]):
                for row in batch.to_pylist():
                    # Columns that are not read still stand in the row's keys, for the message.
                    yield f"{path}, row {index}", dict.fromkeys(keys) | row
                    index += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MaskftError(
            f"{path}: not a readable Parquet file after row {index} ({_shown(str(error))}); write it again."
        ) from error


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        chosen = f" with config {config!r}" if config is not None else ""
        raise MaskftError(
            f"The data set {name!r}{chosen}, split {split!r}, could not be loaded from the hub "
            f"({_shown(str(error))}): check the name, config and split, or give the path of a local file."
        ) from error
    keys = dataset.column_names
    wanted = dataset.select_columns([key for key in _FIELDS if key in keys] or keys[:1])
    return ((f"{name} ({split}), row {i}", dict.fromkeys(keys) | row) for i, row in enumerate(wanted))


# --- checking one row ------------------------------------------------------------------------------------


def _form(row: Any, place: str) -> str:
    """Which form a row has: "text", "conversation" (prompt-completion) or "messages"."""
    if not isinstance(row, dict):
        raise MaskftError(f"{place}: a row must be an object of the form {_ALLOWED}, but this one is {_kind(row)}.")
    # Parquet and hub rows have every column; one that holds nothing does not count.
    has = {key for key in _FIELDS if row.get(key) is not None}
    if "messages" in has and "completion" in has:
        raise MaskftError(
            f"{place}: the row holds both 'messages' and 'completion'; keep 'messages' alone, or 'prompt' "
            "and 'completion'."
        )
    if "messages" in has:
        return "messages"
    if has == {"prompt", "completion"}:
        kinds = [type(row["prompt"]), type(row["completion"])]
        if kinds == [str, str]:
            return "text"
        if kinds == [list, list]:
            return "conversation"
        raise MaskftError(
            f"{place}: 'prompt' is {_kind(row['prompt'])} and 'completion' is {_kind(row['completion'])}, "
            "but both must be strings or both lists of messages."
        )
    keys = set(row)
    if keys & set(_FIELDS) and not any(other <= keys for other, _ in _CONVERSIONS):
        pair = {"prompt", "completion"}
        missing = pair - has if keys & pair else {"messages"}
        raise MaskftError(
            f"{place}: {_listed(missing)} is missing or null (keys found: {_listed(keys)}); a row has the "
            f"form {_ALLOWED}."
        )
    conversion = next((help_ for other, help_ in _CONVERSIONS if other <= keys), _DEFAULT_CONVERSION)
    raise MaskftError(
        f"{place}: a row with the keys {_listed(keys)} has none of the allowed forms ({_ALLOWED}); {conversion}."
    )


def _text_rows(row: Row, place: str) -> list[Row]:
    return [{key: _text(row[key], f"{place}: '{key}'") for key in ("prompt", "completion")}]


def _conversation_rows(row: Row, place: str) -> list[Row]:
    prompt = _messages(row["prompt"], f"{place}: 'prompt'")
    completion = _messages(row["completion"], f"{place}: 'completion'")
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = _listed(message["role"] for message in completion)
        raise MaskftError(
            f"{place}: 'completion' must hold exactly one message, of the assistant, but its roles are "
            f'{roles}; write a longer conversation as {{"messages": [...]}}.'
        )
    _check_start(prompt, place)
    return [{"prompt": prompt, "completion": completion}]


def _messages_rows(row: Row, place: str) -> list[Row]:
    messages = _messages(row["messages"], f"{place}: 'messages'")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise MaskftError(f"{place}: 'messages' has no assistant turn, so there is nothing to learn; remove the row.")
    _check_start(messages, place)
    return [{"prompt": messages[:i], "completion": [messages[i]]} for i in turns]


_NAMES = {
    "text": "prompt-completion with strings",
    "conversation": "prompt-completion with messages",
    "messages": "messages",
}
_EXPAND = {"text": _text_rows, "conversation": _conversation_rows, "messages": _messages_rows}


def _check_start(messages: list[dict[str, str]], place: str) -> None:
    if messages[0]["role"] == "assistant":
        raise MaskftError(
            f"{place}: the conversation begins with an assistant message, which answers nothing; begin it "
            "with a system or user message."
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
        raise MaskftError(f"{field}: the role is {_shown(repr(role))}, but it must be one of {_listed(ROLES)}.")
    other = [key for key, held in value.items() if key not in ("role", "content") and held not in (None, [], "")]
    if other:
        raise MaskftError(
            f"{field} has the keys {_listed(other)} besides 'role' and 'content'; remove them or write them "
            "into the content."
        )
    may_be_empty = role in ("system", "developer", "tool")
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
            f"{field} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at character "
            f"{error.start}), which is no text; repair or remove the row."
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _listed(names: Iterable[Any]) -> str:
    names = sorted(names) if isinstance(names, set) else list(names)
    shown = [_shown(repr(name)) for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if shown else "none"


def _shown(text: str) -> str:
    """At most `_MAX_SHOWN` characters of the first line of a text, fit for a terminal."""
    line = (text.splitlines() or [""])[0]
    line = line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 3] + "..."
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) over the rows as canonical JSON, one a line; the order of rows counts, of keys not."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row) + b"\n")
    return digest.hexdigest()


def count_and_hash(rows: Dataset) -> dict[str, Any]:
    """What a report says of a split: `n` rows, and their :func:`data_hash` as `sha256`."""
    return {"n": len(rows), "sha256": data_hash(rows)}
