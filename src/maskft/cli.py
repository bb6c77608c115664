"""The command `maskft`: parses, and calls the function of the same name."""

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from maskft import __version__
from maskft.errors import MaskftError, nearest, short_repr
from maskft.storage.interrupts import HELD, NAMES, stoppable
from maskft.storage.yaml_file import read_yaml
from maskft.terminal import PlainConsole, print_plainly

# Flags that version 0.2 took away, without their hyphens, and what to do instead: refused for one release, as is a key
# of the same name in the file of --config.
REMOVED_FLAGS: dict[str, str] = {
    "env": "set environment variables before the command.",
    **dict.fromkeys(
        ("densities", "num_candidates", "short_run_share", "full_sweep"),
        "maskft search is one pass of gradients; train the layers it ranks first with maskft train --config.",
    ),
    "points_per_pass": "maskft landscape measures one point in each pass; leave it out.",
}

_MAX_MESSAGE = 4000  # characters; a file may hold names of any length
# Packages that a command may import, by the extra that installs them.
_EXTRAS = {"constriction": "compress", "gguf": "demo", "reasoning_gym": "demo"}
_EXTRAS |= dict.fromkeys(("langdetect", "lm_eval", "nltk", "punkt"), "eval")


def commands() -> dict[str, EntryPoint]:
    """The commands by name: entry points of the group `maskft.commands`, those of other packages among them."""
    return {point.name: point for point in sorted(entry_points(group="maskft.commands"), key=lambda p: p.name)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or that of the error (`maskft.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    print_plainly()
    # Names that these libraries call deprecated are used by themselves; nobody who runs a command can change them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\.")
    for package in ("maskft", "maskft_lab"):
        logging.getLogger(package).setLevel(logging.INFO)
    points = commands()
    if not points:
        sys.exit("maskft: error: no command is registered; install the package again.")
    parser = argparse.ArgumentParser(prog="maskft", description="Learn which weights of a language model to leave out.")
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # The modules of commands import nothing heavy: PyTorch alone would take seconds (issue 28).
    for name, point in points.items():
        choices.add_parser(name, help=(point.load().__doc__ or "").strip().rstrip("."), add_help=False)
    command = parser.parse_args(arguments[:1]).command
    failure: MaskftError | None = None
    with stoppable() as stop:
        try:
            points[command].load()(arguments[1:])
            return 0
        except MaskftError as error:
            failure = error
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
                failure = MaskftError(f"{error}; run `pip install 'maskft[{_EXTRAS[error.name]}]'`, which brings it.")
            elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                failure = MaskftError(f"The name {short_repr(error.filename)} is too long for a file; correct it.")
            elif not stop.number:
                raise
        stop.has_ended = True
        if stop.number or failure is None:  # what the error held is gone by now: progress bars write when they go
            return _stopped(command, stop.number)
        message = re.sub(r"(\S{200})\S{200,}", r"\1...", str(failure))[:_MAX_MESSAGE]
        _tell(f"maskft {command}: error: {message}")
        return failure.exit_status


def _stopped(command: str, number: int) -> int:
    """Say what a command that a signal has ended leaves; its exit status."""
    left = "nothing is kept"
    if HELD:
        from maskft.storage.lock import kept

        left = kept(HELD[0])
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # after a progress bar, and ^C
    if os.environ.get("RANK", "0") == "0":  # the first of several processes speaks for all
        _tell(f"maskft {command}: stopped by {NAMES[number]}; {left}.")
    return 128 + number


def _tell(sentence: str) -> None:
    PlainConsole(stderr=True, soft_wrap=True).print(sentence)


def parse(
    command: str, dataclasses: Sequence[type], arguments: Sequence[str], *, refused: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Flags, and the same keys from the YAML file of `--config`, as dataclasses; flags win.

    Args:
        refused: flags of the dataclasses that the command sets itself or has no use for; its help leaves them out.

    Raises:
        MaskftError: an unknown or refused flag or key, a value of the wrong type, or a file that is no mapping.
    """
    parser = _parser(command, dataclasses, refused)
    try:
        given, stray = parser.parse_known_args(arguments)
        if stray:
            raise MaskftError(_stray_message(stray[0], arguments, parser))
        words = {word.partition("=")[0] for word in arguments}
        named = {action.dest for action in parser._actions if words.intersection(action.option_strings)}
        if given.config is not None:
            in_file = _read_config(Path(given.config), dataclasses)
            parser.set_defaults(**in_file)
            named |= in_file.keys()
        for name in sorted(named.intersection(refused)):
            raise MaskftError(f"maskft {command} sets --{name} itself, or has no use for it; leave it out.")
        parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    except MaskftError:
        raise
    except argparse.ArgumentError as error:
        flag = str(error.argument_name).partition("/")[0]
        is_list = parser._option_string_actions[flag].nargs == "+"
        hint = "separate values by spaces; " if is_list else ""
        raise MaskftError(f"{flag}: {error.message}; {hint}`{parser.prog} --help` says what is allowed.") from error
    except ValueError as error:
        raise MaskftError(f"{error}; `{parser.prog} --help` says what is allowed.") from error
    return parsed[: len(dataclasses)]


def _parser(command: str, dataclasses: Sequence[type], refused: Sequence[str]) -> Any:
    """A parser whose help shows maskft's own flags in their groups, and what libraries declare at the end."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        list(dataclasses),
        prog=f"maskft {command}",
        usage=f"maskft {command} [--config FILE] [--FLAG VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", help="YAML file with the same keys as the flags; flags win.")
    of_libraries = parser.add_argument_group("Flags of TRL and Transformers")
    for kind in dataclasses:
        ours = [base for base in kind.__mro__ if base.__module__.startswith("maskft")]
        own = list(dict.fromkeys(name for base in ours for name in base.__annotations__))
        inherited = {f.name for f in fields(kind)}.difference(own)
        for group in parser._action_groups[:-1]:
            of_libraries._group_actions += [a for a in group._group_actions if a.dest in inherited]
            group._group_actions = [a for a in group._group_actions if a.dest not in inherited]
            group._group_actions.sort(key=lambda a: own.index(a.dest) if a.dest in own else -1)
    for action in parser._actions:
        if action.dest in refused:
            action.help = argparse.SUPPRESS
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults other than None; leaves out each flag's form with hyphens."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        forms = [form for form in action.option_strings if "-" not in form.lstrip("-")]
        return f"{', '.join(forms)} {self._format_args(action, self._get_default_metavar_for_optional(action))}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _stray_message(word: str, arguments: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to do about a flag that does not exist, or a word that no flag takes."""
    # Each flag is known with hyphens too, and named without.
    names = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    if word.startswith("--"):
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        _refuse_removed(flag, name)
        return f"Unknown flag {flag}{nearest(name, names)}; `{parser.prog} --help` lists all."
    before = [a.partition("=")[0] for a in arguments[: list(arguments).index(word)] if a.startswith("--")]
    if not before:
        model = next(name for name in names if name.startswith("model"))
        return f"{word!r} belongs to no flag; name the model with --{model}."
    if "comma-separated" in (parser._option_string_actions[before[-1]].help or ""):
        return f"{word!r} belongs to no flag; separate the values of {before[-1]} by commas."
    return f"{word!r} belongs to no flag: {before[-1]} takes one value; put a value that has spaces in quotes."


def _refuse_removed(given: str, name: str) -> None:
    if name in REMOVED_FLAGS:
        raise MaskftError(f"{given} is gone: {REMOVED_FLAGS[name]}")


def _read_config(path: Path, dataclasses: Sequence[type]) -> dict[str, Any]:
    """The values of a YAML file, each of a type that its flag could have."""
    from maskft.values import check_values

    content = read_yaml(path, "The file of --config")
    if not isinstance(content, dict):
        raise MaskftError(f"{path} must hold a YAML mapping of flags to values, got {type(content).__name__}.")
    for key in content:
        _refuse_removed(f"{path}: `{key}`", str(key))
    types = {f.name: get_type_hints(kind)[f.name] for kind in dataclasses for f in fields(kind) if f.init}
    return check_values({key: _as_flag(value, types.get(key)) for key, value in content.items()}, types, str(path))


def _as_flag(value: Any, hint: Any) -> Any:
    kinds = {get_origin(kind) or kind for kind in (get_args(hint) or (hint,))}
    if value is False and str in kinds and bool not in kinds:
        return "no"  # which YAML reads as False, and is a strategy
    return [value] if type(value) is int and list in kinds and int not in kinds else value


def console() -> PlainConsole:
    """Standard output; where it is no terminal, wide enough for every table."""
    terminal = PlainConsole()
    if not terminal.is_terminal and "COLUMNS" not in os.environ:
        terminal.width = 240
    return terminal
