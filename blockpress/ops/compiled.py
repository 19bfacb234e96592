"""Operations in C++: plain functions over pointers, built on first use where a compiler is available.

    ops/native/NAME.cpp  --g++, once-->  ~/.cache/blockpress/native/NAME-LEVEL-HASH.so  --ctypes-->  library("NAME")

No torch headers, so a build takes a second and works with any torch. A build is for an ISA level (`hardware.isa`), not
for one processor: with BLOCKPRESS_ISA=avx2 a newer machine runs what an older one would. The hash covers the source,
the headers, the flags and the compiler, so an edit or another compiler gets its own build.

Invariant: every caller of `library` has a version without C++, and uses it where `library` returns None.
BLOCKPRESS_NATIVE=0 turns C++ off everywhere. Run it:  blockpress doctor
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
LEVELS: dict[Isa, tuple[str, ...]] = {  # instruction by instruction: g++ 10 does not know the names of the levels
    "amx": (*_PAIRS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _PAIRS,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": ("-march=armv8-a",),
    "portable": (),
}
SECONDS = 120  # a build that takes longer is taken to hang


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `ops/native/NAME.cpp`; None where they cannot be built here, or are turned off.

    Raises:
        ConfigError: BLOCKPRESS_ISA is not a level of this processor.
    """
    if os.environ.get("BLOCKPRESS_NATIVE") == "0":
        return None
    path = compiler()
    if path is None:
        return None
    shared = name == "pool"  # the other libraries find its function among the process's global symbols
    if not shared and library("pool") is None:
        return None
    mode = ctypes.RTLD_GLOBAL if shared else ctypes.DEFAULT_MODE
    try:
        return ctypes.CDLL(str(_built(SOURCES / f"{name}.cpp", path)), mode=mode)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home directory for the cache
        return None


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
    raise refused


def _built_for(level: Isa, source: Path, compiler_path: str) -> Path:
    """The path of the library, built if missing; it is safe for several processes to build at once."""
    command = [compiler_path, *flags(level)]
    texts = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(b"\0".join([*texts, " ".join([*command, _version(compiler_path)]).encode()])).hexdigest()[:16]
    target = cache_folder() / "native" / f"{source.stem}-{level}-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            build = [*command, "-o", str(built), str(source)]
            subprocess.run(build, check=True, capture_output=True, timeout=SECONDS)
            os.replace(built, target)
    return target


@cache
def _version(compiler_path: str) -> str:
    """The output of the compiler's --version."""
    return subprocess.run(
        [compiler_path, "--version"], check=True, capture_output=True, text=True, timeout=SECONDS
    ).stdout
