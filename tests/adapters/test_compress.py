import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import load, logits, make_model, save_base_and_adapter

from maskft import MaskConfig, cli
from maskft.adapters.compress import compress_adapter
from maskft.adapters.merge import merge_checkpoint
from maskft.adapters.read import read_adapter
from maskft.errors import MaskftError


def test_peft_loads_a_compressed_adapter_like_any_other(tmp_path, capsys) -> None:
    base, folder, model = save_base_and_adapter(tmp_path, make_model(), MaskConfig())
    arguments = ["--adapter_name_or_path", str(folder), "--output_dir", str(tmp_path / "small")]
    assert cli.main(["compress", *arguments]) == 0
    assert "bits a weight" in capsys.readouterr().out
    plain, small = read_adapter(folder), read_adapter(tmp_path / "small")
    assert all(torch.equal(plain.masks[name], small.masks[name]) for name in plain.masks | small.masks)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base), tmp_path / "small")), logits(model))

    # One word less than was coded.
    file = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key][:-4].clone()}, file)
    with pytest.raises(MaskftError, match="is damaged or cut short"):
        read_adapter(tmp_path / "small")
    with pytest.raises(MaskftError, match="is damaged or cut short"):
        PeftModel.from_pretrained(make_model(), tmp_path / "small")
    # A training checkpoint.
    get_peft_model(make_model(), MaskConfig(save_scores=True)).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(MaskftError, match="training checkpoint"):
        compress_adapter(tmp_path / "checkpoint", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_from_outside_is_not_taken_along(tmp_path) -> None:
    base, folder, _ = save_base_and_adapter(tmp_path, make_model(), MaskConfig())
    (tmp_path / "secret.txt").write_text("secret")
    for harmed, write in ((folder, compress_adapter), (base, merge_checkpoint)):
        link = harmed / "notes.txt"
        link.symlink_to(tmp_path / "secret.txt")
        with pytest.raises(MaskftError, match=r"notes\.txt is a link to .*secret\.txt, outside its folder"):
            write(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        link.unlink()
        link.symlink_to(harmed / "adapter_config.json" if harmed == folder else harmed / "config.json")
    compress_adapter(folder, tmp_path / "small")
    assert (tmp_path / "small" / "notes.txt").read_text() == (folder / "adapter_config.json").read_text()
    # A snapshot in a hub's cache.
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "hub" / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    compress_adapter(snapshot, tmp_path / "of-snapshot")
    assert not (tmp_path / "of-snapshot" / "adapter_config.json").is_symlink()
