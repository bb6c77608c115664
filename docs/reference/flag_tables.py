"""A hook of mkdocs: `<!-- flags -->` becomes every command's flags, `<!-- settings -->` the settings of MaskConfig."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

OF_LIBRARIES = "Flags of TRL and Transformers"
Row = tuple[str, str, str]  # name, default, what it is


class _Stopped(Exception):
    pass


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command builds, taken from it at the moment it would parse."""
    from maskft import cli

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Stopped(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            cli.commands()[command].load()([])
        except _Stopped as stopped:
            return stopped.args[0]
    raise AssertionError(f"maskft {command} parses nothing")


def rows_of(command: str) -> dict[Row, str]:
    """The flags of a command, each with the title of its group."""
    rows = {}
    for group in parser_of(command)._action_groups:
        for action in group._group_actions:
            flag = next(form for form in action.option_strings if "-" not in form.lstrip("-"))
            # The page says once what --config and the --no_ forms of switches are.
            is_told = flag in ("-h", "--config" if command != "study" else "") or flag.startswith("--no_")
            if action.help != argparse.SUPPRESS and not is_told:
                default = "required" if action.required else "" if action.default is None else f"`{action.default}`"
                rows[f"`{flag}`", default, " ".join((action.help or "").split())] = str(group.title)
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|").replace("<", "&lt;") for c in line) + " |" for line in lines
    )


def flags() -> str:
    """maskft's own flags, those that several commands share once; then the names of those that libraries declare."""
    from maskft import cli

    by_command = {command: rows_of(command) for command in cli.commands()}
    owners: dict[Row, list[str]] = {}
    for command, rows in by_command.items():
        for row in rows:
            owners.setdefault(row, []).append(command)
    training = {command for command, rows in by_command.items() if OF_LIBRARIES in rows.values()}
    groups = {row: title for rows in by_command.values() for row, title in rows.items()}
    shared: dict[str, list[Row]] = {}
    for row, title in groups.items():
        if training.issuperset(owners[row]) and (len(owners[row]) > 1 or title == OF_LIBRARIES):
            shared.setdefault(title, []).append(row)
    parts = []
    for command, point in cli.commands().items():
        own = [row for row, title in by_command[command].items() if row not in shared.get(title, [])]
        more = "\n\nAnd the [flags of training commands](#flags-of-training-commands)." * (command in training)
        table = f"\n\n{_table(('flag', 'default', 'what it is'), own)}" * bool(own)
        parts.append(f"## maskft {command}\n\n{(point.load().__doc__ or '').strip()}{more}{table}")
    parts.append(f"## Flags of training commands\n\nOf {', '.join(f'`{name}`' for name in sorted(training))}.")
    for title, rows in shared.items():
        if title != OF_LIBRARIES:
            others = [", ".join(sorted(training.difference(owners[row]))) for row in rows]
            cells = [(*row, f"all but {names}" if names else "all") for row, names in zip(rows, others, strict=True)]
            parts.append(f"### {title}\n\n{_table(('flag', 'default', 'what it is', 'of'), cells)}")
    names = ", ".join(sorted({row[0] for row in shared[OF_LIBRARIES]}))
    parts.append(f"### {OF_LIBRARIES}\n\nTheir help is in `maskft train --help`.\n\n{names}")
    return "\n\n".join(parts)


def settings() -> str:
    """The fields of MaskConfig, each with its help."""
    from maskft import MaskConfig

    own = [
        f for f in fields(MaskConfig) if f.name in MaskConfig.__annotations__ and "on save" not in f.metadata["help"]
    ]
    rows = [(f"`{f.name}`", f"`{f.default!r}`", f.metadata["help"].replace("--", "")) for f in own]
    return _table(("setting", "default", "what it is"), rows)


def on_page_content(html: str, **_: object) -> str:
    return re.sub(r":(func|meth|mod|class|data):(?=\s*<)", "", html)  # docstrings' roles, which Markdown does not know


def on_page_markdown(markdown: str, **_: object) -> str:
    for mark, make in (("<!-- flags -->", flags), ("<!-- settings -->", settings)):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
