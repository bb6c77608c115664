"""The commands of the annex; see `maskft.commands`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from maskft.cli import console, parse
from maskft.commands import claimed


def demo(arguments: Sequence[str]) -> None:
    """Fine-tune a real small model, and give back what it forgot; no model hub needed."""
    from maskft.storage.lock import locked
    from maskft_lab.demo import run_demo

    parser = argparse.ArgumentParser(prog="maskft demo", description=demo.__doc__)
    parser.add_argument("--output_dir", default="runs/demo", help="Folder to write.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Write over an earlier demo.")
    given = parser.parse_args(arguments)
    with locked(given.output_dir, "demo"):
        run_demo(Path(given.output_dir), overwrite=given.overwrite_output_dir, console=console())


def study(arguments: Sequence[str]) -> None:
    """Compare methods on equal budgets over seeds."""
    from maskft_lab.study.run import run_study

    parser = argparse.ArgumentParser(prog="maskft study", description="Compare methods on equal budgets over seeds.")
    parser.add_argument("--config", required=True, help="The study's YAML file.")
    parser.add_argument("--output_dir", help="Folder of the runs. Default: runs/NAME. Started again, it goes on there.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    parser.add_argument("--dry_run", action="store_true", help="Print the plan, and stop.")
    given = parser.parse_args(arguments)
    run_study(given.config, given.output_dir, jobs=given.jobs, dry_run=given.dry_run, console=console())


def search(arguments: Sequence[str]) -> None:
    """Rank groups of layers by one pass of gradients, and write a config for maskft train."""
    from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings
    from maskft_lab.search import SearchArguments, run_search

    kinds = [DataArguments, MaskArguments, SearchArguments, TrainingSettings]
    refused = ["overwrite_output_dir", "layers_to_transform", "push_to_hub", "resume_from_checkpoint"]
    data, mask, search, settings = parse("search", kinds, arguments, refused=refused)
    with claimed("search", data, settings):
        run_search(data, settings, mask, search, console())


def landscape(arguments: Sequence[str]) -> None:
    """Draw the loss surface around a model and its masked version."""
    from maskft.storage.lock import locked
    from maskft_lab.landscape.run import LandscapeArguments, run_landscape

    (parsed,) = parse("landscape", [LandscapeArguments], arguments)
    with locked(parsed.output_dir, "landscape"):
        run_landscape(parsed, console())
