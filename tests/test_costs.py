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
from blockpress.diffusion import KeyedDraws
from blockpress.engine import Core, EngineOptions, Request
from blockpress.generate import plain_denoiser
from blockpress.model import Network
from blockpress.ops import compiled
from blockpress.ops.cpu import bridge
from blockpress.reply import Row

WITHIN = 0.05
pytestmark = pytest.mark.skipif(compiled.library("rows") is None, reason="no C++ compiler: torch's softmax takes more")

SLIDING = LayerConfig(kind="sliding_attention", head_dim=64, kv_heads=4)
FULL = LayerConfig(kind="full_attention", head_dim=128, kv_heads=2)
LARGE_VOCABULARY = replace(
    PRESETS["tiny"](),
    vocab_size=65_536,
    hidden_size=128,
    intermediate_size=128,
    num_heads=8,
    layers=(SLIDING, FULL),
    sliding_window=128,
    num_experts=16,
    expert_size=32,
    canvas_length=32,
    context_length=4096,
)
LONG_CONTEXT = replace(LARGE_VOCABULARY, vocab_size=512, canvas_length=128)


def peak(action: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while `action` ran, above what there was before, with what C++ keeps."""
    gc.collect()  # else what earlier tests left is freed meanwhile, and taken off
    bridge.give_back()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "context"), [(LARGE_VOCABULARY, 40), (LONG_CONTEXT, 1500)], ids=["vocabulary", "context"]
)
@torch.inference_mode()
def test_a_steps_peak_is_predicted(config: ModelConfig, context: int, dtype: str) -> None:
    network = network_of(config, dtype)
    _, cache = network.read(torch.randint(0, config.vocab_size, (1, context)), network.empty_cache(1))
    draws = KeyedDraws([1], [0], length=config.canvas_length, vocab=config.vocab_size)
    denoiser, rows, temperature = plain_denoiser(network, cache), torch.arange(1), torch.tensor(0.5)
    canvas = draws.noise(rows, 0)
    signal = denoiser(rows, 1, canvas, None, temperature, draws).signal
    measured = peak(lambda: denoiser(rows, 2, canvas, signal, temperature, draws))
    assert costs.canvas_peak(config, dtype, context) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("behind", "tokens"), [(0, 1500), (1200, 300)], ids=["prefill", "behind a context"])
@torch.inference_mode()
def test_the_peak_of_reading_is_predicted(behind: int, tokens: int, dtype: str) -> None:
    config = LONG_CONTEXT
    network = network_of(config, dtype)
    cache = network.empty_cache(1)
    if behind:
        _, cache = network.read(torch.randint(0, config.vocab_size, (1, behind)), cache)
    stays = tokens * sum(costs.context_bytes(config, dtype).values())
    measured = peak(lambda: network.read(torch.randint(0, config.vocab_size, (1, tokens)), cache)) - stays
    assert costs.reading_peak(config, dtype, tokens, behind) == pytest.approx(measured, rel=WITHIN)


@torch.inference_mode()
def test_the_peak_of_few_wide_experts_is_predicted() -> None:
    config = replace(LONG_CONTEXT, num_experts=8, top_k_experts=4, expert_size=1024, canvas_length=64)
    network = network_of(config, "float32")
    _, cache = network.read(torch.tensor([[1, 2]]), network.empty_cache(1))
    measured = peak(lambda: network.denoise(torch.ones(1, 64, dtype=torch.long), cache, None))
    assert costs.canvas_peak(config, "float32", 2) == pytest.approx(measured, rel=2 * WITHIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_the_peak_of_the_engines_forwards_is_predicted(dtype: str) -> None:
    """A canvas alone, and one whose context is committed beside its first step."""
    # Not in the last layer, where what is committed has no queries.
    config = replace(LONG_CONTEXT, layers=(SLIDING, FULL, SLIDING))
    context, how = 1500, Sampling(steps=3, confidence=0.0)
    core = Core(network_of(config, dtype), EngineOptions(memory=1 << 26, max_running=2, chunk=512))
    prompt = torch.randint(0, config.vocab_size, (context,)).tolist()
    row = Row(0, prompt, 0, stop_ids=(), canvas_length=config.canvas_length, room=1000, max_tokens=200)
    core.submit(request := Request(row, how))
    while request.step < 1:
        core.step()
    alone = peak(core.step)
    assert costs.engine_peak(config, dtype, context) == pytest.approx(alone, rel=2 * WITHIN)
    while len(request.context) == context:
        core.step()
    together = peak(core.step)
    assert costs.engine_peak(config, dtype, context, 1, config.canvas_length) == pytest.approx(together, rel=3 * WITHIN)
