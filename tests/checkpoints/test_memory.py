"""Peak memory: loading holds the weights and one tensor, saving the network and one shard.

Every case runs in a process of its own, on the kernel's count of its resident pages (VmHWM), which mapped pages of a
file are part of. A checkpoint of some 200 MB is made of a header and a hole: reading it fills pages all the same.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockpress.checkpoints.names import published_name
from blockpress.config import PRESETS, ModelConfig
from blockpress.model import Network
from tests.builders.files import INDEX
from tests.forks import python

MIB = 2**20
# What Python, torch and the allocator keep for themselves on the way (measured: 1 to 23 MiB).
SLACK = 40 * MIB

TINY = PRESETS["tiny"]()
LARGE = replace(
    TINY,
    vocab_size=32_768,
    hidden_size=1024,
    intermediate_size=2048,
    num_experts=16,
    expert_size=512,
    layers=TINY.layers * 3,
    dtype="bfloat16",
)
WHOLE = replace(LARGE, vocab_size=8192, num_experts=8, layers=LARGE.layers[:4])
MEDIUM = replace(WHOLE, layers=LARGE.layers[:2])
SMALL = replace(LARGE, vocab_size=4096, num_experts=8, layers=LARGE.layers[:2], dtype="float32")
SHARD = 16 * MIB

MEASURE = """
import ctypes, os, sys
from pathlib import Path
import torch
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, or the next would find it
from blockpress.config import GenerationConfig
from blockpress.checkpoints import load_network, save_checkpoint

torch.set_num_threads(1)
folder, shard_bytes = Path(sys.argv[1]), int(sys.argv[2])

def pages(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024

def save(network, to, **how):
    save_checkpoint(folder / to, network, generation=GenerationConfig(), **how)

def measure(action, *prepared):
    # A child each: what one case frees, the allocator may keep, and the next would find it.
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    given = [load_network(path) for path in prepared]
    base = pages("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    made = action(*given)
    print(pages("VmHWM") - base, flush=True)
    os._exit(0)

save(load_network(folder / "first"), "once")
measure(lambda: load_network(folder / "shards"))
measure(lambda: load_network(folder / "cast", dtype="float32"))
measure(lambda network: save(network, "again", dtype="bfloat16", shard_bytes=shard_bytes), folder / "saved")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' count of pages"),
]


def hollow(folder: Path, config: ModelConfig, shards: int) -> dict[str, int]:
    """A checkpoint of zeros that takes no room on the disk; gives the number of elements of each tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        shapes = {published_name(name): tuple(t.shape) for name, t in Network(config).state_dict().items()}
    itemsize = getattr(torch, config.dtype).itemsize
    code = {"bfloat16": "BF16", "float32": "F32"}[config.dtype]
    places = {}
    for number in range(shards):
        file, header, end = folder / f"model-{number + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in list(shapes)[number::shards]:
            start, end = end, end + math.prod(shapes[name]) * itemsize
            header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [start, end]}
            places[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return {name: math.prod(shape) for name, shape in shapes.items()}


Peaks = dict[str, tuple[int, dict[str, int]]]


@pytest.fixture(scope="module")
def peaks(workspace: Path) -> Peaks:
    """By case: bytes by which the peak exceeded what was there before, and the elements of each tensor."""
    folder = workspace / "memory"
    folder.mkdir()
    hollow(folder / "first", TINY, 1)
    cases = {"shards": (WHOLE, 4), "cast": (MEDIUM, 1), "saved": (SMALL, 1)}
    sizes = {name: hollow(folder / name, config, shards) for name, (config, shards) in cases.items()}
    command = [*python(), "-c", MEASURE, str(folder), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (int(peak), sizes[name]) for name, peak in zip(cases, done.stdout.split(), strict=True)}


@pytest.mark.parametrize(("case", "itemsize"), [("shards", 2), ("cast", 4)])
def test_loading_peaks_at_the_weights_and_one_tensor(case: str, itemsize: int, peaks: Peaks) -> None:
    peak, sizes = peaks[case]
    weights, largest = sum(sizes.values()) * itemsize, max(sizes.values()) * itemsize
    assert largest + SLACK < 0.4 * weights, "a second copy of the weights, or a mapped file, would not pass"
    assert weights * 0.95 < peak, "the measure sees the weights"
    assert peak < weights + largest + SLACK, f"{peak / MIB:.0f} MiB for weights of {weights / MIB:.0f}"


def test_saving_peaks_at_the_network_and_one_shard(peaks: Peaks) -> None:
    peak, sizes = peaks["saved"]
    assert max(sizes.values()) * 2 <= SHARD
    assert sum(sizes.values()) * 2 > SHARD + SLACK, "a copy of the whole network would not pass"
    assert SHARD / 2 < peak < SHARD + SLACK, f"{peak / MIB:.0f} MiB"
