"""A cache is a speed-up: it never fails an answer, and what is damaged in it is made anew."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blockpress import hardware
from blockpress.cli import parity
from blockpress.hardware import Rates, disk, speed
from blockpress.ops import compiled, kernels
from blockpress.train import data
from tests.forks import python

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")


def forget() -> None:
    """As in the next process."""
    for known in (compiled.library, compiled._version, speed._cached_rates):
        known.cache_clear()
    compiled._obstacles.clear()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, two sources of one line, and no measuring."""
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "pool.cpp").write_text('extern "C" int pooled() { return 3; }\n')
    (sources / "one.cpp").write_text('extern "C" int number() { return 7; }\n')
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setattr(speed, "measure_rates", lambda: Rates(products={"mkl": {"1x1x1": 5.0}}, reading=2.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BLOCKPRESS_NATIVE", raising=False)
    forget()
    yield tmp_path / "cache" / "blockpress"
    monkeypatch.undo()
    forget()


def use_rates(home: Path) -> Path:
    assert hardware.rates().of("mkl") == 5.0
    (file,) = (home / "hardware").iterdir()
    return file


def use_library(home: Path) -> Path:
    library = compiled.library("one")
    assert library is not None and library.number() == 7, compiled.obstacle("one")
    (file,) = (home / "native").glob("one-*.so")
    return file


def use_pool(home: Path) -> Path:
    file = home / "run" / "sudoku-pool.npz"
    solutions, orders = data.sudoku_pool(5, 3, 1, file)
    assert solutions.shape == orders.shape == (3, 81) and set(solutions.flat) == set(range(1, 10))
    return file


def older_rates(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"key": "another machine's"}))


def older_pool(file: Path) -> None:
    with np.load(file) as held:
        np.savez_compressed(file, **(dict(held) | {"version": 0}))


def wrong_pool(file: Path) -> None:
    with np.load(file) as held:
        parts = dict(held)
    parts["solutions"][0, [0, 1]] = parts["solutions"][0, [1, 0]]
    np.savez_compressed(file, **parts)


def another_library(file: Path) -> None:
    source = file.with_suffix(".cpp")
    source.write_text('extern "C" int number() { return 8; }\n')
    subprocess.run([str(compiled.compiler()), "-shared", "-fPIC", "-o", str(file), str(source)], check=True)
    source.unlink()


@dataclass(frozen=True)
class Cache:
    """One cache: `use` has it filled or read, checks what it gives, and names its file."""

    use: Callable[[Path], Path]
    wrong: Callable[[Path], None]


CACHES = {
    "speeds": Cache(use_rates, older_rates),
    "libraries": Cache(use_library, another_library),
    "puzzles": Cache(use_pool, wrong_pool),
    "puzzles of another version": Cache(use_pool, older_pool),
}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "cut by a byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "nonsense": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 9),
    "a bit turned": lambda file: turn_a_bit(file),
    "missing": lambda file: file.unlink(),
}


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace(file: Path, damage: Callable[[Path], object]) -> None:
    """Damage a copy and put it in its place: this process has loaded the library itself."""
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    if file.suffix == ".npz":
        copy = copy.rename(copy.with_suffix(".npz"))
    damage(copy)
    file.unlink()
    if copy.exists():
        copy.rename(file)


@needs_compiler
@pytest.mark.parametrize("damage", [*DAMAGE, "wrong contents"])
@pytest.mark.parametrize("name", CACHES)
def test_what_is_damaged_is_made_anew(name: str, damage: str, home: Path) -> None:
    kept = CACHES[name]
    file = kept.use(home)
    whole = file.read_bytes()
    replace(file, DAMAGE.get(damage, kept.wrong))
    forget()
    assert kept.use(home) == file, "and no other file is left"
    assert (
        json.loads(file.read_text()) == json.loads(whole)
        if file.suffix == ".json"
        else len(file.read_bytes()) == len(whole)
    )
    written = file.stat().st_mtime_ns
    forget()
    kept.use(home)
    assert file.stat().st_mtime_ns == written, "and then it serves"


CRASH, HANG = "kill -SEGV $$", "sleep 1000"
VERSION = 'test "$1" = --version && exit 0'
BROKEN_COMPILERS = {  # a script, what is said, and of the hint
    "crashes at once": (CRASH, r"g\+\+ fails: exit status -11", "install g++ afresh"),
    "crashes while it builds": (f"{VERSION}\n{CRASH}", r"g\+\+ fails: exit status -11", "install g++ afresh"),
    "says why": (f"{VERSION}\necho 'one.cpp: In function' >&2\necho 'fatal error: cannot execute cc1plus' >&2\nexit 1", "fatal error: cannot execute cc1plus", "install g++"),
    "has no room": (f"{VERSION}\necho 'error: No space left on device' >&2\nexit 1", "No space left", "some room"),
    "hangs at once": (HANG, r"does not end within 0\.5 s", "another compiler"),
    "hangs while it builds": (f"{VERSION}\n{HANG}", r"does not end within 0\.5 s", "another compiler"),
    "writes nonsense": (f'{VERSION}\nwhile test "$1" != -o; do shift; done\necho nonsense > "$2"', "what .* makes cannot be loaded: .*(too short|invalid ELF)", "may be executed"),
    "writes nothing": ("exit 0", "makes no library", "install g++ afresh"),
}  # fmt: skip


def told(message: str, hint: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is used, the logger has the reason once, and `doctor` has it with what to do."""
    assert compiled.library("one") is None and compiled.library("pool") is None
    assert [record.name for record in caplog.records if "C++" in record.message] == ["blockpress"]
    (line,) = parity.native()
    assert line.status == "warn" and re.search(message, line.detail) and hint in line.hint
    assert re.search(message, caplog.text)
    forget()
    assert compiled.library("one") is None, "nor does what it left behind count"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name.startswith("hangs") else ()) for name in BROKEN_COMPILERS],
)
def test_a_broken_compiler_is_done_without_and_named(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script, message, hint = BROKEN_COMPILERS[name]
    file = tmp_path / "bin" / "g++"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(file.parent))
    if name.startswith("hangs"):
        monkeypatch.setattr(compiled, "VERSION_SECONDS" if name == "hangs at once" else "SECONDS", 0.5)
    told(message, hint, caplog)
    assert not list(home.glob("native/*"))


@pytest.mark.parametrize("value", ["", "relative/path", "./here"])
def test_a_cache_home_that_is_no_absolute_path_does_not_count(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert disk.cache_folder() == Path.home() / ".cache" / "blockpress"


def test_no_compiler_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    told("there is no C\\+\\+ compiler", "install g++", caplog)


def no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(disk.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no entry")))


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")


def refused(number: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """Root may write anywhere, so what the system would say is simulated."""

    def refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(folder))

        monkeypatch.setattr(disk.tempfile, "TemporaryDirectory", fail)

    return refuse


UNWRITABLE: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], str]] = {
    "no home": (no_home, "no home directory, and XDG_CACHE_HOME is not set"),
    "a file": (a_file, "cannot be written.*(File exists|Not a directory)"),
    "no rights": (refused(errno.EACCES), "cannot be written.*Permission denied"),
    "read-only": (refused(errno.EROFS), "cannot be written.*Read-only file system"),
    "full": (refused(errno.ENOSPC), "cannot be written.*No space left on device"),
}


@needs_compiler
@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_cache_that_cannot_be_written_is_done_without_and_named(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrange, message = UNWRITABLE[name]
    arrange(home, monkeypatch)
    assert hardware.rates().of("mkl") == 5.0 and len(caplog.records) == 1
    assert data.sudoku_pool(5, 3, 1, home / "sudoku-pool.npz")[0].shape == (3, 81)
    told(message, "XDG_CACHE_HOME", caplog)


@needs_compiler
def test_what_is_built_serves_where_nothing_can_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(home)
    use_rates(home)
    refused(errno.EROFS)(home, monkeypatch)
    forget()
    use_library(home)
    monkeypatch.setattr(speed, "measure_rates", lambda: pytest.fail("measured"))
    use_rates(home)


@needs_compiler
def test_builders_at_once_leave_one_whole_library(home: Path) -> None:
    builders = [threading.Thread(target=compiled.library, args=("one",)) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    use_library(home)
    assert len(list((home / "native").iterdir())) == 2, "of each source one, and no folder of a build"


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton is installed, has an empty cache and a compiler; where it keeps its cache is forgotten afterwards."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    kernels.available.cache_clear()
    yield tmp_path / ".triton" / "cache"
    kernels.available.cache_clear()


def test_triton_keeps_its_own_cache_where_it_can(triton: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kernels.available() and triton.is_dir() and not os.environ["TRITON_CACHE_DIR"] and not caplog.records


@pytest.mark.parametrize("obstacle", ["no home", "a file"])
def test_triton_compiles_elsewhere_where_its_cache_cannot_be_written(
    obstacle: str, triton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if obstacle == "no home":
        monkeypatch.setattr(kernels.os.path, "expanduser", lambda path: path)
        monkeypatch.delenv("TRITON_CACHE_DIR")
    else:
        (tmp_path / ".triton").write_text("in the way")
    assert kernels.available() and Path(os.environ["TRITON_CACHE_DIR"]).is_dir() and len(caplog.records) == 1
    shutil.rmtree(os.environ["TRITON_CACHE_DIR"])
    assert not Path("~").exists()
    kernels.available.cache_clear()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/none")
    monkeypatch.setattr(kernels.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    assert not kernels.available() and "no directory that can be written" in caplog.text


def test_triton_without_a_compiler_runs_only_what_it_has(
    triton: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert not kernels.available() and "install gcc" in caplog.text
    (triton / "kernel").mkdir()
    kernels.available.cache_clear()
    assert kernels.available()


@pytest.mark.slow
def test_an_answer_comes_without_a_home_and_without_a_compiler(tmp_path: Path) -> None:
    """The same text on standard output as with both, and nothing else."""
    code = (
        "import os, pathlib, pwd, blockpress\n"
        "pwd.getpwuid = lambda uid: {}[uid]\n"  # no entry for this user
        "lm = blockpress.load('sudoku-nano')\n"
        "held = {'seed': 1, 'max_tokens': 20, 'sampling': lm.generation.sampling.with_(steps=6)}\n"
        "print(lm.generate('\\n'.join(['530678912', '670195348', '198342567'] * 3), **held).tokens)"
    )
    texts = []
    for environment in ({}, {"PATH": str(tmp_path)}, {"XDG_CACHE_HOME": "/proc/none"}):
        kept = {key: value for key, value in os.environ.items() if key != "HOME" or not environment} | environment
        done = subprocess.run([*python(), "-c", code], env=kept, capture_output=True, text=True)
        assert not done.stderr, done.stderr
        texts.append(done.stdout)
    assert texts[0].startswith("[") and texts == [texts[0]] * 3
