"""Around a process: what was made before a fork is refused by name or works in the child, and a script that ends while
something is answered ends cleanly, with the exit code that it asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from tests.forks import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]
ROOT = Path(__file__).parents[2]
BEGINNING = """
import asyncio, multiprocessing, os, signal, sys, threading, time
import torch
import blockpress
from blockpress.config import Sampling
from blockpress.engine import EngineCore, EngineOptions, ThreadedEngine
from blockpress.errors import EngineError

torch.set_num_threads(THREADS)
lm = blockpress.load("sudoku-nano", memory=1 << 24)
LONG, SHORT = Sampling(steps=1 << 30, confidence=0.0), Sampling(steps=4)
ids = list(range(4, 14))

def engine():
    return ThreadedEngine(EngineCore(lm.network, EngineOptions(memory=1 << 24)))

def request(**how):
    return lm.build_requests(ids, **how)[0]

def child(work):
    "Exit code of a fork that does this work; a child that hangs is killed."
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print("child:", type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    for _ in range(600):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"

def refused(call):
    try:
        call()
    except EngineError as error:
        assert str(os.getppid()) in error.message and "fork" in error.message, error
    else:
        raise AssertionError("no error")
"""


def start(script: str, threads: int = 1) -> subprocess.Popen[str]:
    code = BEGINNING.replace("THREADS", str(threads)) + textwrap.dedent(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*python(whole_end=True), "-c", code]
    return subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]


def run(script: str, threads: int = 1) -> tuple[int, str, str]:
    process = start(script, threads)
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, errors


def test_an_engine_of_the_parent_is_refused_by_name_in_the_child():
    """Every door of it; what only ends something does nothing. The parent's answer goes on."""
    code, out, errors = run(
        """
        one = engine()
        stream = one.events(request(max_tokens=30, sampling=SHORT))
        first = next(stream)

        def work():
            refused(lambda: one.events(request()))
            refused(lambda: one.submit(request(), print))
            refused(lambda: next(stream))
            refused(lambda: asyncio.run(anext(one.stream(request()))))
            one.cancel(request())
            one.close()
            with engine() as own:
                assert [type(event).__name__ for event in own.events(request(max_tokens=3, sampling=SHORT))][-1] == "Done"

        assert child(work) == 0
        assert [type(event).__name__ for event in stream][-1] == "Done"
        one.close()
        print("parent")
        """
    )
    assert (code, out) == (0, "parent\n"), errors


@pytest.mark.parametrize("used", [False, True])
def test_a_model_of_the_parent_answers_in_the_child(used: bool):
    """With an engine of the child's own, though another thread of the parent holds the lock of the parent's, and though
    torch's OpenMP threads are gone; an answer that the parent began is refused by name."""
    code, out, errors = run(
        f"""
        if {used}:
            before = lm.generate(ids, max_tokens=20, sampling=SHORT)
            begun = lm.stream(ids, sampling=LONG)
            next(begun)
            threading.Thread(target=lm.generate, args=(ids,), kwargs={{"sampling": LONG}}, daemon=True).start()
            time.sleep(0.2)
        (torch.randn(700, 700) @ torch.randn(700, 700)).exp().sum()

        def work():
            print(lm.generate(ids, max_tokens=20, sampling=SHORT).tokens, flush=True)
            if {used}:
                refused(lambda: list(begun))
                begun.close()
                assert lm.engine.stats.scheduler.submitted == 1
            lm.close()

        assert child(work) == 0
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        print(lm.generate(ids, max_tokens=20, sampling=SHORT).tokens)
        """,
        threads=2,
    )
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3 and len(set(lines)) == 1, (out, errors)


ENDS = {
    "the script's end": ("", 0),
    "sys.exit": ("sys.exit(7)", 7),
    "an exception": ("raise ValueError('on purpose')", 1),
    "sys.exit in a handler of SIGTERM": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
        5,
    ),
}
RUNNING = {
    "engine": "held = engine(); stream = held.events(request(sampling=LONG)); next(stream)",
    "engine, read by a daemon thread": (
        "held = engine(); threading.Thread(target=lambda: list(held.events(request(sampling=LONG))), daemon=True).start()"
    ),
    "model, in daemon threads": (
        "[threading.Thread(target=lm.generate, args=(ids,), kwargs=dict(sampling=LONG), daemon=True).start() "
        "for _ in range(3)]"
    ),
    "reference loop, in a daemon thread": (
        "from blockpress.lm.execute import run_reference; lm.answer = run_reference; "
        "threading.Thread(target=lm.generate, args=(ids,), kwargs=dict(sampling=LONG), daemon=True).start()"
    ),
}


@pytest.mark.parametrize(
    ("running", "end"), [*((one, "the script's end") for one in RUNNING), *(("engine", how) for how in list(ENDS)[1:])]
)
def test_a_script_that_ends_while_something_is_answered_ends_cleanly(running: str, end: str):
    how, code = ENDS[end]
    script = f"{RUNNING[running]}\ntime.sleep(0.1)\nprint(time.monotonic(), flush=True)\n{how}"
    found, out, errors = run(script)
    took = time.monotonic() - float(out)
    assert found == code and took < 30, (found, took, errors)
    assert ("ValueError: on purpose" in errors) == (end == "an exception")
    assert "terminate" not in errors and "Fatal" not in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("waits", ["list(engine().events(request(sampling=LONG)))", "lm.generate(ids, sampling=LONG)"])
def test_a_signal_ends_a_waiting_script_as_it_ends_any(waits: str, number: int, code: int):
    process = start(f"print('ready', flush=True)\n{waits}")
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        before = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and time.monotonic() - before < 30, errors
    assert "terminate" not in errors
