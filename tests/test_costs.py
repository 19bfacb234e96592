"""Predicted peaks of memory against those that torch's own allocator reports, for the passes that the engine runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from blockpress import costs
from blockpress.config import PRESETS, LayerConfig, ModelConfig, Sampling
from blockpress.decoding import SequenceState
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.hardware import isa
from blockpress.model import Network
from blockpress.ops import compiled
from blockpress.ops.cpu import bridge
from blockpress.ops.vocabulary import blocks, native
from tests.engine.driver import submitted

WITHIN = 0.05
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiled.library("rows") is None, reason="no C++ compiler: torch's softmax takes more"),
]

SLIDING = LayerConfig(kind="sliding_attention", head_dim=64, kv_heads=4)
FULL = LayerConfig(kind="full_attention", head_dim=128, kv_heads=2)
LARGE_VOCABULARY = replace(
    PRESETS["tiny"](),
    vocab_size=65_536,
    hidden_size=128,
    intermediate_size=128,
    num_heads=8,
    layers=(SLIDING, FULL, SLIDING),  # in the last one, what is committed has no queries
    sliding_window=128,
    num_experts=16,
    expert_size=32,
    canvas_length=32,
    context_length=4096,
)
LONG_CONTEXT = replace(LARGE_VOCABULARY, vocab_size=512, canvas_length=128)
WIDE_EXPERTS = replace(LONG_CONTEXT, num_experts=8, top_k_experts=4, expert_size=1024, canvas_length=64)
FORWARDS = {
    "over a large vocabulary": (LARGE_VOCABULARY, 40, 3 * WITHIN),
    "after a long context": (LONG_CONTEXT, 1500, 3 * WITHIN),
    "of few wide experts": (WIDE_EXPERTS, 2, 4 * WITHIN),
}
CHUNK = 512
TILES = bridge.has_tiles()
NARROW = pytest.mark.skipif(isa() not in ("amx", "avx512_bf16"), reason="bfloat16 is computed in float32 here")
DTYPES = ["float32", pytest.param("bfloat16", marks=NARROW)]


def peak(action: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while `action` ran, above what there was before, with what C++ keeps."""
    gc.collect()  # else what earlier tests left is freed meanwhile, and taken off
    bridge.give_back()
    native._table.cache_clear()  # a temperature that is new needs more memory than one whose table is kept
    held = bridge.held_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = action()
    own: dict[int, int] = {}  # torch keeps the addresses of earlier profiles, and then reports what they never took
    now = most = 0
    for address, size in allocations(recorded):
        now += size if size > 0 else -own.get(address, 0)
        own[address] = max(size, 0)
        most = max(most, now)
    del kept
    return most + bridge.held_bytes() - held


def allocations(recorded: profile) -> list[tuple[int, int]]:
    """Address and bytes of each block that was taken or (below zero) given back, in order."""
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda block: block[0])]


def network_of(config: ModelConfig, dtype: str) -> Network:
    draw = torch.Generator().manual_seed(0)
    network = Network(config).to(getattr(torch, dtype)).requires_grad_(False)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1.0))
    return network


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the buffer of products too, and so its allocator reports it."""
    monkeypatch.setattr(blocks, "LARGE", 1 << 60)


def begun(config: ModelConfig, dtype: str, context: int, running: int = 1) -> tuple[EngineCore, list[Request]]:
    """A core with so many requests, none of them read yet."""
    core = EngineCore(network_of(config, dtype), EngineOptions(memory=1 << 26, chunk=CHUNK, reuse_prefixes=False))
    requests, given = [], {"stop_ids": (), "canvas_length": config.canvas_length, "room": 1000, "max_tokens": 200}
    for index in range(running):
        prompt = torch.randint(0, config.vocab_size, (context,)).tolist()
        requests.append(Request(SequenceState(index, prompt, index, **given), Sampling(steps=3, confidence=0.0)))
    return core, submitted(core, requests)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORWARDS)
@torch.inference_mode()
def test_the_peak_of_the_engines_forwards_is_predicted(name: str, dtype: str) -> None:
    """A canvas alone, and one whose context is committed beside its first step."""
    config, context, within = FORWARDS[name]
    core, (request,) = begun(config, dtype, context)
    while request.step < 1:
        core.step()
    alone = peak(core.step)
    assert costs.engine_peak(config, dtype, context, tiles=TILES) == pytest.approx(alone, rel=within)
    while len(request.context) == context:
        core.step()
    together = peak(core.step)
    assert costs.engine_peak(config, dtype, context, 1, config.canvas_length, tiles=TILES) == pytest.approx(
        together, rel=within
    )


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_the_peak_of_prefill_is_predicted(dtype: str) -> None:
    """A chunk of a prompt at its beginning, and one after a context."""
    core, (request,) = begun(LONG_CONTEXT, dtype, 1500)
    for behind in (0, CHUNK):
        measured = peak(core.step)
        assert request.num_computed_tokens == behind + CHUNK
        assert costs.engine_peak(LONG_CONTEXT, dtype, behind, 0, CHUNK, tiles=TILES) == pytest.approx(
            measured, rel=3 * WITHIN
        )


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_the_peak_does_not_grow_with_canvases_times_the_vocabulary(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What four requests more take is less than the products of one, or on tiles, where means are in float32, than its
    float32 logits."""
    for module, name in ((blocks, "BUFFER"), (costs.memory, "PRODUCTS")):
        monkeypatch.setattr(module, name, 1 << 22)
    found = []
    for canvases in (1, 5):
        core, requests = begun(LARGE_VOCABULARY, dtype, 40, canvases)
        while min(request.step for request in requests) < 1:
            core.step()
        found.append(peak(core.step))
        predicted = costs.engine_peak(LARGE_VOCABULARY, dtype, 40, canvases, tiles=TILES)
        assert predicted == pytest.approx(found[-1], rel=3 * WITHIN)
    size = 4 if TILES else costs.DTYPE_BYTES[dtype]
    assert found[1] - found[0] < LARGE_VOCABULARY.canvas_length * LARGE_VOCABULARY.vocab_size * size
