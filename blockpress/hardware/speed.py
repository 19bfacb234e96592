"""How fast this machine multiplies and reads, measured once, and the types and ways that follow from it.

Why: which type is the fastest is no matter of flags alone. A processor without bfloat16 instructions computes it at a
fifth to a thirtieth of float32's rate, and torch says nothing of it.

Invariant: figures are those of this process's threads and torch's switches, or they are measured anew.

Run it:  python -c "from blockpress.hardware import rates; print(rates())"
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blockpress.errors import ConfigError
from blockpress.hardware.system import isa, processor

if TYPE_CHECKING:
    import torch

# What changes the products that torch makes, beside the processor.
_SWITCHES = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_FORMAT = 1
_SHAPES = ((1, 512, 512), (16, 512, 512), (64, 512, 512), (256, 512, 512), (256, 1024, 1024))
_WAYS = ("mkl", "onednn", "bfloat16", "float16", "int8")
_PATIENCE = 0.02  # seconds for one product of one shape; a shape that would take longer is left out
_READ = 128 << 20  # bytes; fewer may lie in a large processor's own cache


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured: GFLOP/s of products by way and shape ("rows x in x out"), and GB/s of reading memory.

    Ways are "mkl" (float32 by torch's BLAS), "onednn" (float32), "bfloat16", "float16" and "int8"; one that this torch
    does not have is missing.
    """

    products: Mapping[str, Mapping[str, float]]
    reading: float

    def of(self, way: str) -> float:
        """GFLOP/s of that way at its best shape; 0 where it is missing."""
        return max(self.products.get(way, {}).values(), default=0.0)


def rates() -> Rates:
    """The measured rates of this machine as this process uses it: from the cache, or measured now."""
    return _kept(_key())


def remeasure() -> Rates:
    """The rates measured once more, and kept: the best of each figure, since a busy machine only ever shows less."""
    old, new = rates(), measure_rates()
    best = Rates(
        products={way: _best(old.products.get(way, {}), new.products.get(way, {})) for way in _WAYS},
        reading=max(old.reading, new.reading),
    )
    _keep(_key(), best)
    _kept.cache_clear()
    return best


def _best(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    return {shape: max(old.get(shape, 0.0), new.get(shape, 0.0)) for shape in {**old, **new}}


def _key() -> str:
    """Everything that changes the rates."""
    import torch

    known = {"name": processor().name, "flags": sorted(processor().flags), "isa": isa(), "format": _FORMAT}
    used = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return json.dumps(known | used | {name: os.environ.get(name) for name in (*_SWITCHES, "BLOCKPRESS_ISA")})


@cache
def _kept(key: str) -> Rates:
    found = _read(key)
    if found is None:
        found = measure_rates()
        _keep(key, found)
    return found


def _file(key: str) -> Path:
    return cache_folder() / "hardware" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def cache_folder() -> Path:
    """Where blockpress keeps what it can make again. RuntimeError where there is no home either."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "blockpress"


def _read(key: str) -> Rates | None:
    """Rates of that key; None where the file is not there, damaged, or another machine's."""
    try:
        held: Any = json.loads(_file(key).read_text(encoding="utf-8"))
        found = Rates(products=held["products"], reading=held["reading"])
        figures = [found.reading, *(rate for shapes in found.products.values() for rate in shapes.values())]
        good = held["key"] == key and all(isinstance(one, float) and 0 < one < math.inf for one in figures)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # RuntimeError: no home
        return None
    return found if good else None


def _keep(key: str, found: Rates) -> None:
    """Written whole or not at all; where nothing can be written, the next process measures again."""
    with suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            fresh = Path(folder) / file.name
            fresh.write_text(json.dumps({"key": key, **asdict(found)}, indent=1), encoding="utf-8")
            os.replace(fresh, file)


def measure_rates() -> Rates:
    """The rates, measured now, on torch's number of threads: half a second, also where a type is very slow."""
    import torch

    with torch.inference_mode():
        products = {way: dict(_products(way)) for way in _WAYS}
        ones = torch.ones(_READ // 4, device="cpu", dtype=torch.float32)
        matrix, vector = ones.view(-1, 4096), ones[:4096].clone()
        seconds = min(_fastest(ones.sum), _fastest(lambda: torch.mv(matrix, vector)))
    return Rates(products={way: found for way, found in products.items() if found}, reading=_READ / seconds / 1e9)


def _products(way: str) -> Iterator[tuple[str, float]]:
    """GFLOP/s of one way at each shape, the smallest first, until a shape would take too long."""
    rate = math.inf
    for rows, inner, outer in _SHAPES:
        work = 2e-9 * rows * inner * outer
        if work / rate > _PATIENCE:
            return
        try:
            rate = work / _fastest(_product(way, rows, inner, outer))
        except (AttributeError, RuntimeError):  # not in this build of torch
            return
        yield f"{rows}x{inner}x{outer}", rate


def _product(way: str, rows: int, inner: int, outer: int) -> Callable[[], object]:
    """A product of that shape, ready to run."""
    import torch

    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inner, generator=draw, device="cpu", dtype=torch.float32) for n in (rows, outer))
    if way == "onednn":
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda: linear(x, weight, None, "none", [], "")
    if way == "int8":
        a, b = ((10 * tensor).to(torch.int8) for tensor in (x, weight))
        return lambda: torch._int_mm(a, b.T)
    dtype = torch.float32 if way == "mkl" else getattr(torch, way)
    a, b = x.to(dtype), weight.to(dtype)
    return lambda: torch.nn.functional.linear(a, b)


def _fastest(action: Callable[[], object]) -> float:
    """The shortest of three or four runs, in seconds: the first one pays for what a library sets up."""
    best, end = math.inf, time.perf_counter() + _PATIENCE
    for run in range(4):
        begun = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - begun)
        if run > 1 and time.perf_counter() > end:
            break
    return best


def compute_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which products of weights that are stored as `storage` are fastest on `device`.

    On a processor float16 and bfloat16 stay what they are where their products are at least as fast as float32's, and
    become float32 elsewhere; on other devices the storage type is taken. BLOCKPRESS_COMPUTE_DTYPE takes the place of
    this choice wherever that type holds what is stored; int8, which rounds, is taken only where it is asked for.

    Raises:
        ConfigError: BLOCKPRESS_COMPUTE_DTYPE is no such type, or int8 and the device is no processor.
    """
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
    asked = os.environ.get("BLOCKPRESS_COMPUTE_DTYPE") or "auto"
    if asked not in (*types, "auto"):
        raise ConfigError(f"BLOCKPRESS_COMPUTE_DTYPE is {asked!r}", hint=f"it may be auto, {', '.join(types)}")
    if asked == "int8":
        if device.type != "cpu":
            raise ConfigError(
                f"BLOCKPRESS_COMPUTE_DTYPE is 'int8', and the device is {str(device)!r}",
                hint="products of integers are made on processors: unset it, or give the device 'cpu'",
            )
        return torch.int8
    if storage not in (torch.bfloat16, torch.float16) or types.get(asked) == storage:
        return storage
    if asked == "float32":
        return torch.float32
    if device.type != "cpu":
        return storage
    # Flags alone decide where the instructions are there and nothing keeps torch from using them.
    free = torch.backends.mkldnn.is_available() and not any(os.environ.get(name) for name in _SWITCHES)
    if storage == torch.bfloat16 and free and isa() in ("amx", "avx512_bf16"):
        return storage
    found = rates()
    return storage if found.of(str(storage).removeprefix("torch.")) >= found.of(float32_way()) else torch.float32


@cache
def float32_way() -> Literal["mkl", "onednn"]:
    """The better of torch's two float32 products: on AMD oneDNN's, 2.2 times MKL's where that keeps to AVX2."""
    import torch

    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "onednn" if processor().vendor == "AuthenticAMD" and has_onednn else "mkl"
