"""Models that cannot be started from, each refused in one sentence before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from maskft.data.model_files import check_weights, load_model, weights_hash
from maskft.errors import MaskftError
from maskft.training.prepare import check_model


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_part(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    lose_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def become_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lose_tokenizer, "No tokenizer can be read from"),
        (lose_weights, "holds no weights"),
        (cut_weights, "model.safetensors is damaged or was cut short"),
        (lose_a_part, "lacks model-2.safetensors"),
        (break_the_index, "index.json names no files of weights"),
        (become_another_kind, "a model of the type 'vit', which Transformers cannot read as a causal language model"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(harm, told, tiny_model, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert check_model(str(folder), None) > 0
    harm(folder)
    with pytest.raises(MaskftError, match=told):
        check_model(str(folder), None)


def test_weights_of_other_shapes_are_refused(tiny_model, tmp_path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change_config(folder, hidden_size=64)
    with pytest.raises(MaskftError, match=r"have other shapes than its config.json says"):
        load_model(str(folder), "float32")


def test_a_folder_is_hashed_once_while_it_stays(tiny_model, tmp_path, monkeypatch) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = weights_hash(str(folder))
    opened: list[str] = []
    read = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **named: opened.append(self.name) or read(self, *args, **named)
    )
    assert weights_hash(str(folder)) == before == weights_hash(str(tiny_model))
    assert opened == ["model.safetensors"], "that of the other folder"
    change_config(folder, hidden_size=64)
    assert weights_hash(str(folder)) == before != weights_hash(str(folder), "config.json")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert weights_hash(str(folder)) != before


def test_the_weights_of_a_hub_model_are_not_looked_for() -> None:
    assert check_weights("owner/name") == []
