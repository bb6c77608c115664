"""The command `maskft`: parses, and calls the function of the same name."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich.console import Console

from maskft import __version__
from maskft.errors import MaskftError, nearest
from maskft.storage.yaml_file import read_yaml

# Flags that are gone, without their hyphens, and what to do instead: each is refused in a sentence for one release,
# as is a key of the same name in the file of --config.
REMOVED_FLAGS: dict[str, str] = {}


def commands() -> dict[str, EntryPoint]:
    """The commands by name: entry points of the group `maskft.commands`, those of other packages among them."""
    return {point.name: point for point in sorted(entry_points(group="maskft.commands"), key=lambda p: p.name)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or that of the error (`maskft.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("maskft", "maskft_lab"):
        logging.getLogger(package).setLevel(logging.INFO)
    found = commands()
    parser = argparse.ArgumentParser(prog="maskft", description="Learn which weights of a language model to leave out.")
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # The modules of commands import nothing heavy: PyTorch alone would take seconds (issue 28).
    for name, point in found.items():
        choices.add_parser(name, help=(point.load().__doc__ or "").strip().rstrip("."), add_help=False)
    command = parser.parse_args(arguments[:1]).command
    try:
        found[command].load()(arguments[1:])
    except MaskftError as error:
        Console(stderr=True, soft_wrap=True).print(f"maskft {command}: error: {error}", markup=False, highlight=False)
        return error.exit_status
    return 0


def parse(
    command: str, dataclasses: Sequence[type], arguments: Sequence[str], *, refused: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Flags, and the same keys from the YAML file of `--config`, as dataclasses; flags win.

    Args:
        refused: flags that the command answers with an error alone; its help leaves them out.

    Raises:
        MaskftError: an unknown flag or key, a value of the wrong type, or a file that is no mapping.
    """
    from trl import TrlParser

    # TRL's parser knows the file of `--config FILE` alone.
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser = TrlParser(list(dataclasses), prog=f"maskft {command}", exit_on_error=False, formatter_class=_Formatter)
    parser.add_argument("--config", help="YAML file with the same keys as the flags; flags win.")
    for action in parser._actions:
        if action.dest in refused:
            action.help = argparse.SUPPRESS
    # Each flag is known with hyphens too, and named without.
    shown = [a.option_strings for a in parser._actions if a.help != argparse.SUPPRESS]
    names = [flag.removeprefix("--") for flags in shown for flag in flags if "-" not in flag.removeprefix("--")]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            name = flag.removeprefix("--").replace("-", "_")
            _refuse_removed(flag, name)
            raise MaskftError(f"Unknown flag {flag}{nearest(name, names)}; `maskft {command} --help` lists all.")
    config = _config_path(arguments)
    if config is not None:
        _check_file(config, dataclasses)
    try:
        stray = parser.parse_known_args(arguments)[1]
        if stray:
            raise MaskftError(_stray_message(stray[0], arguments, parser, names))
        parsed: tuple[Any, ...] = parser.parse_args_and_config(arguments)
    except MaskftError:
        raise
    except argparse.ArgumentError as error:
        flag = str(error.argument_name).partition("/")[0]
        is_list = parser._option_string_actions[flag].nargs == "+"
        hint = "separate values by spaces; " if is_list else ""
        raise MaskftError(f"{flag}: {error.message}; {hint}`maskft {command} --help` says what is allowed.") from error
    except ValueError as error:
        raise MaskftError(f"{error}; `maskft {command} --help` says what is allowed.") from error
    return parsed[: len(dataclasses)]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults, but no None where the text says what stands for it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default is None and ("Default: " in text or "Defaults to " in text):
            return text
        return super()._get_help_string(action)


def _refuse_removed(given: str, name: str) -> None:
    if name in REMOVED_FLAGS:
        raise MaskftError(f"{given} is gone: {REMOVED_FLAGS[name]}")


def _stray_message(word: str, arguments: Sequence[str], parser: argparse.ArgumentParser, names: Sequence[str]) -> str:
    """What to do about a word that no flag takes, by the flag before it."""
    before = [a.partition("=")[0] for a in arguments[: list(arguments).index(word)] if a.startswith("--")]
    if not before:
        model = next(name for name in names if name.startswith("model"))
        return f"{word!r} belongs to no flag; name the model with --{model}."
    flag = before[-1]
    if "comma-separated" in (parser._option_string_actions[flag].help or ""):
        return f"{word!r} belongs to no flag; separate the values of {flag} by commas."
    return f"{word!r} belongs to no flag: {flag} takes one value; put a value that has spaces in quotes."


def _config_path(arguments: Sequence[str]) -> Path | None:
    if "--config" not in arguments:
        return None
    place = list(arguments).index("--config") + 1
    if place >= len(arguments):
        raise MaskftError("--config needs the path of a YAML file.")
    return Path(arguments[place])


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "The file of --config")
    if not isinstance(content, dict):
        raise MaskftError(f"{path} must hold a YAML mapping of flags to values, got {type(content).__name__}.")
    return content


def _check_file(path: Path, dataclasses: Sequence[type]) -> None:
    """Refuse keys that are no flags, and values that a flag could not have."""
    hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    types = {f.name: hints[f.name] for kind in dataclasses for f in fields(kind) if f.init}
    for key, value in _read_mapping(path).items():
        if key == "env":
            continue
        if key not in types:
            _refuse_removed(f"{path}: `{key}`", str(key))
            raise MaskftError(f"{path}: unknown key {key!r}{nearest(str(key), list(types))}; correct or remove it.")
        _check_value(path, key, value, types[key])


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
_KIND_NAMES |= {dict: "a mapping", NoneType: "null"}


def _check_value(path: Path, key: str, value: object, hint: Any) -> None:
    """Refuse a value of another type than its flag's; text is parsed as that of a flag."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {get_origin(kind) or kind for kind in hints}
    wider: dict[type, set[type]] = {
        bool: {str},  # YAML reads no and off as one, and `no` is also a strategy
        int: {float, str, list},
        float: {str, list},
    }
    is_text = isinstance(value, str) and kinds - {NoneType} != {list}
    if is_text or kinds & ({type(value)} | wider.get(type(value), set())):
        return
    allowed = " or ".join(name for kind, name in _KIND_NAMES.items() if kind in kinds)
    raise MaskftError(f"{path}: `{key}` must be {allowed or 'left out'}, got {value!r}; correct or remove it.")


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    terminal = Console()
    if not terminal.is_terminal and "COLUMNS" not in os.environ:
        terminal.width = 240
    return terminal
