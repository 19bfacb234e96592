"""Operations in C++: plain functions over pointers, built on first use where a compiler is available.

    ops/native/NAME.cpp  --g++, once-->  ~/.cache/blockpress/native/NAME-LEVEL-HASH-SUM.so  --ctypes-->  library("NAME")

No torch headers, so a build takes a second and works with any torch. A build is for an ISA level (`hardware.isa`), not
for one processor: with BLOCKPRESS_ISA=avx2 a newer machine runs what an older one would. The hash covers the source,
the headers, the flags and the compiler, so an edit or another compiler gets its own build; the sum covers the library.

Invariant: every caller of `library` has a version without C++, and uses it where `library` returns None.
BLOCKPRESS_NATIVE=0 turns C++ off everywhere. Run it:  blockpress doctor
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blockpress.hardware import Isa, cache_folder, isa, processor

_LOG = logging.getLogger("blockpress")
SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")
FLAGS += ("-pthread", *(("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()))
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
_PAIRS = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
LEVELS: dict[Isa, tuple[str, ...]] = {  # instruction by instruction: g++ 10 does not know the names of the levels
    "amx": (*_PAIRS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _PAIRS,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": ("-march=armv8-a",),
    "portable": (),
}
SECONDS, VERSION_SECONDS = 120, 30  # a build, or a question for the version, that takes longer is taken to hang


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `ops/native/NAME.cpp`; None where they cannot be used here, and `obstacle` says why.

    The logger `blockpress` is told each reason once.

    Raises:
        ConfigError: BLOCKPRESS_ISA is not a level of this processor.
    """
    if os.environ.get("BLOCKPRESS_NATIVE") == "0":
        _obstacles[name] = Obstacle("BLOCKPRESS_NATIVE is 0", "unset BLOCKPRESS_NATIVE")
        return None
    try:
        return _load(name)
    except _Unusable as error:
        found = error.obstacle
        if found not in _obstacles.values():
            _LOG.warning("operations run without C++, and slower: %s (hint: %s)", found.message, found.hint)
        _obstacles[name] = found
        return None


@dataclass(frozen=True)
class Obstacle:
    """Why C++ cannot be used, and what to do about it."""

    message: str
    hint: str


class _Unusable(Exception):
    """An obstacle on its way to `library`."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.obstacle = Obstacle(message, hint)


_NO_COMPILER = Obstacle("there is no C++ compiler", "install g++")
_obstacles: dict[str, Obstacle] = {}


def obstacle(name: str) -> Obstacle | None:
    """Why `library(name)` is None; None where it is not."""
    return None if library(name) is not None else _obstacles.get(name, _NO_COMPILER)


def _load(name: str) -> ctypes.CDLL:
    path = compiler()
    if path is None:
        raise _Unusable(_NO_COMPILER.message, hint=_NO_COMPILER.hint)
    shared = name == "pool"  # the other libraries find its function among the process's global symbols
    if not shared and library("pool") is None:
        missing = _obstacles["pool"]
        raise _Unusable(missing.message, hint=missing.hint)
    mode = ctypes.RTLD_GLOBAL if shared else ctypes.DEFAULT_MODE
    for _ in range(2):
        file = _built(SOURCES / f"{name}.cpp", path)
        try:
            return ctypes.CDLL(str(file), mode=mode)
        except OSError as error:
            with suppress(OSError):
                file.unlink()  # perhaps another system's, in a home that several share
            reason = error
    raise _Unusable(
        f"what {path} makes cannot be loaded: {reason}",
        hint="set XDG_CACHE_HOME to a directory whose files may be executed, or install another compiler",
    )


def compiler() -> str | None:
    """The path of a C++ compiler; None where there is none."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def flags(level: Isa) -> tuple[str, ...]:
    """The compiler's flags for that level; tuned for this processor where the level is its best."""
    tuned = ("-mtune=native",) if level == processor().isa and level not in ("neon", "portable") else ()
    return (*FLAGS, *LEVELS[level], *tuned)


def _built(source: Path, compiler_path: str) -> Path:
    """The library of a source at the level in use, or at the next lower level whose flags the compiler knows."""
    levels = processor().levels
    for level in levels[levels.index(isa()) :]:
        try:
            return _built_for(level, source, compiler_path)
        except subprocess.CalledProcessError as error:
            refused = error
    raise _failed(compiler_path, refused)


def _built_for(level: Isa, source: Path, compiler_path: str) -> Path:
    """The path of the library, built if missing or damaged; several processes may build at once.

    Raises:
        _Unusable: nothing can be written, or the compiler hangs. CalledProcessError: it fails.
    """
    command = [compiler_path, *flags(level)]
    try:
        texts = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    except OSError as error:
        raise _Unusable(f"{source.name} cannot be read: {error}", hint="install blockpress afresh") from error
    key = hashlib.sha256(b"\0".join([*texts, " ".join([*command, _version(compiler_path)]).encode()])).hexdigest()[:16]
    stem = f"{source.stem}-{level}-{key}"
    try:
        home = cache_folder() / "native"
    except OSError as error:
        raise _Unusable(str(error), hint="set XDG_CACHE_HOME to a directory that can be written") from error
    try:
        return _kept(home, stem) or _make(home, stem, [*command, str(source)])
    except OSError as error:
        raise _Unusable(
            f"the cache {str(home)!r} cannot be written: {error}",
            hint="give it rights and room, or set XDG_CACHE_HOME to another directory",
        ) from error


def _kept(home: Path, stem: str) -> Path | None:
    """A build of an earlier process; one that is not what its name says is removed."""
    for file in sorted(home.glob(f"{stem}-*.so")):
        with suppress(FileNotFoundError):  # another process has removed it
            if file.name == _name(stem, file):
                return file
            file.unlink()
    return None


def _make(home: Path, stem: str, command: list[str]) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=home) as folder:
        built = Path(folder) / "built.so"
        # The compiler's own temporary files lie there, too: elsewhere there may be no room for them.
        _run([*command, "-o", str(built)], SECONDS, TMPDIR=folder)
        if not built.is_file():
            raise _Unusable(f"{command[0]} ends well and makes no library", hint="install g++ afresh")
        target = home / _name(stem, built)
        os.replace(built, target)
    return target


def _name(stem: str, file: Path) -> str:
    """The name of a build: what it is made of, and a sum of its bytes: one that was cut may load, and then crash."""
    return f"{stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


@cache
def _version(compiler_path: str) -> str:
    """The output of the compiler's --version."""
    try:
        return _run([compiler_path, "--version"], VERSION_SECONDS)
    except subprocess.CalledProcessError as error:
        raise _failed(compiler_path, error) from error


def _run(command: list[str], seconds: int, **environment: str) -> str:
    """What a command prints, in English; after `seconds` it is ended, with what it has started.

    Raises:
        _Unusable: it cannot be started, or does not end. CalledProcessError: it fails.
    """
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"} | environment,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        raise _Unusable(f"{command[0]} does not end within {seconds} s", hint="install another compiler") from error
    except OSError as error:
        raise _Unusable(f"{command[0]} cannot be started: {error}", hint="install g++ afresh") from error
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _failed(compiler_path: str, error: subprocess.CalledProcessError) -> _Unusable:
    """A compiler's failure in its own words: the first line that says "error", or its last."""
    lines = [line for line in error.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {error.returncode}")
    return _Unusable(f"{compiler_path} fails: {said[:300]}", hint="install g++ afresh, or give the disk some room")
