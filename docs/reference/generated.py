"""A hook of mkdocs: `<!-- flags -->` becomes every command's flags, `<!-- settings -->` the settings of MaskConfig."""

import argparse
import os
from dataclasses import fields
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

OF_LIBRARIES = "Flags of TRL and Transformers"


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


def _table(rows: list[tuple[str, object, str]]) -> str:
    lines = ["| name | default | what it is |", "|---|---|---|"]
    for name, default, text in rows:
        shown = "" if default in (None, argparse.SUPPRESS) else f"`{default}`"
        cells = [f"`{name}`", shown, " ".join(text.split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines)


def flags() -> str:
    """Each command's own flags as a table; names of those that libraries declare."""
    from maskft import cli

    parts = []
    for command, point in cli.commands().items():
        own, foreign = [], []
        for group in parser_of(command)._action_groups:
            for action in group._group_actions:
                if action.help == argparse.SUPPRESS or action.dest == "help":
                    continue
                flag = next(form for form in action.option_strings if "-" not in form.lstrip("-"))
                row = (flag, "required" if action.required else action.default, action.help or "")
                (foreign if group.title == OF_LIBRARIES else own).append(row)
        parts.append(f"## maskft {command}\n\n{(point.load().__doc__ or '').strip()}\n\n{_table(own)}")
        if foreign:
            names = ", ".join(f"`{flag}`" for flag, _, _ in sorted(foreign))
            parts.append(f'??? note "{len(foreign)} flags of TRL and Transformers"\n\n    {names}')
    return "\n\n".join(parts)


def settings() -> str:
    """The fields of MaskConfig, each with its help."""
    from maskft import MaskConfig

    own = [f for f in fields(MaskConfig) if f.name in MaskConfig.__annotations__]
    return _table([(f.name, f.default, f.metadata["help"].replace("--", "")) for f in own])


def on_page_markdown(markdown: str, **_: object) -> str:
    for mark, make in (("<!-- flags -->", flags), ("<!-- settings -->", settings)):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
