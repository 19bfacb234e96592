"""A fork of the server of `forks` is what a process of its own is: streams, surroundings, ends."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forks import python

pytestmark = pytest.mark.slow


def run(*arguments: str, whole_end: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*python(whole_end=whole_end), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_a_script_has_its_arguments_streams_and_surroundings(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "there.py").write_text("value = 5")
    code = (
        "import os, sys, there; print(__name__, sys.argv, sys.stdin.read(), os.getcwd(), os.environ.get('OWN'), "
        "os.environ.get('HOME'), there.value, 'torch' in sys.modules, 'blockpress' in sys.modules); "
        "print('wrong', file=sys.stderr)"
    )
    environment = {"OWN": "mine", "PYTHONPATH": str(tmp_path / "own")}
    done = run("-c", code, "a b", input="said", cwd=tmp_path, env=environment)
    assert done.stdout == f"__main__ ['-c', 'a b'] said {tmp_path} mine None 5 True False\n", done.stderr
    assert done.stderr == "wrong\n"


def test_modules_and_files_are_run_as_the_main_module(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    assert (
        run(str(script), "1").stdout == run("-m", "script", "1", cwd=tmp_path).stdout == f"__main__ ['1'] {tmp_path}\n"
    )


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("raise ValueError('on purpose')", 1, "ValueError: on purpose"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        ("import atexit, sys; atexit.register(lambda: print('end', file=sys.stderr))", 0, "end"),
        (
            "import sys, threading, time\n"
            "threading.Thread(target=lambda: (time.sleep(0.1), print('thread', file=sys.stderr))).start()",
            0,
            "thread",
        ),
    ],
    ids=["end", "exit", "exit that says why", "exception", "signal", "interrupt", "at exit", "thread"],
)
@pytest.mark.parametrize("whole_end", [False, True])
def test_a_script_ends_as_scripts_end(end: str, code: int, said: str, whole_end: bool) -> None:
    done = run("-c", end, whole_end=whole_end)
    assert done.returncode == code and said in done.stderr and bool(said) == bool(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_reaches_the_script(number: signal.Signals, ignored: bool) -> None:
    """Though who starts it ignores that signal, as what runs in the background of a shell does."""
    code = (
        f"import signal, time\nsignal.signal({int(number)}, lambda *_: exit(9))\nprint(1, flush=True)\ntime.sleep(60)"
    )
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        started = subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE)
    finally:
        signal.signal(number, before)
    with started:
        assert started.stdout is not None and started.stdout.readline() == b"1\n"
        started.send_signal(number)
        assert started.wait(30) == 9


def test_who_kills_the_command_kills_the_script() -> None:
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        script = os.pidfd_open(int(started.stdout.readline()))
        started.kill()
        assert started.stdout.read() == b"", "nobody holds the other end"
        os.close(script)
