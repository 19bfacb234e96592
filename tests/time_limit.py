"""In CI a test that takes long says so: it carries one of MARKS, or it fails.

Counted is processor time, of this process and of those that the test has waited for: another job on the machine must not
decide. It is the test's alone, without fixtures, which others need as well, and native code is built before the first
test, so that none of them pays for the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator

import pytest

from blockpress.ops.compiled import SOURCES, library

MARKS = ("parity", "interpreter", "slow")


def processor_seconds() -> float:
    return sum(os.times()[:4])


def limited_to(most_seconds: float) -> Callable[[pytest.Item], Generator[None]]:
    """The hook that runs a test, and with CI set fails one that takes longer and carries no mark."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
        before = processor_seconds()
        yield
        took = processor_seconds() - before
        if os.environ.get("CI") and took > most_seconds and not any(map(item.get_closest_marker, MARKS)):
            pytest.fail(
                f"{item.nodeid} took {took:.1f} s of processor time, and without a mark a test may take {most_seconds} s: "
                f"make it smaller, or mark it {', '.join(MARKS[:-1])} or {MARKS[-1]}",
                pytrace=False,
            )

    return pytest_runtest_call


def build_native_code() -> None:
    for source in sorted(SOURCES.glob("*.cpp")):
        library(source.stem)
