"""The processor, its ISA level, and a description of the machine.

Why: code is built for a level, not for one processor, so that a level below this machine's can be chosen and tested
here (BLOCKPRESS_ISA), and reports can name the level that ran.

    amx > avx512_bf16 > avx512 > avx2 > portable          neon > portable

Invariant: each level requires every flag that `ops/compiled.py` builds it with, and those of the levels below.

Run it:  python -c "from blockpress.hardware import processor; print(processor().levels)"
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blockpress.errors import ConfigError

if TYPE_CHECKING:
    import torch

Isa = Literal["amx", "avx512_bf16", "avx512", "avx2", "neon", "portable"]

ROOT = Path("/")
"""The parent of /proc and /sys; tests put a simulated machine there."""

_NEEDED: tuple[tuple[Isa, frozenset[str]], ...] = (
    ("avx2", frozenset({"avx2", "fma", "f16c"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})),
    ("avx512_bf16", frozenset({"avx512_bf16", "avx512_vnni"})),
    ("amx", frozenset({"amx_tile", "amx_bf16", "amx_int8"})),
)
"""The flags that each x86 level adds to those below it: what `ops/compiled.py` builds with."""

_NODES = ("dev/nvidiactl", "dev/kfd", "dev/dxg")
"""What Linux has for the cards that torch can use (NVIDIA's, AMD's, and either under WSL): torch, which takes a second
to import, is asked only where one of them exists."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A processor as the system describes it; flags and vendor are empty where it does not.

    `cores`: those that this process may use.
    """

    name: str
    vendor: str
    cores: int
    flags: frozenset[str]

    @property
    def levels(self) -> tuple[Isa, ...]:
        """Its ISA levels, the best first; "portable" is always the last."""
        if "asimd" in self.flags:
            return "neon", "portable"
        have: list[Isa] = ["portable"]
        for level, flags in _NEEDED:
            if not flags <= self.flags:
                break
            have.append(level)
        return tuple(reversed(have))

    @property
    def isa(self) -> Isa:
        """The best level."""
        return self.levels[0]


@cache
def processor() -> Processor:
    """This machine's processor; never fails."""
    return parse_cpuinfo(read_text("proc/cpuinfo") or _sysctl())


def parse_cpuinfo(text: str) -> Processor:
    """A processor from the text of Linux's cpuinfo, of which the first block stands for all cores."""
    pairs = [line.split(":", 1) for line in text.strip().split("\n\n")[0].splitlines() if ":" in line]
    values = {key.strip(): value.strip() for key, value in pairs}
    part = f"{platform.machine()}, implementer {values['CPU implementer']}" if "CPU implementer" in values else ""
    return Processor(
        name=values.get("model name") or part or platform.processor() or platform.machine() or "an unnamed processor",
        vendor=values.get("vendor_id") or values.get("CPU implementer", ""),
        cores=cores(),
        flags=frozenset((values.get("flags") or values.get("Features") or "").split()),
    )


def _sysctl() -> str:
    """The same text from macOS's sysctl, as far as it goes."""
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "machdep.cpu"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = [line.removeprefix("machdep.cpu.").split(": ", 1) for line in done.stdout.splitlines() if ": " in line]
    name, vendor, *flags = (
        dict(lines).get(key, "") for key in ("brand_string", "vendor", "features", "leaf7_features")
    )
    flags += ["asimd"] if platform.machine() == "arm64" else []
    return f"model name: {name}\nvendor_id: {vendor}\nflags: {' '.join(flags).lower()}"


def cores() -> int:
    """The cores that this process may use: those of its affinity, within a container's quota of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, cpu_quota() or allowed)


def cpu_quota() -> int | None:
    """Cores for which a container's quota of processor time lasts, rounded up; None where there is no quota."""
    quotas = []
    for folder, version in cgroups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        texts = " ".join(read_text(folder / name) for name in names).split()
        if len(texts) == 2 and all(text.isdigit() and int(text) for text in texts):  # no quota is "max", or -1
            quotas.append(math.ceil(int(texts[0]) / int(texts[1])))
    return min(quotas, default=None)


def isa() -> Isa:
    """The ISA level in use: the processor's best, or the one in BLOCKPRESS_ISA.

    Raises:
        ConfigError: BLOCKPRESS_ISA is not a level, or one that the processor lacks.
    """
    requested, have = os.environ.get("BLOCKPRESS_ISA"), processor().levels
    if not requested:
        return have[0]
    if requested not in have:
        raise ConfigError(f"BLOCKPRESS_ISA is {requested!r}", hint=f"{processor().name} has {', '.join(have)}")
    return requested


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU that torch can use, with its memory in bytes."""

    device: str
    name: str
    free: int
    total: int


def cards() -> list[Card]:
    """The GPUs of this machine and their free memory now, in the order of their indices."""
    if "torch" not in sys.modules and sys.platform == "linux" and not any((ROOT / node).exists() for node in _NODES):
        return []
    import torch

    result = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        result.append(Card(device=f"cuda:{index}", name=torch.cuda.get_device_name(index), free=free, total=total))
    return result


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of a GPU's multiprocessors."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count


def machine(device: torch.device | None = None) -> str:
    """A description: the processor, its cores and the first card; or of one device alone, with the threads in use."""
    import torch

    if device is None:
        card = f" and one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
        return f"{processor().cores} cores of {processor().name}{card}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {processor().name}"


def read_text(path: str | Path) -> str:
    """The text of a system file below ROOT; "" where it cannot be read."""
    try:
        return (ROOT / path).read_text(errors="replace")
    except OSError:
        return ""


def cgroups(controller: str) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """The directories, below ROOT, of the control groups that limit this process, and their version.

    The innermost first, then its parents as far as they are mounted. `controller`: "memory" or "cpu".

    Source: cgroups(7), and proc_pid_mountinfo(5) for where they are mounted.
    """
    # Without either file, which some sandboxes lack, what is mounted in the usual places counts.
    lines = read_text("proc/self/cgroup").splitlines() or ["0::/", f"1:{controller}:/"]
    for _, kinds, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        version: Literal[1, 2] = 1 if kinds else 2
        if version == 2 or controller in kinds.split(","):
            for base, root in _mounts(controller, version):
                for folder in _from(base, root, path):
                    yield folder, version


def _mounts(controller: str, version: Literal[1, 2]) -> list[tuple[Path, str]]:
    """Where control groups of that version are mounted, and the group at the root of each mount."""
    found = []
    for line in read_text("proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, (name, *_, options) = mount.split(), kind.split() or ("", "")
        if name == "cgroup2" if version == 2 else name == "cgroup" and controller in options.split(","):
            root, place = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in fields[3:5])
            found.append((Path(place.lstrip("/")), root))
    return found or [(Path("sys/fs/cgroup", "" if version == 2 else controller), "/")]


def _from(base: Path, root: str, path: str) -> Iterator[Path]:
    """The group `path` and its parents, below a mount at `base` of the group `root`."""
    depth = root.split("/").count("..")
    if depth:  # mounted from outside this process's namespace, which hides the names; a group lists its processes
        listed = (file.parent.relative_to(ROOT) for file in (ROOT / base).glob("*/" * depth + "cgroup.procs"))
        group = next((g for g in listed if str(os.getpid()) in read_text(g / "cgroup.procs").split()), base)
    elif ".." in path.split("/"):
        group = base
    else:  # in a container the path may be the host's: then the group is the root of the mount
        group = base / path.removeprefix(root.rstrip("/")).lstrip("/")
    yield from (group, *(above for above in group.parents if above.is_relative_to(base)))
