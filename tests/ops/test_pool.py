"""One pool of threads: whoever asks, from whichever thread or process, gets every part done once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from blockpress.ops import compiled
from blockpress.ops.cpu import bridge, products

pytestmark = pytest.mark.skipif(bridge.library() is None, reason="no C++ compiler")
PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)


def parallel(parts: int, threads: int, part: Callable[[int], object]) -> None:
    """The pool's own function, with parts in Python."""
    library = compiled.library("pool")
    assert library is not None
    function = library.blockpress_parallel
    function.argtypes, function.restype = [ctypes.c_long, ctypes.c_int, PART, ctypes.c_void_p], None
    function(parts, threads, PART(lambda _, i: part(i)), None)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [0, 1, 2, 7, 200])
def test_every_part_is_done_once(parts: int, threads: int) -> None:
    """With more threads than parts too."""
    for _ in range(5):
        done: list[int] = []
        parallel(parts, threads, done.append)
        assert sorted(done) == list(range(parts))


def test_no_more_threads_than_asked_for() -> None:
    """Though the pool has more of them from another call."""
    parallel(50, 6, lambda i: time.sleep(0.001))
    who: set[int] = set()
    parallel(50, 2, lambda i: (who.add(threading.get_native_id()), time.sleep(0.001)))
    assert threading.get_native_id() in who and len(who) <= 2


def test_two_threads_run_parts_at_once() -> None:
    """Parts that wait for each other end only if two threads have them at once."""
    both = threading.Barrier(2, timeout=20)
    parallel(2, 2, lambda i: both.wait())
    assert not both.broken


def test_a_suspended_worker_holds_up_only_its_part() -> None:
    """One part waits until all others are done: the others do not wait for it, whoever has it."""
    others = threading.Semaphore(0)
    done: list[int] = []

    def part(i: int) -> None:
        if i == 0:
            for _ in range(19):
                assert others.acquire(timeout=20)
        else:
            others.release()
        done.append(i)

    parallel(20, 2, part)
    assert sorted(done) == list(range(20)) and done[-1] == 0


def test_parallel_calls_may_nest() -> None:
    done: list[tuple[int, int]] = []
    parallel(4, 2, lambda i: parallel(3, 2, lambda j: done.append((i, j))))
    assert Counter(done) == Counter((i, j) for i in range(4) for j in range(3))


def test_concurrent_callers_do_not_mix_their_parts() -> None:
    """Several threads of Python, each with a product of its own; the library lets go of the GIL."""
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    xs = [torch.randn(rows, 90, generator=draw) for rows in (3, 20, 64, 130)]
    weight = torch.randn(300, 90, generator=draw)
    wanted = [products.linear(x, bridge.matrix(weight)) for x in xs]
    torch.set_num_threads(2)
    try:

        def ask(n: int) -> bool:
            with torch.inference_mode():
                return all(torch.equal(products.linear(xs[n], bridge.matrix(weight)), wanted[n]) for _ in range(60))

        with ThreadPoolExecutor(4) as several:
            assert all(several.map(ask, range(4)))
    finally:
        torch.set_num_threads(threads)


def test_many_short_jobs_finish() -> None:
    """The pool opens and closes as fast as it can; a worker that comes late finds the next job, or none."""
    library = compiled.library("pool")
    assert library is not None
    x, weight, threads = torch.randn(5, 16), torch.randn(256, 16), torch.get_num_threads()
    alone = products.linear(x, bridge.matrix(weight))
    torch.set_num_threads(3)
    try:
        for n in range(2000):
            assert torch.equal(products.linear(x, bridge.matrix(weight)), alone), n
            if n % 500 == 0:
                time.sleep(0.01)  # workers fall asleep
    finally:
        torch.set_num_threads(threads)


def _in_child(answers) -> None:  # type: ignore[no-untyped-def]
    done: list[int] = []
    both = threading.Barrier(2, timeout=20)
    parallel(2, 2, lambda i: both.wait())
    parallel(30, 3, done.append)
    answers.put((os.getpid(), sorted(done)))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_its_own_workers() -> None:
    """Its parent's did not come along. And the parent's are still there afterwards."""
    _in_child(multiprocessing.SimpleQueue())
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(answers,))
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode == 0
    pid, done = answers.get()
    assert pid != os.getpid() and done == list(range(30))
    _in_child(multiprocessing.SimpleQueue())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_during_a_job_works() -> None:
    """A part of one thread's job is under way while another thread forks: the child's pool is free all the same."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(i: int) -> None:
        begun.set()
        assert may_end.wait(20)

    caller = threading.Thread(target=parallel, args=(3, 2, slow))
    caller.start()
    assert begun.wait(20)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(answers,))
    child.start()
    child.join(30)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    may_end.set()
    caller.join(20)
    assert not alive and child.exitcode == 0 and answers.get()[1] == list(range(30))


REFUSED = """
import ctypes, resource, sys
library, part = ctypes.CDLL(sys.argv[1]), ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20),) * 2)
done = []
library.blockpress_parallel(ctypes.c_long(9), 4, part(lambda _, i: done.append(i)), None)
assert done == list(range(9)), done
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits of Linux")
def test_refused_threads_are_done_without() -> None:
    """There is no room for their stacks: the caller does all parts, in order."""
    library = compiled.library("pool")
    assert library is not None
    command = [sys.executable, "-c", REFUSED, library._name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
