"""Rows of each form, as files."""

import json

TEXT = {"prompt": "one plus one", "completion": "two"}
USER = {"role": "user", "content": "one plus one"}
ASSISTANT = {"role": "assistant", "content": "two"}
SYSTEM = {"role": "system", "content": "add"}
CONVERSATION = {"prompt": [USER], "completion": [ASSISTANT]}
MESSAGES = {"messages": [SYSTEM, USER, ASSISTANT]}
EXPANDED = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}


def write_lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
