"""Builds of the C++: one for each ISA level, known by what went into it, and never for a level that is not there."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from blockpress.errors import ConfigError
from blockpress.hardware import isa, processor
from blockpress.ops import compiled
from tests.forks import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A function of one line, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BLOCKPRESS_ISA", raising=False)
    file = tmp_path / "native" / "one.cpp"
    file.parent.mkdir()
    (file.parent / "number.h").write_text("#define NUMBER 7\n")
    file.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    return file


def build(source: Path) -> Path:
    found = compiled.compiler()
    assert found is not None
    return compiled._built(source, found)


def test_every_level_has_flags() -> None:
    assert set(processor().levels) <= set(compiled.LEVELS)
    assert "-march=native" not in " ".join(" ".join(compiled.flags(level)) for level in compiled.LEVELS)
    tuned = {level for level in compiled.LEVELS if "-mtune=native" in compiled.flags(level)}
    assert tuned <= {processor().isa}


def test_a_build_says_its_level(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {}
    for level in processor().levels:
        monkeypatch.setenv("BLOCKPRESS_ISA", level)
        places[level] = build(source)
        assert places[level].name.startswith(f"one-{level}-") and places[level].suffix == ".so"
        assert ctypes.CDLL(str(places[level])).number() == 7
    assert len(set(places.values())) == len(places)


def test_an_edit_of_a_header_builds_anew(source: Path) -> None:
    first = build(source)
    assert build(source) == first
    (source.parent / "number.h").write_text("#define NUMBER 8\n")
    second = build(source)
    assert second != first and ctypes.CDLL(str(second)).number() == 8


def test_another_compiler_builds_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(source)
    monkeypatch.setattr(compiled, "_version", lambda found: "g++ 99")
    assert build(source) != first


@pytest.mark.skipif(len(processor().levels) < 2, reason="the processor has no level above portable")
def test_an_old_compiler_falls_a_level_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = processor().levels
    for level in levels[:-1]:
        monkeypatch.setitem(compiled.LEVELS, level, ("-march=from-the-future",))
    place = build(source)
    assert place.name.startswith("one-portable-") and ctypes.CDLL(str(place)).number() == 7


def test_a_source_that_does_not_compile_is_no_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("nonsense")
    monkeypatch.setattr(compiled, "SOURCES", source.parent)
    compiled.library.cache_clear()
    try:
        assert compiled.library("one") is None
        monkeypatch.setenv("BLOCKPRESS_ISA", "sse9")
        compiled.library.cache_clear()
        with pytest.raises(ConfigError, match="BLOCKPRESS_ISA is 'sse9'"):
            compiled.library("one")
        monkeypatch.setenv("BLOCKPRESS_NATIVE", "0")
        assert compiled.library("one") is None, "nothing is built, so no level is asked for"
    finally:
        compiled.library.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in ("avx2", "portable") if level in processor().levels])
def test_the_operations_agree_at_lower_levels(level: str) -> None:
    """The same comparisons with the plain versions as `blockpress doctor` makes, in a process of that level."""
    assert isa() in processor().levels
    code = (
        "from blockpress.cli import parity\n"
        "checks = [*parity.native(), *parity.agreement('cpu')]\n"
        "assert {check.status for check in checks} == {'ok'}, checks"
    )
    environment = os.environ | {"BLOCKPRESS_ISA": level, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*python(), "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
