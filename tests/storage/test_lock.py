import errno
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from maskft.cli import main
from maskft.errors import MaskftError
from maskft.storage.files import require_empty_output
from maskft.storage.lock import kept, locked
from maskft.training.resume import resolve_checkpoint

HOLD = "import sys, time\nfrom maskft.storage.lock import locked\n"
HOLD += "with locked(sys.argv[1], 'train'):\n    print(flush=True)\n    time.sleep(600)"


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that has the lock on tmp_path/run."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_process_is_told_who_is_at_work_and_a_dead_one_holds_nothing(holder, tmp_path) -> None:
    since = r"since \d{4}-\d\d-\d\d [\d:+-]+"
    who = rf"^maskft train \(pid {holder.pid} on {socket.gethostname()}, {since}\) is at work on "
    for name in ("run", "there/../run"):
        with pytest.raises(MaskftError, match=who), locked(tmp_path / name, "eval"):
            pass
    with locked(tmp_path / "other", "eval"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run", "eval"):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []  # neither a lock nor the folder


TRAINING = "--model_name_or_path none --dataset_name none.jsonl"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        *((command, TRAINING) for command in ("sft", "train", "crossfit")),
        ("restore", f"{TRAINING} --reference_model_name_or_path no --retain_dataset_name no"),
        ("eval", "--models m --tasks nll:d"),
        ("merge", "--adapter_name_or_path a"),
        ("compress", "--adapter_name_or_path a"),
        ("demo", ""),
        ("search", TRAINING),
        ("landscape", TRAINING),
        ("study", "--config CONFIG"),
    ],
)
def test_each_command_takes_the_lock_before_it_looks_at_the_model(
    command, flags, holder, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "study.yaml"
    config.write_text(
        "{name: s, seeds: [1], models: {m: m}, methods: {fft: null},"
        " domains: {d: {dataset_name: a.jsonl, test_dataset_name: b.jsonl}}}"
    )
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    given = [command, *flags.replace("CONFIG", str(config)).split(), "--output_dir", str(tmp_path / "run")]
    assert main(given) == 2
    assert f"pid {holder.pid} on" in capsys.readouterr().err
    if command in ("sft", "train", "crossfit", "restore"):
        assert main([*given, "--dry_run", "True"]) == 2  # which writes nothing
        assert "is at work" not in capsys.readouterr().err


def test_of_several_processes_the_first_takes_the_lock(holder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run", "train", by_first_rank=True):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MaskftError, match="at work"), locked(tmp_path / "run", "train", by_first_rank=True):
        pass


def test_a_disk_without_locks_is_told_of_once(tmp_path, monkeypatch, caplog) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "run", "train"):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        f"The disk of {tmp_path / 'run'} has no locks (No locks available): see to it that no other process writes "
        "there."
    ]


def test_where_nothing_can_be_written_beside_the_folder_the_lock_lies_in_it(tmp_path, monkeypatch) -> None:
    acquire = filelock.FileLock.acquire

    def refuse(self: filelock.FileLock) -> object:
        if Path(self.lock_file).parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return acquire(self)

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder, "merge"):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        require_empty_output(folder, what="a model")
        assert resolve_checkpoint("auto", folder) is None
        with pytest.raises(MaskftError, match=r"^maskft merge .* is at work"), locked(folder, "train"):
            pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.symlink_to(path.with_name("precious")), r"\.run\.lock\): a link is in the place of a file"),
        (Path.mkdir, r"\.run\.lock\): a folder is in the place of a file"),
    ],
)
def test_what_is_no_lock_is_neither_written_through_nor_waited_for(tmp_path, harm, message) -> None:
    (tmp_path / "precious").write_text("precious")
    harm(tmp_path / ".run.lock")
    with pytest.raises(MaskftError, match=message), locked(tmp_path / "run", "train"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_folders_made_for_the_lock_go_again_and_an_error_keeps_its_words(tmp_path) -> None:
    with pytest.raises(ValueError, match="of its own"), locked(tmp_path / "a" / "b" / "run", "train"):
        raise ValueError("of its own")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MaskftError, match="is a file; give another"), locked(Path(__file__) / "run", "train"):
        pass


def test_what_a_killed_process_left_is_removed_but_not_what_another_may_be_writing(tmp_path) -> None:
    folder, mark = tmp_path / "run", "0123456789ab.partial"
    stale = [tmp_path / f".run.{mark}", folder / f".model.{mark}", folder / "m" / "t" / f".samples.jsonl.{mark}"]
    others = [tmp_path / f".other.{mark}", folder / "a" / f".model.{mark}", folder / f".a.{mark}"]
    others += [folder / "a" / "b" / f".x.{mark}", folder / ".user.partial", folder / "x.partial"]
    for path in (*stale, *others):
        path.mkdir(parents=True)
        (path / "weights").write_text("w")
    (folder / ".a.lock").write_text("")  # a command that has folder/a
    with locked(folder, "train"):
        assert [path for path in stale if path.exists()] == []
        assert [path for path in others if not path.exists()] == []
        stale[0].mkdir()
        stale[1].write_text("")
    assert [path for path in stale if path.exists()] == []


def test_a_lock_that_is_given_up_while_another_opens_it_is_had_by_one(tmp_path) -> None:
    """Four processes count in one file; two at once would lose counts."""
    code = HOLD.partition("with")[0] + (
        "from pathlib import Path\nfrom maskft.storage.lock import locked\npath = Path(sys.argv[1] + '.txt')\n"
        "for _ in range(10):\n    with locked(sys.argv[1], 'x', waits=True):\n"
        "        number = int(path.read_text()); time.sleep(0.001); path.write_text(str(number + 1))"
    )
    (tmp_path / "run.txt").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "run.txt").read_text() == "40"


def test_what_is_kept_is_counted(tmp_path) -> None:
    assert kept(tmp_path) == "nothing is kept"
    for name in ("m/t/samples.jsonl", "m/u/answers.jsonl", "fold-1/mask/report.json", "model/report.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n2\n")
    assert kept(tmp_path) == (
        f"kept in {tmp_path}: 1 fine-tuning, 2 folds, 1 finished task, 2 answers; the same command goes on"
    )
    for step in (8, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 12:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert kept(tmp_path).startswith(f"kept in {tmp_path}: checkpoint-10, 1 fine-tuning")
    assert kept(tmp_path).endswith("--resume_from_checkpoint auto goes on")
    (tmp_path / "report.json").write_text("{}")  # a signal that came once all was done
    assert kept(tmp_path).startswith(f"kept in {tmp_path}: a result, checkpoint-10, 1 fine-tuning")


def test_a_holder_that_has_not_written_who_it_is(tmp_path) -> None:
    with locked(tmp_path / "run", "train"):
        (tmp_path / ".run.lock").write_text("")
        with pytest.raises(MaskftError, match=r"^Another process is at work on "), locked(tmp_path / "run", "train"):
            pass
