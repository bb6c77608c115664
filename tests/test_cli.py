import pytest

from maskft import cli
from maskft.training.arguments import DataArguments, MaskArguments, TrainingSettings

TRAIN = [DataArguments, TrainingSettings, MaskArguments]
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]


def test_flags_win_over_the_file(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d.jsonl\ndensity: 0.8\nlearning_rate: 0.001\n")
    data, settings, mask = cli.parse("train", TRAIN, ["--config", str(config), "--density", "0.7"])
    assert (data.model_name_or_path, settings.learning_rate, mask.density) == ("m", 0.001, 0.7)
    data, settings, mask = cli.parse("train", TRAIN, [f"--config={config}", "--density=0.7"])
    assert (data.model_name_or_path, settings.learning_rate, mask.density) == ("m", 0.001, 0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_name_or_path is missing"),
        ([*NEEDED, "--densty", "0.5"], "Unknown flag --densty (nearest: density"),
        ([*NEEDED, "--density", "1.3"], "`density` must be in (0, 1], got 1.3"),
        ([*NEEDED, "--density", "much"], "invalid float value: 'much'"),
        ([*NEEDED, "--config", "missing.yaml"], "cannot be read: missing.yaml"),
        ([*NEEDED, "--config=missing.yaml"], "cannot be read: missing.yaml"),
        ([*NEEDED, "--config"], "--config needs the path"),
        ([*NEEDED, "--dtype", "int4"], "`dtype` must be float32"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys, tmp_path) -> None:
    assert cli.main(["train", "--output_dir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskft train: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("densty: 0.5\n", "unknown key 'densty' (nearest: density"),
        ("- a\n", "must hold a YAML mapping"),
        ("a: [", "no YAML"),
    ],
)
def test_a_bad_file_is_named(text, message, capsys, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert cli.main(["train", *NEEDED, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert str(config) in error
    assert message in error


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_lists_the_flags(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert "--output" in capsys.readouterr().out
