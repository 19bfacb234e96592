"""The limit of `time_limit.py`, on a suite of one test that may take 0.1 seconds."""

from __future__ import annotations

import textwrap

import pytest

from .time_limit import MARKS

pytest_plugins = ["pytester"]

BUSY = "import time\nbefore = time.process_time()\nwhile time.process_time() < before + 0.15: pass"
CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}], check=True)"
ASLEEP = "import time\ntime.sleep(0.15)"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("CI", "1")
    pytester.makeini("[pytest]\nmarkers =\n" + "".join(f"  {mark}\n" for mark in MARKS))
    pytester.makeconftest("from tests.time_limit import limited_to\npytest_runtest_call = limited_to(0.1)")
    return pytester


def run(suite: pytest.Pytester, body: str, mark: str = "", fixture: str = "pass") -> pytest.RunResult:
    made = f"import pytest\n@pytest.fixture\ndef made():\n{textwrap.indent(fixture, '    ')}\n"
    suite.makepyfile(test_it=f"{made}{mark}\ndef test_it(made):\n{textwrap.indent(body, '    ')}\n")
    return suite.runpytest_inprocess()


@pytest.mark.parametrize("work", [BUSY, CHILD], ids=["itself", "a process of its own"])
def test_a_long_test_fails_with_its_seconds_and_the_fix(suite: pytest.Pytester, work: str) -> None:
    result = run(suite, work)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"test_it.py::test_it took 0\.\d s of .* make it smaller, or mark it .* or slow"])


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_allows_it(suite: pytest.Pytester, mark: str) -> None:
    run(suite, BUSY, mark=f"@pytest.mark.{mark}").assert_outcomes(passed=1)


def test_waiting_and_fixtures_do_not_count(suite: pytest.Pytester) -> None:
    run(suite, ASLEEP, fixture=BUSY).assert_outcomes(passed=1)


def test_a_long_test_that_fails_says_its_own_reason(suite: pytest.Pytester) -> None:
    result = run(suite, f"{BUSY}\nassert 1 == 2")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *assert 1 == 2"])
    result.stdout.no_fnmatch_line("*make it smaller*")


def test_outside_of_ci_no_test_is_refused(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    run(suite, BUSY).assert_outcomes(passed=1)
