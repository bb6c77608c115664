"""What runs inside the sandbox: a judge, which holds the tests, and the program, which never does.

`sandbox.py` hands this file's text to `python -c`; it uses the standard library alone, since there may be nothing else.
The program's process is forked before the tests are read, and the kernel lets it look into nothing of the judge's. The
tests call its functions over a pipe: plain values go there and come back, by value and of bounded size, and the judge
compares them. What cannot be asked so ends the judgement there, whatever exceptions the tests catch.
"""

import builtins
import ctypes
import errno
import importlib
import json
import os
import select
import struct
import symtable
import sys
import threading
from collections.abc import Callable
from io import BufferedReader, BufferedWriter
from types import ModuleType, NoneType
from typing import Any, NoReturn

NOT_PLAIN = "More than plain values: "
_SCALARS = (NoneType, bool, int, float, str)
_MAKERS: dict[str, Callable[[Any], Any]] = {each.__name__: each for each in (bytes, list, tuple, set, frozenset, dict)}
_MAKERS |= {"complex": lambda parts: complex(*parts), "int": lambda digits: int(digits[0], 16)}
_KINDS = (*_SCALARS, complex, bytes, list, tuple, set, frozenset, dict)
_MOST_BYTES, _MOST_DEPTH, _MOST_FILES = 2**24, 100, 4096
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 22, 2
# By Linux's tables: AUDIT_ARCH; clone; calls for memory that no process's size shows (memfd_create, memfd_secret,
# shmget, semget, msgget), for namespaces (unshare, setns, clone3), for keys (add_key, request_key, keyctl), and for
# sockets, which by path or VSOCK reach out of a network's namespace (socket, io_uring_setup).
CALLS = {
    "x86_64": (0xC000003E, 56, 319, 447, 29, 64, 68, 272, 308, 435, 248, 249, 250, 41, 425),
    "aarch64": (0xC00000B7, 220, 279, 447, 194, 190, 186, 97, 268, 435, 217, 218, 219, 198, 425),
}
_NEW_NAMESPACES = 0x7E020000  # clone's flags CLONE_NEW*


class _NotPlain(Exception):
    pass


def _prctl(option: int, *values: int) -> None:
    if ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (*values, 0, 0, 0)[:4])):
        raise OSError("the kernel does not let the judge shut itself off")


def _forbid_calls() -> None:
    """Have the kernel answer those calls, and all of another architecture's, with ENOSYS, here and in all children."""
    arch, clone, *forbidden = CALLS[os.uname().machine]
    load, equal, at_least, any_bit = 0x20, 0x15, 0x35, 0x45  # from seccomp_data: call at 0, arch at 4, argument at 16
    deny, allow = (0x06, 0, 0, 0x50000 | errno.ENOSYS), (0x06, 0, 0, 0x7FFF0000)
    rules = [(load, 0, 0, 4), (equal, 1, 0, arch), deny, (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), deny]
    for number in forbidden:
        rules += [(equal, 0, 1, number), deny]
    rules += [(equal, 1, 0, clone), allow, (load, 0, 0, 16), (any_bit, 0, 1, _NEW_NAMESPACES), deny, allow]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    header = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def pack(value: Any, is_kind: Callable[[Any, type], bool] = isinstance) -> Any:
    """A plain value in JSON, its subclasses as what they extend unless `is_kind` is stricter; _NotPlain else."""
    if type(value) in _SCALARS and (type(value) is not int or value.bit_length() <= 4096):
        return value
    if type(value).__module__ == "numpy" and value.shape == ():
        value = value.item()
    kind = next((each for each in _KINDS if is_kind(value, each)), None)
    if kind is None:
        raise _NotPlain(type(value).__name__)
    if kind is int and value.bit_length() > 4096:
        return ["int", hex(value)]  # JSON's numbers are decimal, of which Python reads no more than 4,300 digits
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in _SCALARS:
        return value
    return [kind.__name__, *[pack(each, is_kind) for each in (value.items() if kind is dict else value)]]


def unpack(data: Any, depth: int = 0) -> Any:
    """The value that `pack` wrote, of exact types; ValueError, TypeError or LookupError for anything else."""
    if type(data) is not list:
        if type(data) in _SCALARS:
            return data
        raise TypeError
    if depth > _MOST_DEPTH:
        raise ValueError
    return _MAKERS[data[0]]([unpack(each, depth + 1) for each in data[1:]])


def as_line(value: Any, is_kind: Callable[[Any, type], bool] = isinstance) -> bytes:
    return json.dumps(pack(value, is_kind), ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def _serve(requests: BufferedReader, answers: BufferedWriter) -> NoReturn:
    """Run the program, then its functions as they are asked for; the first answer says which names it defined."""
    own = os.getpid()
    namespace: dict[str, Any] = {"__name__": "__main__"}

    def run(call: list[Any]) -> Any:
        if len(call) > 1:
            name, arguments, named = call
            return namespace[name](*arguments, **named)
        exec(compile(call[0], "<program>", "exec"), namespace)
        return {name: isinstance(value, ModuleType) for name, value in namespace.items()}

    for line in requests:
        try:
            answer = as_line(("value", run(unpack(json.loads(line))), ""))
        except _NotPlain as error:
            answer = as_line(("not plain", str(error), ""))
        except BaseException as error:
            kind = next(each for each in type(error).__mro__ if each.__module__ == "builtins")
            answer = as_line(("raised", kind.__name__, str(error)[:500]))
        if os.getpid() != own:  # a forked child that comes out of the program must not speak for it
            break
        answers.write(answer)
        answers.flush()
    os._exit(0)


class _Judge:
    def __init__(self, verdicts: int, requests: BufferedWriter, answers: BufferedReader) -> None:
        self.verdicts, self.requests, self.answers = verdicts, requests, answers

    def end(self, verdict: str) -> NoReturn:
        """Say it and be gone, so that no `except` of the tests' can go on from here."""
        try:
            os.write(self.verdicts, verdict.encode(errors="replace"))
        finally:
            os._exit(0)

    def ask(self, *call: Any) -> Any:
        """What the program answers, or raises, if it is one of Python's own exceptions."""
        try:
            self.requests.write(as_line(call, lambda value, kind: type(value) is kind))
            self.requests.flush()
            line = self.answers.readline(_MOST_BYTES)
            if not line.endswith(b"\n"):
                self.end(f"An answer of more than {_MOST_BYTES} bytes." if line else "Ended before its checks did.")
            kind, value, message = unpack(json.loads(line))
        except _NotPlain as error:
            self.end(f"{NOT_PLAIN}{call[0]} is given {error}")
        except BrokenPipeError:
            self.end("Ended before its checks did.")
        except Exception as error:
            self.end(f"An answer that cannot be read ({type(error).__name__}).")
        if kind == "value":
            return value
        if kind == "not plain":
            self.end(f"{NOT_PLAIN}{call[0]} gives {ascii(value)[1:-1][:80]}")
        raised: Any = getattr(builtins, str(value), None)
        is_error = isinstance(raised, type) and issubclass(raised, Exception)
        # StopIteration would end a `map` of the tests' as though all had been asked.
        if not is_error or issubclass(raised, (StopIteration, StopAsyncIteration)):
            self.end(f"{value}: {message}")
        raise raised(message)

    def watch(self) -> None:
        """End, and all processes with this first one, when nobody is left to read the verdict, or with too many files.

        Each file costs memory that the size of its file system does not bound.
        """
        reader = select.poll()
        reader.register(self.verdicts, 0)  # of the events, that the other end was closed alone
        folders = [folder for folder in ("/tmp", "/dev/shm") if os.access(folder, os.W_OK)]
        while not reader.poll(20) and sum(s.f_files - s.f_ffree for s in map(os.statvfs, folders)) <= _MOST_FILES:
            pass
        self.end(f"More than {_MOST_FILES} files.")


class _Function:
    """Stands in the tests for a name that the program defines: it can be called, and nothing else."""

    def __init__(self, judge: _Judge, name: str) -> None:
        self.judge, self.name = judge, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.judge.ask(self.name, list(arguments), named)

    def refuse(self, *_: Any) -> NoReturn:
        self.judge.end(f"{NOT_PLAIN}{self.name} is not called but otherwise used")


for _name in ("getattr", "getitem", "iter", "eq", "hash", "instancecheck", "mro_entries"):
    setattr(_Function, f"__{_name}__", _Function.refuse)


def _globals(tests: str, names: dict[str, bool], judge: _Judge) -> dict[str, Any]:
    """What the tests may use of the program's: its functions, and modules by their own names, which are Python's.

    Python's own functions stay Python's, unless the tests name nothing else of the program's (MBPP asks for a `sum`).
    """
    tables = [symtable.symtable(tests, "<tests>", "exec")]
    own = {each.get_name() for each in tables[0].get_symbols() if each.is_assigned() or each.is_imported()}
    for table in tables:
        tables += table.get_children()
    used = {
        each.get_name() for table in tables for each in table.get_symbols() if table is tables[0] or each.is_global()
    }
    free = used - own
    found = {name for name in free if not hasattr(builtins, name)} or free
    known = {name for name in found & names.keys() if names[name] and name in sys.stdlib_module_names}
    modules = {name: importlib.import_module(name) for name in known}
    return {name: _Function(judge, name) for name in found & names.keys()} | modules


def main() -> None:
    """Write the token that stdin brings to stdout when the program passed its tests; else the reason why not."""
    _forbid_calls()
    asked, told, nowhere = os.pipe(), os.pipe(), os.open(os.devnull, os.O_RDWR)
    is_judge, verdicts = os.fork(), os.dup(1)
    for descriptor in (0, 1, 2) if not is_judge else (1, 2):
        os.dup2(nowhere, descriptor)
    if not is_judge:
        for descriptor in (verdicts, asked[1], told[0]):
            os.close(descriptor)
        _serve(os.fdopen(asked[0], "rb"), os.fdopen(told[1], "wb"))
    _prctl(_PR_SET_DUMPABLE, 0)
    os.close(asked[0])
    os.close(told[1])
    request = json.loads(sys.stdin.buffer.read())
    judge = _Judge(verdicts, os.fdopen(asked[1], "wb"), os.fdopen(told[0], "rb"))
    threading.Thread(target=judge.watch, daemon=True).start()
    try:
        names = judge.ask(request["program"])
        exec(compile(request["tests"], "<tests>", "exec"), _globals(request["tests"], names, judge))
        verdict = request["token"]
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"[:500]
    judge.end(verdict)


if __name__ == "__main__":
    main()
