import argparse
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from maskft import cli
from maskft.errors import MaskftError
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings

TRAIN = [DataArguments, TrainingSettings, MaskArguments]
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]


def test_flags_win_over_the_file(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d.jsonl\ndensity: 0.8\nlearning_rate: 0.001\n")
    data, settings, mask = cli.parse("train", TRAIN, [f"--config={config}", "--density", "0.7"])
    assert (data.model_name_or_path, settings.learning_rate, mask.density) == ("m", 0.001, 0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_name_or_path is missing"),
        ([*NEEDED, "--densty", "0.5"], "Unknown flag --densty (nearest: density"),
        ([*NEEDED, "--density", "1.3"], "`density` must be in (0, 1], got 1.3"),
        ([*NEEDED, "--density", "much"], "invalid float value: 'much'"),
        ([*NEEDED, "--config", "missing.yaml"], "cannot be read: missing.yaml"),
        ([*NEEDED, "--config"], "--config: expected one argument"),
        ([*NEEDED, "--dtype", "int4"], "`dtype` must be 'auto', 'float32'"),
        (["--lr", "1"], "Unknown flag --lr (nearest: learning_rate, "),
        (["--model", "m"], "Unknown flag --model (nearest: model_name_or_path, "),
        (["--learning-rat", "1"], "Unknown flag --learning-rat (nearest: learning_rate, "),
        (["--dataset_name", "my", "rows"], "'rows' belongs to no flag: --dataset_name takes one value; "),
        ([*NEEDED, "--layers_to_transform", "4,5,6"], "invalid int value: '4,5,6'; separate values by spaces; "),
        ([*NEEDED, "--layers_to_transform", "4-7"], "invalid int value: '4-7'; separate values by spaces; "),
        ([*NEEDED, "--layers_to_transform", "-1"], "each at least 0 or null, got [-1]."),
        ([*NEEDED, "--preset", "recommended"], "which the preset 'recommended' has, needs the model before"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys, tmp_path) -> None:
    assert cli.main(["train", "--output_dir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskft train: error: ")
    assert message in error
    assert len(error) < 400
    assert not (tmp_path / "run").exists()


def test_a_word_before_all_flags_is_taken_for_the_model(capsys) -> None:
    assert cli.main(["train", "fft", *NEEDED]) == 2
    assert "'fft' belongs to no flag; name the model with --model_name_or_path." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("densty: 0.5\n", "unknown key 'densty' (nearest: density"),
        ("- a\n", "must hold a YAML mapping"),
        ("a: [", "no YAML"),
        ("5: 3\n", "unknown key 5"),
        ("help: true\n", "unknown key 'help'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("learning-rate: 1\n", "unknown key 'learning-rate' (nearest: learning_rate"),
        ("density: 0.9\nseed: 1\ndensity: 0.5\n", "the key 'density' stands in line 1 and in line 3"),
        ("learning_rate:\n", "`learning_rate` must be a number, got None"),
        ("overwrite_output_dir: [1]\n", "`overwrite_output_dir` must be true or false, got [1]"),
        ("target_modules: q_proj\n", "`target_modules` must be a list or null, got 'q_proj'"),
    ],
)
def test_a_bad_file_is_named(text, message, capsys, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert cli.main(["train", *NEEDED, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert str(config) in error
    assert message in error


@pytest.mark.parametrize(
    ("command", "flag", "instead"),
    [
        ("search", "full_sweep", "maskft search is one pass of gradients; "),
        ("train", "env", "set environment variables before the command."),
    ],
)
def test_a_flag_that_went_says_what_to_do_instead(command, flag, instead, capsys, tmp_path) -> None:
    assert cli.main([command, *NEEDED, f"--{flag.replace('_', '-')}", "3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"maskft {command}: error: --{flag.replace('_', '-')} is gone: {instead}")
    config = tmp_path / "c.yaml"
    config.write_text(f"{flag}: 3\n")
    assert cli.main([command, *NEEDED, "--config", str(config)]) == 2
    assert f"{config}: `{flag}` is gone: {instead}" in capsys.readouterr().err


def test_values_of_a_file_are_those_of_flags(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: no\nmax_length: null\nlearning_rate: 1e-4\n"
        "num_train_epochs: 2\nlr_scheduler_kwargs: {}\nlayers_to_transform: 1\nreport_to: []\n"
    )
    _, settings, mask = cli.parse("train", TRAIN, [*NEEDED, "--config", str(config)])
    assert (settings.eval_strategy, settings.save_strategy, settings.load_best_model_at_end) == ("no", "no", False)
    assert (settings.max_length, settings.learning_rate, settings.num_train_epochs) == (None, 1e-4, 2)
    assert cli.parse("train", TRAIN, NEEDED)[1].report_to == []
    assert (settings.lr_scheduler_kwargs, settings.report_to, mask.layers_to_transform) == ({}, [], [1])


@pytest.mark.parametrize("command", list(cli.commands()))
def test_every_flag_has_a_help_and_maskfts_own_come_first(command, capsys, monkeypatch) -> None:
    parsers = []
    print_help = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: parsers.append(self) or print_help(self))
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    (parser,) = parsers
    assert [a.dest for a in parser._actions if not a.help and not a.option_strings[0].startswith("--no_")] == []
    shown = capsys.readouterr().out
    assert "--output" in shown
    text = " ".join(shown.split())
    assert not re.search(r"Default: ((?!--|\(default).)*\(default: None\)", text)
    if command not in ("sft", "train", "crossfit", "restore", "search"):
        return
    share = "0.0" if command == "restore" else "0.03"
    assert f"a value below 1 is a share of all steps. (default: {share})" in text
    # A search has no checkpoints.
    assert ("auto: the newest complete checkpoint in --output_dir" in text) == (command != "search")
    last = "Flags of TRL and Transformers:"
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[-1] == last
    titles = [title for title in titles if title in ("Model and data:", "Mask:", "Training:")]
    assert titles == ["Model and data:", *(["Mask:"] if command != "sft" else []), "Training:"]
    own, inherited = shown.split(last)
    for flag in ("--model_name_or_path", "--learning_rate", "--eval_tasks"):
        assert f"\n  {flag} " in own
    for flag in ("--adam_beta1", "--packing", *(["--logging_steps"] if command != "restore" else [])):
        assert f"\n  {flag} " in inherited
        assert f"\n  {flag} " not in own


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"]])
def test_what_needs_no_model_imports_no_pytorch(arguments) -> None:
    code = (
        "import sys\nfrom maskft import cli\n"
        f"try: cli.main({arguments})\nexcept SystemExit: pass\n"
        "sys.exit('maskft.commands' not in sys.modules or bool({'torch', 'transformers', 'pydantic'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "maskft" in done.stdout + done.stderr or arguments == ["--version"]


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        ("crossfit", "--reference", "zero"),
        ("crossfit", "--overwrite_output_dir", "True"),
        ("restore", "--eval_strategy", "epoch"),
        ("restore", "--no_load_best_model_at_end", None),
        ("search", "--layers_to_transform", "1"),
        ("sft", "--low_memory", "True"),
    ],
)
def test_flags_that_a_command_sets_itself_are_not_in_its_help_and_refused(command, flag, value, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"{flag} " not in capsys.readouterr().out
    name = flag.replace("--no_", "--")
    told = f"maskft {command}: error: maskft {command} sets {name} itself, or has no use for it; leave it out.\n"
    assert cli.main([command, *NEEDED, flag, *filter(None, [value])]) == 2
    assert capsys.readouterr().err == told
    config = tmp_path / "c.yaml"
    config.write_text(f"{name[2:]}: {value or False}\n")
    assert cli.main([command, "--config", str(config)]) == 2
    assert capsys.readouterr().err == told


def test_an_error_of_a_study_is_a_status_other_than_0(monkeypatch, capsys) -> None:
    def fail(*arguments, **settings) -> None:
        raise MaskftError("2 of 2 runs failed.")

    monkeypatch.setattr("maskft_lab.study.run.run_study", fail)
    assert cli.main(["study", "--config", "study.yaml"]) == 2
    assert "2 of 2 runs failed." in capsys.readouterr().err


def test_tables_are_whole_where_there_is_no_terminal(monkeypatch, capsys) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.console().width > 200
    monkeypatch.setenv("COLUMNS", "90")
    assert cli.console().width == 90


@pytest.mark.parametrize(
    ("package", "extra", "given"),
    [
        ("reasoning_gym", "demo", ["demo"]),
        ("lm_eval", "eval", ["eval", "--models", "m", "--tasks", "nll:d.jsonl"]),
        ("lm_eval", "eval", ["train", *NEEDED, "--eval_tasks", "nll:d.jsonl"]),
        ("tensorboard", "log", ["train", *NEEDED, "--report_to", "tensorboard"]),
    ],
)
def test_a_package_that_is_missing_is_one_sentence_with_its_extra(package, extra, given, tiny_model, sums, tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"class Missing:\n    def find_spec(name, *_):\n        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing)\nreal = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *of: None if name == {package!r} else real(name, *of)\n"
        "from maskft.__main__ import run\nsys.exit(run())"
    )
    here = {"m": str(tiny_model), "d.jsonl": str(sums), "nll:d.jsonl": f"nll:{sums}"}
    arguments = [here.get(word, word) for word in given] + ["--output_dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"maskft {given[0]}: error: ")
    assert f"pip install 'maskft[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "named"), [("rich.console", "maskft"), ("torch", "maskft train")])
def test_ctrl_c_while_a_command_imports_is_one_sentence(module, named, tmp_path) -> None:
    code = (
        # As in a terminal: a shell's background job is started with SIGINT ignored.
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from maskft.__main__ import run\n"
        "class Interrupt:\n    def find_spec(name, *_):\n"
        f"        if name == {module!r}: sys.meta_path.remove(Interrupt); os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\nsys.exit(run())"
    )
    given = ["train", *NEEDED, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"{named}: stopped by Ctrl-C; nothing is kept.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_became_another_error_ends_a_command_all_the_same(monkeypatch, capsys) -> None:
    def fail(*arguments, **settings) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("A part of it could not be imported.") from None

    monkeypatch.setattr("maskft_lab.study.run.run_study", fail)
    assert cli.main(["study", "--config", "study.yaml"]) == 130
    assert capsys.readouterr().err == "maskft study: stopped by Ctrl-C; nothing is kept.\n"


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name", "--config", "--output_dir"])
def test_a_name_longer_than_any_files_is_refused(flag, capsys, tmp_path) -> None:
    given = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", str(tmp_path / "run")]
    assert cli.main(["sft", *given, flag, "x" * 5000]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskft sft: error: ")
    assert len(error) < 900
