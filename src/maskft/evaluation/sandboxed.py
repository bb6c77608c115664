"""What runs inside the sandbox: sets the limits, gives up every right, then runs the program that stdin brings.

`sandbox.py` hands this file's text to `python -c`; it uses the standard library alone, since there may be nothing else.
"""

import json
import os
import resource
import sys


def main() -> None:
    """Write the token that stdin brings to stdout when the program has run to its end; else the reason why not."""
    request = json.loads(sys.stdin.buffer.read())
    verdicts = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    if request["uid"] and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
    seconds = int(request["timeout_s"]) + 1
    for limit, value in (
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, request["num_processes"]),
    ):
        resource.setrlimit(limit, (value, value))
    own = os.getpid()
    token, program = request["token"], request["program"]
    request.clear()
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        verdict = token
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"[:500]
    # A forked child that comes out of the program must not speak for it.
    if os.getpid() == own:
        os.write(verdicts, verdict.encode(errors="replace"))
    os._exit(0)


main()
