"""This machine's fast paths compared with their plain versions: which are used here, and whether they agree.

    native       operations in C++: built here, or done by torch
    vocabulary   argmax, sample, entropy and soft embedding in one pass, against full float32 logits
    experts      all tokens' experts in grouped products, against one expert after another
    spans        attention of many requests in one batch, against each of them alone
    layers       a layer in two calls of C++, against its modules one by one
    integers     products of 8-bit integers in C++, against torch's, and how much faster than float32 they are
    engine       the fixed puzzle by the engine, against the reference loop

Invariant: a check compares numbers computed in this process; it never trusts a path because it is there.

Run it:  blockpress doctor
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from blockpress.cli.checks import DRIFT, DoctorCheck

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from blockpress.lm import LM

ROUNDED = 2e-2  # relative; a bfloat16 has eight bits
_REPORT = "report this line; until then BLOCKPRESS_NATIVE=0 leaves the C++ out"


def native() -> Iterator[DoctorCheck]:
    """Which operations run in C++."""
    from blockpress.ops import compiled

    names = sorted(source.stem for source in compiled.SOURCES.glob("*.cpp"))
    built = [name for name in names if compiled.library(name) is not None]
    missing = [name for name in names if name not in built]
    if not missing:
        yield DoctorCheck("native", "ok", f"{', '.join(built)} in C++")
        return
    reason = compiled.obstacle(missing[0])
    assert reason is not None, "it was missing a moment ago"
    other = f"; {', '.join(built)} in C++" if built else ""
    detail = f"{', '.join(missing)} by torch alone: {reason.message}{other}"
    yield DoctorCheck("native", "warn", detail, f"{reason.hint}: these steps would be faster")


def agreement(device: str) -> Iterator[DoctorCheck]:
    """The fast operations on random numbers, on that device."""
    import torch

    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        yield _vocabulary(generator, device)
        yield from _experts(generator, device)
        yield _spans(generator, device)
        yield from _layers(generator, device)
        if device == "cpu":
            yield _integers(generator)


def engine(lm: LM, puzzle: str) -> DoctorCheck:
    """The engine's answer to a puzzle against the reference loop's: the same tokens."""
    from blockpress import sudoku
    from blockpress.decoding import Done, SequenceState
    from blockpress.decoding.generate import generate
    from blockpress.engine import EngineOptions, Request
    from blockpress.engine.core import EngineCore

    prompt, sampling, config = lm.encode(sudoku.layout(puzzle)), lm.generation.sampling, lm.config

    def row() -> SequenceState:
        room = config.context_length - len(prompt)
        return SequenceState(
            0, prompt, 0, stop_ids=lm.generation.stop_ids, canvas_length=config.canvas_length, room=room
        )

    reference = next(event.reply for event in generate(lm.network, [row()], sampling) if isinstance(event, Done))
    core, replies = EngineCore(lm.network, EngineOptions(max_running=1)), []
    core.submit(Request(row=row(), sampling=sampling))
    while core.busy:
        replies += [event.reply for _, event in core.step().events if isinstance(event, Done)]
    same = bool(replies) and replies[0].tokens == reference.tokens and replies[0].usage == reference.usage
    detail = f"{'the same' if same else 'other'} tokens as the reference loop, {reference.usage.steps} steps"
    # Except in float32 on a CPU, the order of a sum may decide between two tokens.
    exact = lm.network.device.type == "cpu" and str(lm.network.dtype) == "torch.float32"
    return DoctorCheck("engine", "ok" if same else "fail" if exact else "warn", detail, "" if same else _REPORT)


def _vocabulary(generator: Generator, device: str) -> DoctorCheck:
    import torch

    from blockpress.ops import compiled, vocabulary

    rows, hidden, vocab, cap = 24, 64, 5000, 30.0
    x = torch.randn(rows, hidden, generator=generator).to(device)
    weight = torch.randn(vocab, hidden, generator=generator).to(device) * hidden**-0.5
    temperature = torch.linspace(0.4, 0.8, rows, device=device)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
    scale = torch.tensor(hidden**0.5, device=device)
    stats = vocabulary.sample_from_hidden(x, weight, cap=cap, temperature=temperature, uniform=uniform, scale=scale)
    logits = torch.tanh(x @ weight.T / cap) * cap / temperature[:, None]
    signal = torch.softmax(logits, -1) @ weight * scale
    same = torch.equal(stats.argmax, logits.argmax(-1))
    same = same and torch.equal(stats.sample, vocabulary.sample(logits[None], uniform[None])[0])
    assert stats.signal is not None
    gaps = [_gap(stats.entropy, vocabulary.entropy(logits[None])[0]), _gap(stats.signal, signal)]
    path = "C++" if device == "cpu" and compiled.library("vocabulary") is not None else "torch"
    return _compared("vocabulary", f"one pass in {path}", max(gaps), same)


def _experts(generator: Generator, device: str) -> Iterator[DoctorCheck]:
    import torch

    from blockpress.ops import experts
    from blockpress.ops.cpu import bridge

    tokens, hidden, size, count = 48, 64, 32, 16
    hidden_rows = torch.randn(tokens, hidden, generator=generator).to(device)
    gate_up_rows = torch.randn(count, 2 * size, hidden, generator=generator).to(device) * hidden**-0.5
    down_rows = torch.randn(count, hidden, size, generator=generator).to(device) * size**-0.5
    scores = torch.randn(tokens, count, generator=generator).to(device)
    weights, chosen = experts.route(scores, 4, torch.ones(count, device=device))
    for dtype, limit in ((torch.float32, DRIFT), (torch.bfloat16, ROUNDED)):
        x, gate_up, down = (tensor.to(dtype) for tensor in (hidden_rows, gate_up_rows, down_rows))
        fast, slow = (op(x, weights, chosen, gate_up, down) for op in (experts.moe_forward, experts.moe_loop))
        with torch.no_grad():
            readable = bridge.for_product(x, gate_up)
        tiles = readable is not None and dtype == torch.bfloat16 and bridge.takes_tiles(readable)
        path = "grouped products" if readable is None else "matrix tiles in C++" if tiles else "C++"
        yield _compared("experts", f"{path}, {str(dtype)[6:]}", _gap(fast, slow), limit=limit)


def _spans(generator: Generator, device: str) -> DoctorCheck:
    import torch

    from blockpress.ops import attention
    from blockpress.ops.attention import AttentionSpan
    from blockpress.ops.spans import varlen_attention

    heads, dim, sizes = 4, 16, ((12, 30), (1, 7), (12, 41), (1, 19))
    query = torch.randn(heads, sum(rows for rows, _ in sizes), dim, generator=generator).to(device)
    spans, alone, start = [], [], 0
    for rows, keys in sizes:
        key, value = torch.randn(2, 2, keys, dim, generator=generator).to(device)
        spans.append(AttentionSpan(start=start, stop=start + rows, kv=((key, value),)))
        part = query[None, :, start : start + rows]
        alone.append(attention.plain(part, key[None], value[None], None)[0])
        start += rows
    return _compared(
        "spans", f"{len(sizes)} requests in one batch", _gap(varlen_attention(query, spans), torch.cat(alone, dim=1))
    )


def _layers(generator: Generator, device: str) -> Iterator[DoctorCheck]:
    import torch

    from blockpress.config import PRESETS
    from blockpress.model import Network
    from blockpress.model.fused import fused_layer
    from blockpress.model.layers import Layer

    layer = Network(PRESETS["tiny"]()).eval().layers[0]
    assert isinstance(layer, Layer)
    for weight in layer.parameters():
        weight.copy_(
            torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5 if weight.ndim > 1 else weight
        )
    for dtype, limit in ((torch.float32, DRIFT), (torch.bfloat16, ROUNDED)):
        layer = layer.to(device, dtype)
        x = torch.randn(1, 24, layer.input_layernorm.weight.numel(), generator=generator).to(device, dtype)
        cosines = torch.ones(1, 1, 24, layer.self_attn.dim, device=device, dtype=dtype)
        inputs = (x, (cosines, cosines * 0), lambda query, key, value: query)
        path = "two calls of C++" if fused_layer(layer, x, 0) is not None else "module by module"
        gap = _gap(layer(*inputs, causal=False), layer.by_modules(*inputs, causal=False))
        yield _compared("layers", f"{path}, {str(dtype)[6:]}", gap, limit=limit)


def _integers(generator: Generator) -> DoctorCheck:
    import torch

    from blockpress.ops import integers
    from blockpress.ops.cpu import bridge
    from blockpress.ops.linear import linear

    x, weight = torch.randn(256, 512, generator=generator), torch.randn(512, 512, generator=generator)
    quantized = integers.quantized(weight)
    same = torch.equal(linear(x, quantized), integers.matmul(x, quantized))
    path = "torch" if bridge.library() is None else "C++"
    times = {kind: _fastest(lambda kind=kind: linear(x, kind)) for kind in (weight, quantized)}  # type: ignore[misc]
    speed = f"{times[weight] / times[quantized]:.1f} times as fast as float32, for --compute-dtype int8"
    detail = f"{path}: {'the same' if same else 'other'} bits as the plain one, {speed}"
    return DoctorCheck("integers", "ok" if same else "fail", detail, "" if same else _REPORT)


def _fastest(action: Callable[[], object]) -> float:
    """Seconds of the fastest of eight runs."""
    times = []
    for _ in range(8):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _gap(fast: Tensor, slow: Tensor) -> float:
    """The relative difference, by norms in float64."""
    return float((fast.double() - slow.double()).norm() / slow.double().norm())


def _compared(name: str, path: str, gap: float, same: bool = True, limit: float = DRIFT) -> DoctorCheck:
    good = same and gap <= limit
    detail = f"{path}: differs by {gap:.1e} from the plain one" + ("" if same else ", and takes other tokens")
    return DoctorCheck(name, "ok" if good else "fail", detail, "" if good else _REPORT)
