import pytest

from maskft import cli
from maskft.errors import MaskftError
from maskft.storage.yaml_file import read_yaml

LAUGHS = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &a [*a]\n", "values or 64 levels"),
        ("- &a {b: *a}\n", "values or 64 levels"),
        ("[" * 70 + "]" * 70, "64 levels"),
        ("[" * 10_000, "is no YAML"),
        ("seed: " + 5000 * "7", "digits"),
        *((f"a: !!{kind} {text}\n", "is no YAML") for kind, text in [("int", "''"), ("float", "''"), ("bool", "x")]),
        ("a: !!timestamp x\n", "is no YAML"),
        ("a: !!python/object:os.system x\n", "is no YAML"),
        ("x" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_what_stands_for_too_much_or_breaks_the_loader_is_refused(tmp_path, text, message) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(MaskftError, match=message):
        read_yaml(path, "The file")


def test_aliases_that_stand_for_little_are_read(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_yaml(tmp_path / "a.yaml", "The file") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        *(
            f"{key}: {value}\n"
            for key in ("density", "model_name_or_path", "model_init_kwargs", "target_modules")
            for value in (
                "0x" + 6000 * "f",
                "!!set {1, a}",
                "2001-01-01",
                "!!binary aGk=",
                "{2001-01-01: 1}",
                "{[1]: 2}",
                "[[[[[[1]]]]]]",
                "'" + "a" * 10_000 + "'",
                "{1: {2: {3: {4: {5: {6: 7}}}}}}",
            )
        ),
    ],
)
def test_a_config_of_any_values_ends_in_a_sentence(tmp_path, text, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    given = ["--config", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskft train: error: ")
    assert len(error) < 4500
