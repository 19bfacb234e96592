"""Operations in C++: plain functions over pointers, built on first use where a compiler is there.

    ops/native/NAME.cpp  --g++, once-->  ~/.cache/blockpress/native/NAME-LEVEL-HASH.so  --ctypes-->  library("NAME")

No torch headers, so that a build takes a second and any torch will do. A build is for an ISA level (`hardware.isa`),
not for one processor: with BLOCKPRESS_ISA=avx2 a better machine runs what a lesser one would. The hash is of the
source, the headers, the flags and the compiler, so that an edit or another compiler builds its own.

Invariant: whoever calls `library` has a version without it; None says that this machine has to use that one.
BLOCKPRESS_NATIVE=0 forbids it everywhere. Run it:  blockpress doctor
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from blockpress.hardware import Isa, cache_folder, isa, processor

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")
FLAGS += ("-pthread", *(("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()))
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
_PAIRS = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
LEVELS: dict[Isa, tuple[str, ...]] = {  # by instructions: g++ 10 does not know the names of the levels
    "amx": (*_PAIRS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _PAIRS,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": ("-march=armv8-a",),
    "portable": (),
}
SECONDS = 120  # a build that takes longer hangs


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `ops/native/NAME.cpp`; None where they cannot be built here, or must not be used.

    Raises:
        ConfigError: BLOCKPRESS_ISA is no level of this processor.
    """
    if os.environ.get("BLOCKPRESS_NATIVE") == "0":
        return None
    found = compiler()
    if found is None:
        return None
    shared = name == "pool"  # the others find its function among the process's symbols
    if not shared and library("pool") is None:
        return None
    mode = ctypes.RTLD_GLOBAL if shared else ctypes.DEFAULT_MODE
    try:
        return ctypes.CDLL(str(_built(SOURCES / f"{name}.cpp", found)), mode=mode)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home for a cache
        return None


def compiler() -> str | None:
    """Where a C++ compiler is."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def flags(level: Isa) -> tuple[str, ...]:
    """What the compiler is told to build for that level; tuned for this processor where it is its own best."""
    tuned = ("-mtune=native",) if level == processor().isa and level not in ("neon", "portable") else ()
    return (*FLAGS, *LEVELS[level], *tuned)


def _built(source: Path, found: str) -> Path:
    """The library of a source at the level in use, or at the next lower one whose flags the compiler knows."""
    levels = processor().levels
    for level in levels[levels.index(isa()) :]:
        try:
            return _built_for(level, source, found)
        except subprocess.CalledProcessError as error:
            refused = error
    raise refused


def _built_for(level: Isa, source: Path, found: str) -> Path:
    """The library, built if it is not there; a process that builds at the same time does no harm."""
    command = [found, *flags(level)]
    texts = [each.read_bytes() for each in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(b"\0".join([*texts, " ".join([*command, _version(found)]).encode()])).hexdigest()[:16]
    place = cache_folder() / "native" / f"{source.stem}-{level}-{key}.so"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as room:
            fresh = Path(room) / place.name
            whole = [*command, "-o", str(fresh), str(source)]
            subprocess.run(whole, check=True, capture_output=True, timeout=SECONDS)
            os.replace(fresh, place)
    return place


@cache
def _version(found: str) -> str:
    """What a compiler says it is."""
    return subprocess.run([found, "--version"], check=True, capture_output=True, text=True, timeout=SECONDS).stdout
