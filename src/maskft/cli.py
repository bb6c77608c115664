"""The command `maskft`: parses, and calls the function of the same name."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rich.console import Console

from maskft import __version__
from maskft.errors import MaskftError
from maskft.yaml_file import read_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or that of the error (`maskft.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("maskft").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="maskft", description="Learn which weights of a language model to leave out.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, description) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    try:
        COMMANDS[command][0](arguments[1:])
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

    from maskft.tuner.config import nearest

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
            near = nearest(flag.removeprefix("--").replace("-", "_"), names)
            raise MaskftError(f"Unknown flag {flag}{near}; `maskft {command} --help` lists all.")
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
    from maskft.tuner.config import nearest

    hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    types = {f.name: hints[f.name] for kind in dataclasses for f in fields(kind) if f.init}
    for key, value in _read_mapping(path).items():
        if key == "env":
            continue
        if key not in types:
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


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 240
    return console


def _sft(arguments: Sequence[str]) -> None:
    from maskft.training.arguments import DataArguments, TrainingSettings
    from maskft.training.run import run_sft

    refused = ["low_memory", "temperature_scaling"]
    run_sft(*parse("sft", [DataArguments, TrainingSettings], arguments, refused=refused))


def _train(arguments: Sequence[str]) -> None:
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments, TrainingSettings
    from maskft.training.run import run_train

    kinds = [DataArguments, TrainingSettings, MaskArguments, GuardArguments]
    data, settings, mask, guard = parse("train", kinds, arguments)
    run_train(data, settings, mask.config(), require_gain=guard.require_gain)


def _crossfit(arguments: Sequence[str]) -> None:
    from maskft.training.arguments import DataArguments, GuardArguments, MaskArguments, TrainingSettings
    from maskft.training.crossfit import CrossFitArguments, run_crossfit

    kinds = [DataArguments, TrainingSettings, MaskArguments, CrossFitArguments, GuardArguments]
    refused = ["overwrite_output_dir", "low_memory", "deepspeed", "preset"]
    refused += ["reference", "reference_model_name_or_path"]
    data, settings, mask, cross, guard = parse("crossfit", kinds, arguments, refused=refused)
    run_crossfit(data, settings, mask, cross, require_gain=guard.require_gain)


def _eval(arguments: Sequence[str]) -> None:
    from maskft.evaluation.arguments import EvalArguments
    from maskft.evaluation.runner import run_eval

    (parsed,) = parse("eval", [EvalArguments], arguments)
    run_eval(parsed, _console())


def _merge(arguments: Sequence[str]) -> None:
    from maskft.checkpoints.merge import merge_checkpoint

    parser = argparse.ArgumentParser(prog="maskft merge", description="Fold a mask into a plain checkpoint.")
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--model_name_or_path", help="Folder of the base model. Default: the one the adapter names.")
    parser.add_argument(
        "--reference_model_name_or_path",
        help="Folder of the model before fine-tuning, for masks of reference='pretrained'. Default: the adapter's.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write; it must be new or empty.")
    parser.add_argument("--force", action="store_true", help="Merge into a base whose fingerprint differs.")
    given = parser.parse_args(arguments)
    merge_checkpoint(
        given.adapter_name_or_path,
        given.output_dir,
        model_name_or_path=given.model_name_or_path,
        reference_model_name_or_path=given.reference_model_name_or_path,
        force=given.force,
    )
    _console().print(f"Wrote {given.output_dir}", highlight=False)


def _compress(arguments: Sequence[str]) -> None:
    from maskft.checkpoints.adapter import compress_adapter

    parser = argparse.ArgumentParser(prog="maskft compress", description="Code an adapter's masks to their entropy.")
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; it must be new or empty.")
    given = parser.parse_args(arguments)
    bits = compress_adapter(given.adapter_name_or_path, given.output_dir)
    _console().print(f"Wrote {given.output_dir}: {bits:.4f} bits a weight", highlight=False)


def _inspect(arguments: Sequence[str]) -> None:
    from maskft.checkpoints.inspect import draw_heat_map, inspect_adapter, render

    parser = argparse.ArgumentParser(prog="maskft inspect", description="Show what an adapter holds.")
    parser.add_argument("--adapter_name_or_path", required=True, help="Folder of the adapter.")
    parser.add_argument("--output_file", help="Picture of the kept share by layer and module, as kept.png.")
    given = parser.parse_args(arguments)
    summary = inspect_adapter(given.adapter_name_or_path)
    _console().print(render(summary))
    if given.output_file:
        draw_heat_map(summary, Path(given.output_file))
        _console().print(f"Wrote {given.output_file}", highlight=False)


def _demo(arguments: Sequence[str]) -> None:
    from maskft.demo.run import run_demo

    parser = argparse.ArgumentParser(prog="maskft demo", description="The whole story on a real small model.")
    parser.add_argument("--output_dir", default="runs/demo", help="Folder to write.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Write over an earlier demo.")
    given = parser.parse_args(arguments)
    run_demo(Path(given.output_dir), overwrite=given.overwrite_output_dir, console=_console())


def _study(arguments: Sequence[str]) -> None:
    from maskft.studies.study import run_study

    parser = argparse.ArgumentParser(prog="maskft study", description="Compare methods on equal budgets over seeds.")
    parser.add_argument("--config", required=True, help="The study's YAML file.")
    parser.add_argument("--output_dir", help="Folder of the runs. Default: runs/NAME. Started again, it goes on there.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    parser.add_argument("--dry_run", action="store_true", help="Print the plan with its time and disk, and stop.")
    given = parser.parse_args(arguments)
    run_study(given.config, given.output_dir, jobs=given.jobs, dry_run=given.dry_run, console=_console())


def _search(arguments: Sequence[str]) -> None:
    from maskft.studies.search import SearchArguments, run_search
    from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings

    kinds = [DataArguments, TrainingSettings, MaskArguments, SearchArguments]
    refused = ["overwrite_output_dir", "layers_to_transform"]
    data, settings, mask, search = parse("search", kinds, arguments, refused=refused)
    run_search(data, settings, mask, search, _console())


def _landscape(arguments: Sequence[str]) -> None:
    from maskft.studies.landscape import LandscapeArguments, run_landscape

    (parsed,) = parse("landscape", [LandscapeArguments], arguments)
    run_landscape(parsed, _console())


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "demo": (_demo, "the whole story on a real small model, no model hub needed"),
    "sft": (_sft, "fine-tune every weight of a model"),
    "train": (_train, "learn a mask over a fine-tuned model"),
    "crossfit": (_crossfit, "fine-tune, and learn a mask of the change on rows it has not seen"),
    "eval": (_eval, "score models and adapters on tasks, with paired differences"),
    "merge": (_merge, "fold a mask into a plain checkpoint"),
    "compress": (_compress, "code an adapter's masks to about their entropy"),
    "inspect": (_inspect, "show what an adapter holds"),
    "study": (_study, "compare methods on equal budgets over seeds"),
    "search": (_search, "choose layers and density on validation, and train the winner"),
    "landscape": (_landscape, "draw the loss surface around a model and its masked version"),
}


if __name__ == "__main__":
    sys.exit(main())
