"""Python processes that have torch already: a test that needs a process of its own waits for a fork, not for imports.

`subprocess.run([*python(), "-c", code], ...)`, with `-m module` or a script's path as well, is what it is with
`sys.executable`, at a tenth of the time: the first call starts a server that imports torch and other people's packages,
nothing of ours, and each later one is a fork of it with the caller's streams, environment and working directory. A script
ends as scripts do, with its exit code or signal, its threads and what is registered for its exit; only its modules are not
taken apart, which with torch takes longer than most scripts: `python(whole_end=True)` ends by the interpreter's own end.
Who kills the command kills the script, and both heed SIGINT and SIGTERM even where this process ignores them, as what runs in
the background of a shell does.

What depends on how Python starts (its options, what it imports, a terminal, OpenMP's settings) needs `sys.executable`.
What a fork takes is not in the processor time of the test that waits for it (`time_limit`).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from functools import cache
from pathlib import Path

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors.torch", "jinja2", "jaxtyping", "PIL.Image")
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def python(*, whole_end: bool = False) -> list[str]:
    """The beginning of a command, in place of `[sys.executable]`. The server ends with this process."""
    return [sys.executable, "-S", "-E", __file__, _address(), "whole" if whole_end else "quick"]


@cache
def _address() -> str:
    """The socket of a server."""
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    command = [sys.executable, __file__, "--serve", str(folder / "socket")]
    # Threads that wait for work let others have the core: here two often share one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.communicate()  # the end of its input is its end
        (folder / "socket").unlink(missing_ok=True)
        folder.rmdir()

    atexit.register(end)
    return str(folder / "socket")


def call(path: str, arguments: list[str]) -> int:
    """The command: hands its streams to a fork, hands on signals, and ends as the fork does."""
    signals, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())  # a handler alone may run a moment before a wait begins that nothing ends
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [b"."], [0, 1, 2])
        with server.makefile("rw", encoding="utf-8") as lines:
            print(json.dumps(asked), file=lines, flush=True)
            pid = int(lines.readline())
            while server not in (readable := select.select([server, signals], [], [])[0]):
                for number in signals.recv(16) if signals in readable else ():
                    os.kill(pid, number)
            ended = int(lines.readline())
    if ended < 0:
        signal.signal(-ended, signal.SIG_DFL)
        os.kill(os.getpid(), -ended)
    return ended


def serve(path: str) -> list[str] | None:
    """Forks until its input ends: then None, and in each fork the arguments of its script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a Python that is started where nobody ignores it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in PACKAGES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    os.write(1, b"ready\n")
    gc.freeze()
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if 0 in readable:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return watch(connection)
        connection.close()


def watch(connection: socket.socket) -> list[str]:
    """Between a command and its fork: says how that ends, and ends it if the command goes first."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    lines = connection.makefile("rw", encoding="utf-8")
    asked = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        lines.close()
        connection.close()
        return begin(streams, asked)
    for stream in streams:
        os.close(stream)
    print(pid, file=lines, flush=True)
    fork = os.pidfd_open(pid)
    readable, _, _ = select.select([fork, connection], [], [])
    if fork not in readable:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
    finally:
        os._exit(0)


def begin(streams: list[int], asked: dict[str, object]) -> list[str]:
    """What an interpreter does before it runs a script, where this fork has something of the server's."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=text is sys.stderr or text.isatty())  # type: ignore[union-attr]
    os.chdir(str(asked["folder"]))
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[call-overload]
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))
    return list(asked["arguments"])  # type: ignore[call-overload]


def run(arguments: list[str]) -> None:
    """The script, at the top of this fork's stack."""
    kind, *rest = arguments
    if kind == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def run_and_end(arguments: list[str]) -> None:
    """The script, and what an interpreter does at its end before it takes all modules apart."""
    code: object = None
    try:
        run(arguments)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code or 0) & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        sys.exit(call(sys.argv[1], sys.argv[2:]))
    script = serve(sys.argv[2])
    if script is not None:
        end, *script = script
        (run if end == "whole" else run_and_end)(script)
