"""What is known of the machine: processors from fake texts, overrides, measured rates and their cache, limits of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blockpress import hardware
from blockpress.cli import doctor, show
from blockpress.config import PRESETS
from blockpress.engine import EngineOptions, core
from blockpress.errors import ConfigError
from blockpress.hardware import Processor, Rates, compute_dtype, memory, speed, system
from blockpress.model import Network

AVX2 = "fpu sse2 avx avx2 fma f16c bmi2"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512cd"
ZEN4 = f"{AVX512} avx512_vnni avx512_bf16"
XEON = f"{ZEN4} amx_tile amx_bf16 amx_int8"
TEXTS = {
    "amx": f"processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) 8481C\nflags\t\t: {XEON}\n\nprocessor\t: 1\nflags\t\t: fpu\n",
    "avx512_bf16": f"vendor_id : AuthenticAMD\nmodel name : AMD EPYC 9B14\nflags : {ZEN4}\n",
    "avx512": f"vendor_id : GenuineIntel\nmodel name : Xeon Gold\nflags : {AVX512} avx512_vnni\n",
    "avx2": f"vendor_id : AuthenticAMD\nmodel name : AMD EPYC 7B13\nflags : {AVX2}\n",
    "neon": "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n",
    "portable": "",
}
HALVES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither the environment nor the cache of whoever runs the tests; what is memoised here is forgotten."""
    for name in (*speed._SWITCHES, "BLOCKPRESS_ISA", "BLOCKPRESS_COMPUTE_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = system.processor, speed._cached_rates, speed.float32_way
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def fake(monkeypatch: pytest.MonkeyPatch, level: str) -> Processor:
    """This machine becomes the one of that text."""
    made = system.parse_cpuinfo(TEXTS[level])
    for module in (system, speed):
        monkeypatch.setattr(module, "processor", lambda: made)
    return made


@pytest.mark.parametrize("level", TEXTS)
def test_a_processor_is_read_from_its_text(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(TEXTS[level])
    monkeypatch.setattr(system, "ROOT", tmp_path)
    found = hardware.processor()
    assert found.isa == level == hardware.isa() and found.levels[-1] == "portable"
    assert found.name and found.cores >= 1
    assert found.vendor == {"amx": "GenuineIntel", "avx512": "GenuineIntel", "neon": "0x41", "portable": ""}.get(
        level, "AuthenticAMD"
    )


def test_an_isa_level_needs_all_flags_below_it() -> None:
    lone = Processor(
        name="odd", vendor="", cores=1, flags=frozenset(["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"])
    )
    assert lone.levels == ("portable",)


def test_a_mac_is_described_by_sysctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "ROOT", tmp_path)
    monkeypatch.setattr(system.platform, "system", lambda: "Darwin")
    assert hardware.processor().levels[-1] == "portable", "there is no sysctl here"
    told = "machdep.cpu.brand_string: Intel(R) Core(TM) i7\nmachdep.cpu.vendor: GenuineIntel\nmachdep.cpu.features: FPU AVX1.0 FMA F16C\nmachdep.cpu.leaf7_features: AVX2 BMI2\n"

    class Done:
        stdout = told

    monkeypatch.setattr(system.subprocess, "run", lambda *given, **more: Done)
    system.processor.cache_clear()
    assert (hardware.processor().name, hardware.isa()) == ("Intel(R) Core(TM) i7", "avx2")
    told = Done.stdout = "machdep.cpu.brand_string: Apple M2\n"
    monkeypatch.setattr(system.platform, "machine", lambda: "arm64")
    system.processor.cache_clear()
    assert (hardware.processor().name, hardware.isa()) == ("Apple M2", "neon")


def test_only_lower_isa_levels_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "avx512_bf16")
    for level in ("avx512", "avx2", "portable", "avx512_bf16"):
        monkeypatch.setenv("BLOCKPRESS_ISA", level)
        assert hardware.isa() == level
    for wrong in ("amx", "neon", "AVX2", "sse9"):
        monkeypatch.setenv("BLOCKPRESS_ISA", wrong)
        with pytest.raises(ConfigError, match=rf"BLOCKPRESS_ISA is '{wrong}'.*avx512_bf16, avx512, avx2, portable"):
            hardware.isa()
    monkeypatch.setenv("BLOCKPRESS_ISA", "")
    assert hardware.isa() == "avx512_bf16"


def made(**best: float) -> Rates:
    return Rates(products={way: {"1x512x512": rate / 2, "64x512x512": rate} for way, rate in best.items()}, reading=9.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Rates]:
    """Every measurement that is asked for; none is made."""
    calls: list[Rates] = []

    def measure() -> Rates:
        calls.append(made(mkl=100.0 + len(calls), bfloat16=19.0))
        return calls[-1]

    monkeypatch.setattr(speed, "measure_rates", measure)
    return calls


def again() -> Rates:
    """Rates as the next process sees them."""
    speed._cached_rates.cache_clear()
    return hardware.rates()


def test_rates_are_measured_once_a_machine(measured: list[Rates], tmp_path: Path) -> None:
    first = hardware.rates()
    assert hardware.rates() is first and again() == first and len(measured) == 1
    (file,) = (tmp_path / "cache" / "blockpress" / "hardware").iterdir()
    assert file.suffix == ".json" and first.of("mkl") == 100.0 and first.of("int8") == 0.0


@pytest.mark.parametrize("name", [*speed._SWITCHES, "BLOCKPRESS_ISA"])
def test_rates_are_kept_by_environment_switches(
    name: str, measured: list[Rates], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hardware.rates()
    monkeypatch.setenv(name, "portable" if name == "BLOCKPRESS_ISA" else "AVX2")
    assert again() != first and len(measured) == 2
    monkeypatch.delenv(name)
    assert again() == first and len(measured) == 2


def test_rates_are_kept_by_number_of_threads(measured: list[Rates]) -> None:
    threads = torch.get_num_threads()
    first = hardware.rates()
    torch.set_num_threads(threads + 1)
    try:
        assert hardware.rates() != first and len(measured) == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"key": "another", "products": {}, "reading": 1.0}', "reading: 0", "products: list", "rate: words"],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew(text: str, measured: list[Rates], tmp_path: Path) -> None:
    hardware.rates()
    (file,) = (tmp_path / "cache" / "blockpress" / "hardware").iterdir()
    held = json.loads(file.read_text())
    changes = {
        "reading: 0": {"reading": 0.0},
        "products: list": {"products": [1.0]},
        "rate: words": {"products": {"mkl": {"1x1x1": "fast"}}},
    }
    file.write_text(json.dumps(held | changes[text]) if text in changes else text)
    assert again() == measured[1]
    assert again() == measured[1] and len(measured) == 2, "and mended"


def test_a_cache_that_cannot_be_written_is_no_error(
    measured: list[Rates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hardware.rates() == measured[0] and again() == measured[1]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(speed.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("nobody's home")))
    assert again() == measured[2]


def test_the_best_rates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([made(mkl=90.0, int8=1.0), made(mkl=80.0, int8=200.0, float16=7.0)])
    monkeypatch.setattr(speed, "measure_rates", lambda: next(busy))
    best = hardware.remeasure()
    assert [best.of(way) for way in ("mkl", "int8", "float16", "bfloat16")] == [90.0, 200.0, 7.0, 0.0]
    assert hardware.rates() == best == again()


def test_measuring_is_quick_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_READ", 1 << 20)
    monkeypatch.setattr(speed, "_SHAPES", ((1, 64, 64), (32, 64, 64)))
    found = hardware.measure_rates()
    assert {"mkl", "bfloat16", "float16"} <= set(found.products) <= set(speed._WAYS)
    assert found.reading > 0 and all(found.of(way) > 0 for way in found.products)


def test_slow_shapes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_fastest", lambda action: 0.2)  # seconds, whatever the product
    assert list(hardware.measure_rates().products["bfloat16"]) == ["1x512x512"]
    monkeypatch.setattr(speed, "_fastest", lambda action: 1e-6)
    assert len(hardware.measure_rates().products["bfloat16"]) == len(speed._SHAPES)


SLOW, FAST = (
    made(mkl=100.0, onednn=100.0, bfloat16=19.0, float16=19.0),
    made(mkl=100.0, onednn=100.0, bfloat16=125.0, float16=110.0),
)


@pytest.mark.parametrize(
    ("level", "rates", "bfloat16", "float16"),
    [
        ("amx", SLOW, True, False),  # by flags, whatever was measured
        ("avx512_bf16", SLOW, True, False),
        ("avx512", SLOW, False, False),
        ("avx2", SLOW, False, False),
        ("avx2", FAST, True, False),
        ("neon", FAST, True, False),
        ("neon", made(mkl=30.0, bfloat16=80.0, float16=70.0), True, True),
        ("portable", made(mkl=5.0), False, False),
    ],
)
def test_the_compute_type_is_the_fastest(
    level: str, rates: Rates, bfloat16: bool, float16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, level)
    monkeypatch.setattr(speed, "rates", lambda: rates)
    for storage, stays in zip(HALVES, (bfloat16, float16), strict=True):
        assert compute_dtype(storage, CPU) == (storage if stays else torch.float32)
        assert compute_dtype(storage, torch.device("cuda")) == storage
    assert compute_dtype(torch.float32, CPU) == torch.float32


def test_stored_rates_of_any_number_of_threads_decide_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "avx2")
    conditions = speed._conditions(torch.__version__)
    for name, rates in (("another version", FAST), (torch.__version__, SLOW)):
        speed._store(json.dumps(conditions | {"torch": name, "threads": 99}), rates)
    (speed._file("").parent / "damaged.json").write_text("[]")
    monkeypatch.delitem(sys.modules, "torch")
    assert [hardware.compute_name(name, "cpu") for name in ("bfloat16", "float32")] == ["float32", "float32"]
    assert hardware.compute_name("bfloat16", "cuda:1") == "bfloat16" and "torch" not in sys.modules


def test_without_a_card_s_device_node_no_card_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("torch was asked"))
    with monkeypatch.context() as held:
        held.delitem(sys.modules, "torch")
        assert hardware.cards() == []
    with pytest.raises(pytest.fail.Exception, match="torch was asked"):
        hardware.cards()


def test_a_restricted_isa_decides_by_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(speed, "rates", lambda: SLOW)
    for name in speed._SWITCHES:
        with monkeypatch.context() as held:
            held.setenv(name, "AVX2")
            assert compute_dtype(torch.bfloat16, CPU) == torch.float32
    monkeypatch.setenv("BLOCKPRESS_ISA", "avx2")
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32


def test_the_compute_type_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "avx512_bf16")
    for asked in ("float32", "bfloat16"):
        monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", asked)
        assert compute_dtype(torch.bfloat16, CPU) == getattr(torch, asked)
        assert compute_dtype(torch.float32, CPU) == torch.float32, "no other type holds it"
    for asked in ("auto", "", "float16"):
        monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", asked)
        assert compute_dtype(torch.bfloat16, CPU) == torch.bfloat16
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "fp8")
    with pytest.raises(ConfigError, match=r"BLOCKPRESS_COMPUTE_DTYPE is 'fp8'.*auto, float32, bfloat16, float16, int8"):
        compute_dtype(torch.bfloat16, CPU)


def test_int8_is_used_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "avx2")
    monkeypatch.setattr(speed, "rates", lambda: made(mkl=100.0, onednn=100.0, bfloat16=19.0, int8=400.0))
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32, "they round, so that speed is no reason"
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "int8")
    for storage in (torch.float32, *HALVES):
        assert compute_dtype(storage, CPU) == torch.int8
    with pytest.raises(ConfigError, match=r"'int8', and the device is 'cuda'.*on processors: unset it"):
        compute_dtype(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(("level", "way"), [("avx2", "onednn"), ("avx512_bf16", "onednn"), ("amx", "mkl"), ("neon", "mkl")])  # fmt: skip
def test_float32_uses_onednn_on_amd(level: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, level)
    assert hardware.float32_way() == way
    speed.float32_way.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert hardware.float32_way() == "mkl"


GIB = 1 << 30
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {40 * GIB // 1024} kB\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
MOUNTS = (
    "20 1 0:5 / /proc rw - proc proc rw\n"
    "31 23 0:28 {root} {v1} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 {root} {v2} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
)
STAT = f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
CGROUPS: dict[str, tuple[dict[str, str], int, int]] = {  # files, GiB free, GiB in all
    "none": ({}, 40, 64),
    "unlimited": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.current": "9\n"}, 40, 64),
    "version 2": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": f"{8 * GIB}\n", f"{V2}/a/b/memory.current": f"{3 * GIB}\n"}, 5, 8),
    "a limit above": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max", f"{V2}/a/b/memory.current": "0", f"{V2}/a/memory.max": f"{4 * GIB}\n", f"{V2}/a/memory.current": f"{GIB}\n"}, 3, 4),
    "cached files": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{8 * GIB}\n", f"{V2}/memory.current": f"{7 * GIB}\n", f"{V2}/memory.stat": STAT}, 3, 8),
    "used up": ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{8 * GIB}\n", f"{V2}/memory.current": f"{9 * GIB}\n"}, 0, 8),
    "version 1": ({"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/x:y\n0::/\n", f"{V1}/x:y/memory.limit_in_bytes": f"{6 * GIB}\n", f"{V1}/x:y/memory.usage_in_bytes": f"{2 * GIB}\n", f"{V1}/x:y/memory.stat": STAT}, 5, 6),
    "the host's path": ({"proc/self/cgroup": "4:memory:/docker/123\n", f"{V1}/memory.limit_in_bytes": f"{6 * GIB}\n", f"{V1}/memory.usage_in_bytes": f"{2 * GIB}\n"}, 4, 6),
    "slowed down above": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": f"{8 * GIB}\n", f"{V2}/a/memory.high": f"{2 * GIB}\n", f"{V2}/a/memory.current": f"{GIB}\n"}, 1, 2),
    "slowed down, no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.high": f"{2 * GIB}\n", f"{V2}/a/memory.current": f"{GIB}\n"}, 1, 2),
    "mounted elsewhere": ({"proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": MOUNTS.format(v2="/my\\040groups", v1="/old", root="/"), "my groups/a/memory.max": f"{8 * GIB}\n", "my groups/a/memory.current": f"{GIB}\n"}, 7, 8),
    "version 1, mounted elsewhere": ({"proc/self/cgroup": "4:memory:/b\n0::/\n", "proc/self/mountinfo": MOUNTS.format(v2="/new", v1="/old", root="/"), "old/b/memory.limit_in_bytes": f"{8 * GIB}\n", "old/b/memory.usage_in_bytes": f"{GIB}\n"}, 7, 8),
    "a part mounted": ({"proc/self/cgroup": "4:memory:/docker/1/x\n", "proc/self/mountinfo": MOUNTS.format(v2="/new", v1="/old", root="/docker/1"), "old/x/memory.limit_in_bytes": f"{8 * GIB}\n", "old/x/memory.usage_in_bytes": f"{GIB}\n", "old/memory.limit_in_bytes": f"{5 * GIB}\n", "old/memory.usage_in_bytes": f"{GIB}\n"}, 4, 5),
    "mounted from outside the namespace": ({"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": MOUNTS.format(v2="/new", v1="/old", root="/../.."), "old/a/x/cgroup.procs": "1\n", "old/a/x/memory.limit_in_bytes": f"{GIB}\n", "old/a/x/memory.usage_in_bytes": "0\n", "old/a/y/cgroup.procs": f"1\n{os.getpid()}\n", "old/a/y/memory.limit_in_bytes": f"{8 * GIB}\n", "old/a/y/memory.usage_in_bytes": f"{GIB}\n"}, 7, 8),
    "a path out of the namespace": ({"proc/self/cgroup": "0::/../b\n", f"{V2}/memory.max": f"{8 * GIB}\n", f"{V2}/memory.current": f"{GIB}\n"}, 7, 8),
    "no list of groups": ({f"{V2}/memory.max": f"{8 * GIB}\n", f"{V2}/memory.current": f"{GIB}\n"}, 7, 8),
    "version 1, a parent out of sight": ({"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": "9223372036854771712\n", f"{V1}/memory.usage_in_bytes": f"{GIB}\n", f"{V1}/memory.stat": f"hierarchical_memory_limit {4 * GIB}\n"}, 3, 4),
    "damaged": ({"proc/self/cgroup": "nonsense\n0::/\n", "proc/self/mountinfo": "nonsense\n - \n", f"{V2}/memory.max": f"{8 * GIB}\n", f"{V2}/memory.current": f"{GIB}\n", f"{V2}/memory.stat": "inactive_file\nactive_file x\n"}, 7, 8),
    "version 1, unlimited": ({"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": "9223372036854771712\n", f"{V1}/memory.usage_in_bytes": "5\n"}, 40, 64),
}  # fmt: skip


def machine_of(files: dict[str, str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in ({"proc/meminfo": MEMINFO} | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(system, "ROOT", root)


@pytest.mark.parametrize("name", CGROUPS)
def test_a_container_s_memory_limit_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, free, total = CGROUPS[name]
    machine_of(files, tmp_path, monkeypatch)
    assert hardware.main_memory() == (free * GIB, total * GIB)
    assert hardware.free_memory()["cpu"] == free * GIB


def test_admission_show_and_doctor_see_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of(CGROUPS["version 2"][0], tmp_path, monkeypatch)
    for name in ("rates", "remeasure"):
        monkeypatch.setattr(hardware, name, lambda: made(mkl=50.0))
        monkeypatch.setattr(speed, name, lambda: made(mkl=50.0))
    assert show.describe("sudoku-nano")["memory"]["free"]["cpu"] == 5 * GIB
    found = next(check.detail for check in doctor.examine() if check.name == "memory")
    assert found == "5.0 GiB of 8.0 GiB free"
    monkeypatch.setattr(core, "plan_pages", lambda config, dtype, options, bytes: pytest.fail(f"{bytes / GIB} GiB"))
    with pytest.raises(pytest.fail.Exception, match=r"^2\.5 GiB$"):
        core.EngineCore(Network(PRESETS["tiny"]()), EngineOptions())


QUOTAS: dict[str, tuple[dict[str, str], int | None]] = {
    "none": ({}, None),
    "no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "max 100000\n"}, None),
    "version 2": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/cpu.max": "150000 100000\n"}, 2),
    "a limit above": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "300000 100000", f"{V2}/a/cpu.max": "100000 100000"}, 1),
    "less than a core": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "5000 100000\n"}, 1),
    "version 1": ({"proc/self/cgroup": "3:cpu,cpuacct:/x\n", f"{V2}/cpu/x/cpu.cfs_quota_us": "250000\n", f"{V2}/cpu/x/cpu.cfs_period_us": "100000\n"}, 3),
    "version 1, no limit": ({"proc/self/cgroup": "3:cpu:/x\n", f"{V2}/cpu/x/cpu.cfs_quota_us": "-1\n", f"{V2}/cpu/x/cpu.cfs_period_us": "100000\n"}, None),
    "damaged": ({f"{V2}/cpu.max": "1 2 3\n", f"{V2}/cpu/cpu.cfs_quota_us": "5\n"}, None),
    "no period": ({f"{V2}/cpu.max": "100000 0\n"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTAS)
def test_a_container_s_quota_of_time_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, quota = QUOTAS[name]
    machine_of(files, tmp_path, monkeypatch)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert system.cpu_quota() == quota and hardware.processor().cores == (quota or 6)
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert system.cores() == 1, "other cores are not this process's"


def test_torch_gets_no_more_threads_than_the_quota_lasts_for(tmp_path: Path) -> None:
    """Torch reads the number when it is imported, so this needs a process; a choice of the user's own stands."""
    code = (
        "import sys, pathlib, blockpress.hardware.system as system; system.ROOT = pathlib.Path(sys.argv[1])\n"
        "import importlib, os, blockpress; importlib.reload(blockpress); print(os.environ.get('OMP_NUM_THREADS'))"
    )
    group = tmp_path / V2
    group.mkdir(parents=True)
    for quota, given, wanted in (
        ("100000 100000", {}, "1"),
        ("max 100000", {}, "None"),
        ("1 1", {"OMP_NUM_THREADS": "3"}, "3"),
    ):
        (group / "cpu.max").write_text(quota)
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | given
        done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == wanted, done.stderr


def test_without_linux_the_whole_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ROOT", tmp_path)
    free, total = memory.main_memory()
    assert free == total > 0


def checks(name: str) -> list[str]:
    """What `doctor` says under that name; later checks are not run."""
    found: list[str] = []
    for check in doctor.examine():
        if check.name == name:
            found.append(check.detail)
        elif found:
            break
    return found


def test_doctor_reports_isa_level_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake(monkeypatch, "avx2")
    for name, value in {"processor": lambda: found, "remeasure": lambda: made(onednn=104.0, mkl=50.0, bfloat16=19.0, int8=217.0)}.items():  # fmt: skip
        monkeypatch.setattr(hardware, name, value)
    monkeypatch.setattr(speed, "rates", hardware.remeasure)
    assert checks("processor") == [f"{found.cores} cores of AMD EPYC 7B13, ISA level avx2"]
    monkeypatch.setenv("BLOCKPRESS_ISA", "portable")
    (detail,) = checks("processor")
    assert detail.endswith("ISA level portable, lowered from avx2 by BLOCKPRESS_ISA")
    (detail,) = checks("products")
    assert detail.startswith("float32 104 GFLOP/s by oneDNN, bfloat16 19, int8 217 on ")
    assert detail.endswith("reads 9 GB/s; bfloat16 weights are computed in float32")


def test_doctor_warns_that_neon_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake(monkeypatch, "neon")
    monkeypatch.setattr(hardware, "processor", lambda: found)
    monkeypatch.setattr(hardware, "remeasure", lambda: made(mkl=50.0))
    (detail,) = checks("processor")
    assert "ISA level neon" in detail and "have not run" in detail


def test_show_says_where_the_compute_type_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "diffusiongemma-26B-A4B"
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "float32")
    described = show.describe(name)
    assert (described["stored_in"], described["compute_dtype"]) == ("bfloat16", "float32")
    (line,) = [line for line in show.show_lines(described) if line.startswith("computed in")]
    assert "float32" in line and "bfloat16" in line
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "int8")
    told = show.show_lines(show.describe(name))
    assert any("int8: layers' products are made of integers" in line for line in told)
    assert any(line.startswith("in bfloat16") and "weights 24.3 GiB, computed in int8" in line for line in told)
    monkeypatch.setenv("BLOCKPRESS_COMPUTE_DTYPE", "bfloat16")
    assert not [line for line in show.show_lines(show.describe(name)) if line.startswith("computed in")]


def test_cards_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {0: ("H200", 90 * GIB, 139 * GIB), 1: ("L4", 5 * GIB, 22 * GIB)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(known))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: known[index][0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: known[index][1:])
    assert [(card.device, card.name) for card in hardware.cards()] == [("cuda:0", "H200"), ("cuda:1", "L4")]
    free = hardware.free_memory()
    assert (free.pop("cpu") > 0) and free == {"cuda:0": 90 * GIB, "cuda:1": 5 * GIB}
    for name in ("rates", "remeasure"):
        monkeypatch.setattr(speed, name, lambda: made(mkl=50.0))
        monkeypatch.setattr(hardware, name, lambda: made(mkl=50.0))
    assert checks("cuda") == [
        "cuda:0 is H200, 90.0 GiB of 139.0 GiB free",
        "cuda:1 is L4, 5.0 GiB of 22.0 GiB free",
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert checks("cuda") == ["no GPU: everything runs on the processor"]


def test_process_memory_is_read_from_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = tmp_path / "proc" / "self" / "status"
    account.parent.mkdir(parents=True)
    monkeypatch.setattr(system, "ROOT", tmp_path)
    account.write_text("Name:\tpython\nVmHWM:\t  9000 kB\nVmRSS:\t  4000 kB\n")
    peak = hardware.Peak(CPU)
    assert hardware.taken(CPU) == 4000 * 1024
    assert (account.parent / "clear_refs").read_text() == "5" and peak.value() == 5000 * 1024
    account.unlink()
    assert hardware.taken(CPU) > 16 << 20, "elsewhere than on Linux: the peak since the process began"
