"""Operations in C++: plain functions over pointers, built on first use where a compiler is there.

    ops/native/NAME.cpp  --g++, once-->  ~/.cache/blockpress/native/NAME-HASH.so  --ctypes-->  library("NAME")

No torch headers, so that a build takes a second and any torch will do. The hash is of the source, the flags and the
processor, so that another machine, or an edit, builds its own.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wall")
FLAGS += ("-pthread", *(("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()))
SECONDS = 120  # a build that takes longer hangs


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of `ops/native/NAME.cpp`; None where they cannot be built here, or must not be used."""
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
    except (OSError, subprocess.SubprocessError):
        return None


def compiler() -> str | None:
    """Where a C++ compiler is."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def _built(source: Path, found: str) -> Path:
    """The library of a source, built if it is not there; a process that builds at the same time does no harm."""
    text = b"\0".join(each.read_bytes() for each in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(b"\0".join((text, " ".join((found, *FLAGS)).encode(), _processor().encode()))).hexdigest()[:16]
    place = _folder() / f"{source.stem}-{key}.so"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as room:
            fresh = Path(room) / place.name
            command = [found, *FLAGS, "-o", str(fresh), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            os.replace(fresh, place)
    return place


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "blockpress" / "native"


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    known = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *dict.fromkeys(known)])


def share(rows: int, part: Callable[[int, int], None]) -> None:
    """Run `part(start, stop)` over slices of `rows` on torch's number of threads: a ctypes call lets go of the GIL."""
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        part(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    pending = [_threads(threads - 1).submit(part, *edges[i : i + 2]) for i in range(1, threads)]
    part(edges[0], edges[1])
    for one in pending:
        one.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="blockpress-native")
