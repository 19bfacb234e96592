"""The door to every computation: what surrounds it, in torch or in the process, neither changes nor breaks it.

    torch.autocast, default device, matmul precision, flushed denormals     put aside meanwhile, and back afterwards
    vmap, grad and other transforms of functorch                            refused by name
    a forked child       has none of its parent's OpenMP threads, and would wait for them: it computes on one thread
    the process's end    waits for what other threads compute; they begin nothing new, since Python would end them
                         inside of C++, which aborts the process

The default dtype needs nothing of this: the package names the dtype of every tensor that it makes.

Invariant: after a computation the caller's torch is as it was before.
Run it:  python -m pytest tests/lm/test_surroundings.py tests/lm/test_process.py
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from blockpress.errors import RequestError

Item = TypeVar("Item")

PATIENCE = 10.0
"""Seconds that the end of the process waits for other threads."""
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def computing() -> Generator[None]:
    """Around everything that computes, in any thread; it may be nested.

    Raises:
        RequestError: inside a transform of functorch.
    """
    with ExitStack() as stack:
        if not _thread.depth:
            if threading.current_thread() is not threading.main_thread():
                stack.enter_context(_others.computing())
            _put_aside(stack)
        _thread.depth += 1
        try:
            yield
        finally:
            _thread.depth -= 1


def computed(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator that computes each of them."""
    while True:
        with computing():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def ending() -> bool:
    """Whether the process ends, and this thread is to begin nothing new."""
    return _others.ends and threading.current_thread() is not threading.main_thread()


def _put_aside(stack: ExitStack) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RequestError(
            "a model was called inside of vmap, grad or another transform of torch.func",
            hint="call it outside: an answer is no differentiable function, and is not mapped over a dimension",
        )
    for kind in _AUTOCAST:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    if (torch.tensor(1e-40, dtype=torch.float32) * 1).item() == 0:
        torch.set_flush_denormal(False)
        stack.callback(torch.set_flush_denormal, True)
    stack.enter_context(_precision.exact())
    if _others.forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


class _Precision:
    """The precision of float32 products is one for all threads: the first that computes sets it, the last resets it."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._before: dict[Any, str] = {}

    @contextmanager
    def exact(self) -> Generator[None]:
        with self._lock:
            self._users += 1
            for products in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):  # type: ignore[attr-defined]
                if products.fp32_precision not in ("none", "ieee"):
                    self._before[products] = products.fp32_precision
                    products.fp32_precision = "ieee"
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                while self._before and not self._users:
                    products, before = self._before.popitem()
                    products.fp32_precision = "none"
                    if products.fp32_precision != before:  # it is not what all of torch is set to
                        products.fp32_precision = before


class _OtherThreads:
    """What threads beside the main one compute. forked: whether this process is a child that was forked.

    At the end of the process every thread that computes, or did a moment ago, comes to a stop in here: outside of C++,
    where Python may end it.
    """

    def __init__(self, *, forked: bool = False) -> None:
        self.forked, self.ends, self._computing = forked, False, 0
        self._last: dict[int, float] = {}
        """When each thread's last computation ended."""
        self._changed = threading.Condition(threading.Lock())

    @contextmanager
    def computing(self) -> Generator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            if change < 0 or not self.ends:
                self._computing += change
            self._last[threading.get_ident()] = time.monotonic()
            if not self.ends:
                return
            del self._last[threading.get_ident()]
            self._changed.notify_all()
        threading.Event().wait()  # until the process is gone

    def end(self) -> None:
        with self._changed:
            self.ends, now = True, time.monotonic()
            self._changed.wait_for(lambda: not self._computing, PATIENCE)
            alive = {thread.ident for thread in threading.enumerate()}
            near = {thread for thread, last in self._last.items() if thread in alive and now - last < 1}
            self._changed.wait_for(lambda: not near & self._last.keys(), 0.5)


class _Thread(threading.local):
    depth = 0


_thread, _precision, _others = _Thread(), _Precision(), _OtherThreads()
atexit.register(lambda: _others.end())


def _after_fork() -> None:
    """Locks that other threads of the parent held would stay locked here."""
    global _precision, _others
    _precision, _others = _Precision(), _OtherThreads(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
