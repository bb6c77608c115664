import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from safetensors import SafetensorError

from maskft.errors import MaskftError
from maskft.storage.files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    default_cache_dir,
    disk_errors,
    require_empty_output,
    require_free_space,
    require_writable,
)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_model(folder: Path) -> None:
    (folder / "weights").write_bytes(b"12")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_bytes(b"3")


MODEL = ["sub", "sub/x", "weights"]


def write(final: Path, error: BaseException | None = None) -> None:
    with atomic_folder(final) as folder:
        (folder / "aaa").write_text("new")
        write_model(folder)
        if error is not None:
            raise error


def test_folder_appears_whole(tmp_path) -> None:
    final = tmp_path / "a" / "model"
    with atomic_folder(final) as folder:
        write_model(folder)
        assert not final.exists()
        assert folder.parent == final.parent
    assert names(final.parent) == ["model", *(f"model/{name}" for name in MODEL)]
    (tmp_path / "plain").mkdir()
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode, "ordinary permissions"


@pytest.fixture
def other_disk() -> Iterator[Path]:
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("held", [None, [], ["checkpoint-1"]])
def test_folder_behind_a_link_is_written_where_it_is(tmp_path, other_disk, held) -> None:
    real, link = other_disk / "real", tmp_path / "link"
    link.symlink_to(real)
    if held is not None:
        real.mkdir()
    for name in held or []:
        (real / name).mkdir()
    with atomic_folder(link) as folder:
        write_model(folder)
    assert link.is_symlink()
    assert names(real) == [*(held or []), *MODEL]
    assert names(tmp_path) == ["link"]


def test_relative_names_and_the_current_folder_can_be_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder(".") as folder:
        write_model(folder)
    assert names(Path.cwd()) == names(tmp_path) == MODEL
    atomic_write_text("a", "1")
    with atomic_folder("b") as folder:
        (folder / "c").write_text("2")
    assert names(tmp_path) == ["a", "b", "b/c", *MODEL]


@pytest.mark.parametrize(("name", "message"), [("sub", "a file is in the place"), ("weights", "a folder is in the")])
def test_file_in_the_place_of_a_folder_is_refused_before_anything_is_moved(tmp_path, name, message) -> None:
    (tmp_path / "aaa").write_text("old")
    (tmp_path / "sub").touch() if name == "sub" else (tmp_path / "weights").mkdir()
    before = names(tmp_path)
    with pytest.raises(MaskftError, match=message):
        write(tmp_path)
    assert names(tmp_path) == before
    assert (tmp_path / "aaa").read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_interrupted_folder_leaves_all_as_it_was(tmp_path, error) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_text("old")
    for name in ("model", "run"):
        with pytest.raises(type(error)):
            write(tmp_path / name, error)
    assert (tmp_path / "run" / "weights").read_text() == "old"
    assert names(tmp_path) == ["run", "run/weights"]


def test_folder_that_is_there_stays_and_keeps_its_files_and_gets_its_config_last(tmp_path, monkeypatch) -> None:
    # A mounted volume can be neither removed nor renamed, nor can a file be moved into it from beside it.
    final = tmp_path / "run"
    (final / "checkpoint-1").mkdir(parents=True)
    (final / "weights").write_text("old")
    before = final.stat().st_ino
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: moved.append(path.name) or replace(path, target))
    with atomic_folder(final) as folder:
        for name in ("adapter_config.json", "report.json", "tokenizer_config.json", "weights", "sub/vocab"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        assert (final / "weights").read_text() == "old"
        assert {path.name for path in final.iterdir()} == {"checkpoint-1", "weights", folder.name}
    assert final.stat().st_ino == before
    assert (final / "weights").read_text() == "new"
    assert names(final) == sorted(["checkpoint-1", "sub", "sub/vocab", *(name for name in moved if name != "vocab")])
    assert sorted(moved[:-2]) == ["tokenizer_config.json", "vocab", "weights"]
    assert moved[-2:] == ["adapter_config.json", "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "a file of that name exists; give another name"),
        ("loop", "a file of that name exists; give another name"),
        ("file/model", r"Cannot write .*file.model: a file is in the place of a folder; choose"),
    ],
)
def test_where_no_folder_can_be_is_refused(tmp_path, name, message) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "loop")
    with pytest.raises(MaskftError, match=message), atomic_folder(tmp_path / name):
        pass
    assert names(tmp_path) == ["back", "file", "loop"]


def test_files_are_written_and_replaced(tmp_path) -> None:
    atomic_write_text(tmp_path / "new" / "a.json", "ü")
    atomic_write_text(tmp_path / "new" / "a.json", "ß")
    atomic_write_bytes(tmp_path / "new" / "b", b"\x00\xff")
    assert (tmp_path / "new" / "a.json").read_bytes() == "ß".encode()
    assert (tmp_path / "new" / "b").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "new") == ["a.json", "b"]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space is left on the"), (errno.EROFS, "read-only"), (errno.EACCES, "permission is denied")],
)
def test_a_failed_write_keeps_the_old_file_and_leaves_no_folder(tmp_path, monkeypatch, code, message) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(MaskftError, match=rf"Cannot write .*report\.json: .*{message}"):
        atomic_write_text(path, "new")
    with pytest.raises(MaskftError, match=rf"Cannot write .*model: .*{message}"):
        write(tmp_path / "model")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EACCES, "Permission denied", "/root/x"), r"Cannot save it \(/root/x\): permission"),
        (OSError(errno.EDQUOT, "quota"), "quota is used up"),
        (OSError(errno.EIO, "Input/output error"), "the disk reports an error of its own"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left"),
        (SafetensorError('Read-only file system (os error 30) at path "/x"'), "read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4"), "no space"),
        (RuntimeError("[enforce fail at inline_container.cc:747] . strerror: Read-only file system"), "read-only"),
    ],
)
def test_disk_errors_are_explained(error, message) -> None:
    with pytest.raises(MaskftError, match=message), disk_errors("save it"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        SafetensorError("header too large"),
        RuntimeError("shape mismatch"),
        RuntimeError("[enforce fail at inline_container.cc] failed finding central directory"),
        ZeroDivisionError(),
    ],
)
def test_other_errors_pass_through(error) -> None:
    with pytest.raises(type(error)) as caught, disk_errors("save it"):
        raise error
    assert caught.value is error


def test_torch_save_to_a_folder_without_permission_is_explained(tmp_path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(MaskftError, match="permission is denied"), disk_errors("save it"):
        torch.save(torch.zeros(1), tmp_path / "x")


def test_used_output_is_refused_with_what_it_holds(tmp_path) -> None:
    require_empty_output(tmp_path / "absent", what="the merged model")
    with atomic_folder(tmp_path):  # what a killed run left does not count
        require_empty_output(tmp_path, what="the merged model")
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(MaskftError, match=r"for the run is not empty \(it holds checkpoint-10\): give") as caught:
        require_empty_output(tmp_path, what="the run", or_else="write over it with --overwrite_output_dir")
    assert str(caught.value).endswith("another --output_dir, or write over it with --overwrite_output_dir.")
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(MaskftError, match="holds a, b, c, checkpoint-10 and 3 more") as caught:
        require_empty_output(tmp_path, what="the merged model")
    assert str(caught.value).endswith("give another --output_dir.")
    with pytest.raises(MaskftError, match="is a file; give another --output_dir"):
        require_empty_output(tmp_path / "a", what="the run")


@pytest.mark.parametrize("behind_a_link", [False, True])
def test_free_space_is_asked_of_the_nearest_existing_parent(tmp_path, other_disk, monkeypatch, behind_a_link) -> None:
    target, expected = tmp_path / "a" / "b", tmp_path
    if behind_a_link:
        (tmp_path / "link").symlink_to(other_disk / "absent")
        target, expected = tmp_path / "link", other_disk
    disk_usage = Mock(return_value=Mock(free=1_500_000_000))
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_free_space(target, 1_500_000_000, "the merged model")
    with pytest.raises(MaskftError, match=rf"model to .*{target.name} needs 2\.50 GB but the disk has 1\.50 GB"):
        require_free_space(target, 2_500_000_000, "the merged model")
    assert disk_usage.mock_calls == [call(expected), call(expected)]


def test_a_place_where_no_folder_can_be_written_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run/deep"):
        with pytest.raises(MaskftError, match=r"cannot be made: .*file is a file; give another"):
            require_writable(tmp_path / place)
    require_writable(tmp_path / "new" / "run")
    require_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    refusal = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=refusal))
    with pytest.raises(MaskftError, match=r"Cannot write to the output folder .*new.*read-only"):
        require_writable(tmp_path / "new")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MASKFT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MASKFT_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "maskft"
