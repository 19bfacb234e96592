"""How fast this machine multiplies and reads memory, measured once, and the types and libraries that follow from it.

Why: flags alone do not tell which type is fastest. A processor without bfloat16 instructions computes bfloat16 at a
fifth to a thirtieth of float32's rate, and torch does not report it.

Invariant: figures are for this process's threads and torch's switches, or they are measured again.

Run it:  python -c "from blockpress.hardware import rates; print(rates())"
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blockpress.errors import ConfigError
from blockpress.hardware.disk import cache_folder, replacing
from blockpress.hardware.system import isa, processor

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger("blockpress")

# Besides the processor, these change how fast torch multiplies.
_SWITCHES = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_FORMAT = 2
_SHAPES = ((1, 512, 512), (16, 512, 512), (64, 512, 512), (256, 512, 512), (256, 1024, 1024))
_WAYS = ("mkl", "onednn", "bfloat16", "float16", "int8")
_PATIENCE = 0.02  # seconds for one product of one shape; a shape that would take longer is skipped
CLEARLY = 1.2
"""How much faster than float32 a 16-bit type has to be to be computed in: noise would decide between equals."""
_READ = 128 << 20  # bytes; fewer may lie in a large processor's own cache


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates: GFLOP/s of products by way and shape ("rows x in x out"), and GB/s of reading memory.

    Ways are "mkl" (float32 by torch's BLAS), "onednn" (float32), "bfloat16", "float16" and "int8"; those that this
    torch does not have are missing.
    """

    products: Mapping[str, Mapping[str, float]]
    reading: float

    def of(self, way: str) -> float:
        """GFLOP/s of that way at its best shape; 0 where it is missing."""
        return max(self.products.get(way, {}).values(), default=0.0)


def rates() -> Rates:
    """The measured rates of this machine as this process uses it: from the cache, or measured now."""
    return _cached_rates(_key())


def remeasure() -> Rates:
    """Measure again and store the better of each figure: on a busy machine rates only come out lower."""
    old, new = rates(), measure_rates()
    best = Rates(
        products={way: _best(old.products.get(way, {}), new.products.get(way, {})) for way in _WAYS},
        reading=max(old.reading, new.reading),
    )
    _store(_key(), best)
    _cached_rates.cache_clear()
    return best


def _best(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    return {shape: max(old.get(shape, 0.0), new.get(shape, 0.0)) for shape in {**old, **new}}


def _key() -> str:
    """Everything that the rates depend on, as the key of the cache."""
    import torch

    return json.dumps(_conditions(torch.__version__) | {"threads": torch.get_num_threads()})


def _conditions(torch_version: str) -> dict[str, Any]:
    """What the rates depend on, but for the number of threads."""
    known = {"name": processor().name, "flags": sorted(processor().flags), "isa": isa(), "format": _FORMAT}
    switches = {name: os.environ.get(name) for name in (*_SWITCHES, "BLOCKPRESS_ISA")}
    return known | {"torch": torch_version} | switches


def _rates_of_any_threads() -> Rates:
    """The measured rates; without torch imported, those that another number of threads had count, too."""
    if "torch" not in sys.modules:
        conditions = _conditions(version("torch"))
        with suppress(OSError):  # there is no folder for caches
            for file in sorted((cache_folder() / "hardware").glob("*.json")):
                stored = _load(file)
                if stored is not None and conditions.items() <= json.loads(stored[0]).items():
                    return stored[1]
    return rates()


@cache
def _cached_rates(key: str) -> Rates:
    measured = _read(key)
    if measured is None:
        measured = measure_rates()
        _store(key, measured)
    return measured


def _file(key: str) -> Path:
    return cache_folder() / "hardware" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(key: str) -> Rates | None:
    """The stored rates; None where the file is missing, damaged, or another machine's."""
    with suppress(OSError):  # there is no folder for caches
        stored = _load(_file(key))
        return stored[1] if stored is not None and stored[0] == key else None
    return None


def _load(file: Path) -> tuple[str, Rates] | None:
    """The key and the rates of a file; None where it is missing or damaged."""
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        key, result = data["key"], Rates(products=data["products"], reading=data["reading"])
        figures = [result.reading, *(rate for shapes in result.products.values() for rate in shapes.values())]
        good = data["sum"] == _sum(key, result) and isinstance(json.loads(key), dict)
        good = good and all(isinstance(figure, float) and 0 < figure < math.inf for figure in figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (key, result) if good else None


def _sum(key: str, measured: Rates) -> str:
    return hashlib.sha256(json.dumps([key, asdict(measured)]).encode()).hexdigest()


def _store(key: str, measured: Rates) -> None:
    """Keep the rates; where nothing can be written, the next process measures again."""
    text = json.dumps({"key": key, "sum": _sum(key, measured), **asdict(measured)}, indent=1)
    try:
        with replacing(_file(key)) as made:
            made.write_text(text, encoding="utf-8")
    except OSError as error:
        _LOG.warning("this machine's speed is measured anew in every process, which its cache would spare: %s", error)


def measure_rates() -> Rates:
    """The rates, measured now with torch's number of threads: half a second, even where a type is very slow."""
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
    """The shortest of three or four runs, in seconds: the first one includes the library's setup."""
    best, end = math.inf, time.perf_counter() + _PATIENCE
    for run in range(4):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
        if run > 1 and time.perf_counter() > end:
            break
    return best


def compute_dtype(storage: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which products of weights stored as `storage` are fastest on `device`. See `compute_name`."""
    import torch

    chosen: torch.dtype = getattr(torch, compute_name(str(storage).removeprefix("torch."), str(device)))
    return chosen


def compute_name(storage: str, device: str) -> str:
    """The name of the type in which products of weights stored as `storage` are fastest on `device`; where it follows
    from the processor's flags or from stored rates, torch is not imported.

    On a processor float16 and bfloat16 are kept where their products are faster than float32's by CLEARLY, and become
    float32 elsewhere; other devices use the storage type. BLOCKPRESS_COMPUTE_DTYPE overrides the choice wherever that
    type holds the stored values; int8, which rounds, is only used on request.

    Raises:
        ConfigError: BLOCKPRESS_COMPUTE_DTYPE is not such a type, or is int8 and the device is not a processor.
    """
    types = ("float32", "bfloat16", "float16", "int8")
    on_processor = device.partition(":")[0] == "cpu"
    requested = os.environ.get("BLOCKPRESS_COMPUTE_DTYPE") or "auto"
    if requested not in (*types, "auto"):
        raise ConfigError(f"BLOCKPRESS_COMPUTE_DTYPE is {requested!r}", hint=f"it may be auto, {', '.join(types)}")
    if requested == "int8":
        if not on_processor:
            raise ConfigError(
                f"BLOCKPRESS_COMPUTE_DTYPE is 'int8', and the device is {device!r}",
                hint="products of integers are made on processors: unset it, or give the device 'cpu'",
            )
        return "int8"
    if storage not in ("bfloat16", "float16") or requested == storage:
        return storage
    if requested == "float32":
        return "float32"
    if not on_processor:
        return storage
    # Flags alone decide where the processor has the instructions and nothing keeps torch from using them.
    free = _has_onednn() and not any(os.environ.get(name) for name in _SWITCHES)
    if storage == "bfloat16" and free and isa() in ("amx", "avx512_bf16"):
        return storage
    measured = _rates_of_any_threads()
    float32 = "onednn" if processor().vendor == "AuthenticAMD" and "onednn" in measured.products else "mkl"
    return storage if measured.of(storage) >= CLEARLY * measured.of(float32) else "float32"


def _has_onednn() -> bool:
    """Whether this torch has oneDNN; while torch is not imported, that it has, as every build for x86 does."""
    if "torch" not in sys.modules:
        return True
    import torch

    return torch.backends.mkldnn.is_available()


@cache
def float32_way() -> Literal["mkl", "onednn"]:
    """The faster of torch's two float32 products: on AMD oneDNN, 2.2 times MKL's rate where MKL is limited to AVX2."""
    import torch

    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "onednn" if processor().vendor == "AuthenticAMD" and has_onednn else "mkl"
