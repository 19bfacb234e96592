"""A whole denoising step of the published network, random weights, in batches of canvases after 2,048 tokens.

    step       network.denoise, then the vocabulary in one pass: argmax, sample, entropy, soft embedding
    eager      launched one by one          graph      captured once and replayed
    engine     a forward of the engine's core: pages, canvas state, acceptance, and the copy of flags to the host
    tokens/s   256 tokens a canvas after 16 such steps, and a commit, which is counted as one more step

Floors are those of `costs.floor_seconds`. Routing is the random router's own: close to uniform.

Invariant: network, kernels and vocabulary are those that the engine calls; what cannot be captured is reported.
Run it:  make bench-gpu PART=steps
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from blockpress.bench.gpu.filled import EXPERTS, filled, formats_named
from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.timing import DEVICE, Timing, captured, timed
from blockpress.config import PRESETS, ModelConfig
from blockpress.costs import BatchShape, context_bytes, floor_seconds, forward_cost
from blockpress.model import Cache, Network
from blockpress.ops.vocabulary import SampleStats

CONTEXT, STEPS = 2048, 16
BATCHES = (1, 2, 4, 8, 16, 32)


@torch.inference_mode()
def bench(report: GpuReport) -> None:
    """Every format, every batch; a batch that fails ends its format, not the run."""
    config = replace(PRESETS["diffusiongemma-26B-A4B"](), vision=None)
    for form in EXPERTS:
        network = filled(config, form, torch.device("cuda"))
        for batch in BATCHES:
            try:
                _measure(report, network, form, batch)
                _measure_engine(report, network, form, batch)
            except Exception as reason:  # out of memory, or a kernel that does not take this size
                report.note(f"{form} B={batch}: {type(reason).__name__}: {str(reason)[:300]}")
                break
        del network
        torch.cuda.empty_cache()


def _measure(report: GpuReport, network: Network, form: str, batch: int) -> None:
    work = denoise_step(network, batch, CONTEXT)
    parts = forward_cost(network.config, formats_named(form), BatchShape(canvases=(CONTEXT,) * batch))
    floor = 1000 * floor_seconds(parts, DEVICE)
    _add(report, f"{form} B={batch} eager", timed(work, warmups=2, repeats=5), batch, floor, network.config)
    try:
        graph = captured(work, repeats=5)
    except Exception as reason:  # something in the step waits for the host
        torch.cuda.synchronize()
        report.note(f"{form} B={batch} graph: {type(reason).__name__}: {str(reason)[:300]}")
        return
    _add(report, f"{form} B={batch} graph", graph, batch, floor, network.config)


def _measure_engine(report: GpuReport, network: Network, form: str, batch: int) -> None:
    """The same canvases through the engine, which captures its own graph."""
    try:
        taken, eager = engine_steps(network, batch, CONTEXT)
    except ImportError as reason:  # a bare machine may lack the tokenizer's packages
        report.note(f"{form} B={batch} engine: {reason}")
        return
    parts = forward_cost(network.config, formats_named(form), BatchShape(canvases=(CONTEXT,) * batch))
    _add(report, f"{form} B={batch} engine", taken, batch, 1000 * floor_seconds(parts, DEVICE), network.config)
    if eager is not None:
        report.note(f"{form} B={batch} engine: nothing was captured: {eager}")


def engine_steps(network: Network, batch: int, context: int) -> tuple[Timing, str | None]:
    """Milliseconds of forwards of `batch` canvases and nothing else; and the reason, if none was captured."""
    from blockpress.config import Sampling
    from blockpress.decoding import SequenceState
    from blockpress.engine import EngineCore, EngineOptions, Request

    config, sampling = network.config, Sampling(steps=STEPS, confidence=0.0)
    room = batch * (context + 3 * config.canvas_length) * sum(context_bytes(config, str(network.dtype)[6:]).values())
    options = EngineOptions(max_running=batch, chunk=context, prefill_tokens=batch * context, memory=2 * room)
    core, draw = EngineCore(network, options), torch.Generator().manual_seed(batch)
    for index in range(batch):
        prompt = torch.randint(config.vocab_size, (context,), generator=draw).tolist()
        limits: dict[str, Any] = {"room": config.context_length - context, "max_tokens": config.canvas_length}
        core.submit(
            Request(
                SequenceState(index, prompt, index, stop_ids=(), canvas_length=config.canvas_length, **limits), sampling
            )
        )
    core.step()  # the prompts and the first step
    core.step()  # captures
    taken = []
    for _ in range(STEPS - 3):  # not the last step, which ends the answers
        started = time.perf_counter()
        core.step()
        taken.append(1000 * (time.perf_counter() - started))
    return Timing(median=statistics.median(taken), least=min(taken)), core.stats.eager


def _add(report: GpuReport, name: str, taken: Timing, batch: int, floor: float, config: ModelConfig) -> None:
    tokens = 1000 * batch * config.canvas_length / (STEPS + 1)
    report.add(name, taken.least, "ms", floor)
    report.add(f"{name} median", taken.median, "ms", floor)
    report.add(f"{name} S={STEPS}", tokens / taken.least, "tokens/s", tokens / floor)


def denoise_step(network: Network, batch: int, context: int) -> Callable[[], SampleStats]:
    """A denoising step of `batch` canvases after random contexts; call it in inference mode."""
    config, device = network.config, network.device
    generator = torch.Generator(device=device).manual_seed(batch)
    cache = _context(network, batch, context, generator)
    canvas = torch.randint(config.vocab_size, (batch, config.canvas_length), device=device, generator=generator)
    rows = canvas.numel()
    signal = torch.randn(batch, config.canvas_length, config.hidden_size, device=device, generator=generator).bfloat16()
    temperature = torch.full((rows,), 0.6, device=device)
    uniform = torch.rand(rows, dtype=torch.float64, device=device, generator=generator)
    scale = torch.tensor(config.hidden_size**0.5, dtype=network.dtype, device=device)
    sample_from_hidden = _sampler(device)

    def run() -> SampleStats:
        hidden = network.denoise(canvas, cache, signal).flatten(0, 1).contiguous()
        weight = network.embed_tokens.weight
        return sample_from_hidden(
            hidden, weight, cap=config.softcap, temperature=temperature, uniform=uniform, scale=scale
        )

    return run


def _sampler(device: torch.device) -> Callable[..., SampleStats]:
    """The vocabulary's kernels on a GPU, the torch version elsewhere."""
    if device.type == "cuda":
        from blockpress.ops.kernels.vocabulary import sample_from_hidden as on_gpu

        return on_gpu
    from blockpress.ops.vocabulary import sample_from_hidden

    return sample_from_hidden


def _context(network: Network, batch: int, context: int, draw: torch.Generator) -> Cache:
    """A cache of random keys and values: their values do not change how long a step takes."""
    layers = []
    for layer in network.config.layers:
        shape = (batch, layer.kv_heads, context, layer.head_dim)
        pair = [torch.randn(shape, device=network.device, generator=draw).to(network.dtype) for _ in range(2)]
        layers.append((pair[0], pair[1]))
    return Cache(tuple(layers), torch.full((batch,), context, dtype=torch.long, device=network.device))
