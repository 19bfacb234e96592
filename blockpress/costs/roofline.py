"""The least time that a forward can take: its operations and bytes, part by part, over what a device can do.

    rows        canvases    reads                  heard
    what        a step      a prefill or commit    tokens that are asked for the next one
    positions   canvas      any number             1, or a canvas that is checked
    head        yes         no                     yes

Every weight is read once a forward, however many rows there are; an expert only if a row is sent to it. Parts run one
after another, so the floor is the sum over the parts of the longer of two times: that of the bytes, that of the
operations. A read wants the last layer's keys and values alone.

Invariant: a floor is never above what the best program takes: work that a program may leave out is not counted.

Run it:  python -m pytest blockpress/costs/roofline.py tests/test_roofline.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from blockpress.config import LayerConfig, ModelConfig
from blockpress.costs.devices import Device
from blockpress.costs.memory import expert_parameters


@dataclass(frozen=True, kw_only=True)
class Width:
    """How a weight is stored, in bytes (scales included), and the type that its products are made in."""

    size: float
    math: str


@dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """The widths of a network. `dense`: attention, dense MLP, self-conditioning. `rest`: activations and cache, too."""

    experts: Width
    dense: Width
    embedding: Width
    rest: Width


_BF16, _FP8 = Width(size=2, math="bfloat16"), Width(size=1, math="fp8")
_INT4, _INT4_FP8 = Width(size=0.5625, math="bfloat16"), Width(size=0.5625, math="fp8")

WIDTHS: Mapping[str, WeightFormats] = {
    "bf16": WeightFormats(experts=_BF16, dense=_BF16, embedding=_BF16, rest=_BF16),
    "fp8": WeightFormats(experts=_FP8, dense=_FP8, embedding=_BF16, rest=_BF16),
    "fp8-all": WeightFormats(experts=_FP8, dense=_FP8, embedding=_FP8, rest=_BF16),
    "w4a16": WeightFormats(experts=_INT4, dense=_BF16, embedding=_BF16, rest=_BF16),
    "w4": WeightFormats(experts=_INT4, dense=_FP8, embedding=_BF16, rest=_BF16),
    "w4a8": WeightFormats(experts=_INT4_FP8, dense=_FP8, embedding=_FP8, rest=_BF16),
}
"""Published ways to store the weights; 4 bits with a scale of 16 bits for every 32 weights are 0.5625 bytes."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """What one forward works on. canvases: the tokens of context behind which each stands. reads: (context, tokens) of
    each prompt's chunk or commit. heard: (context, tokens) of those of which the head tells the next token."""

    canvases: tuple[int, ...] = ()
    reads: tuple[tuple[int, int], ...] = ()
    logit_rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """One part of a forward: operations, bytes that must be read, and the type of its products."""

    flops: float
    bytes: float
    math: str


def distinct(experts: int, chosen: int, tokens: int) -> float:
    """How many of the experts are met by `tokens` rows that choose `chosen` each, if all are as likely.

    >>> [round(distinct(128, 8, tokens), 1) for tokens in (0, 1, 2, 4, 16, 64, 256)]
    [0.0, 8.0, 15.5, 29.1, 82.4, 125.9, 128.0]
    """
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def forward(
    config: ModelConfig, widths: WeightFormats, rows: BatchShape, *, touched: float | None = None, soft: bool = True
) -> dict[str, Cost]:
    """Operations and bytes of the parts of one forward.

    Args:
        touched: most experts of a layer that the rows are sent to, where that was measured; None: all are as likely.
        soft: whether the soft embedding is a product over the whole vocabulary; a sparse one is counted as nothing.

    Source: reference kernels, section 1: one canvas behind 2,048 tokens, in bfloat16.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> parts = forward(published, WIDTHS["bf16"], Rows(canvases=(2048,)))
    >>> for name, work in parts.items():
    ...     print(f"{name:18} {work.flops / 1e9:6.1f} GFLOP {work.bytes / 1e9:7.3f} GB")
    projections         568.4 GFLOP   2.220 GB
    attention sliding   134.1 GFLOP   0.262 GB
    attention full       96.6 GFLOP   0.047 GB
    router                5.5 GFLOP   0.022 GB
    experts             730.8 GFLOP  45.676 GB
    dense MLP           274.1 GFLOP   1.071 GB
    head                378.0 GFLOP   1.611 GB
    sampling              0.0 GFLOP   0.134 GB
    soft embedding      378.0 GFLOP   1.611 GB
    self-conditioning     9.1 GFLOP   0.036 GB
    """
    canvas = len(rows.canvases) * config.canvas_length
    headed = canvas + sum(tokens for _, tokens in rows.logit_rows)
    every = headed + sum(tokens for _, tokens in rows.reads)
    # The rows that pass a whole layer: all of them but in the last, where a read stops at its keys and values.
    through = [every] * (len(config.layers) - 1) + [headed]
    sparse, rest = config.num_experts > 0, widths.rest
    gated, vocabulary = 3 * config.hidden_size * config.intermediate_size, config.vocab_size * config.hidden_size
    met = [
        min(
            distinct(config.num_experts, config.top_k_experts, count),
            config.num_experts if touched is None else touched,
        )
        for count in through
    ]
    routed, expert = config.hidden_size * config.num_experts, expert_parameters(config)
    logits = config.vocab_size * rest.size
    parts = {"projections": _projections(config, widths.dense, every, through)}
    parts |= _attention(config, rest, rows)
    parts |= {
        "router": _product(routed * sparse, rest, through),
        "experts": Cost(2 * sum(through) * config.top_k_experts * expert, sum(met) * expert * widths.experts.size,
                        widths.experts.math),
        "dense MLP": _product(gated, widths.dense, through),
        "head": _product(vocabulary, widths.embedding, [headed], beside=headed * logits),
        "sampling": Cost(0, headed * logits, rest.math),
        "soft embedding": _product(vocabulary, widths.embedding, [canvas * soft], beside=canvas * soft * logits),
        "self-conditioning": _product(gated, widths.dense, [canvas]),
    }  # fmt: skip
    return {name: work for name, work in parts.items() if work.flops or work.bytes}


def floor_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """The floor of a forward: its parts one after another, each as long as its bytes or its operations take.

    Source: reference kernels, section 1, at a context of 2,048 tokens, in milliseconds for 1, 2, 4, 8, 16 canvases.

    >>> from blockpress.config import PRESETS
    >>> from blockpress.costs.devices import DEVICES
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> def floors(widths, device, *batches):
    ...     steps = [forward(published, WIDTHS[widths], Rows(canvases=(2048,) * batch)) for batch in batches]
    ...     return [round(1000 * floor_seconds(step, DEVICES[device]), 2) for step in steps]
    >>> floors("bf16", "h200", 1, 2, 4, 8, 16)
    [12.99, 15.35, 20.08, 29.54, 52.64]
    >>> floors("fp8", "h200", 1, 2, 4, 8, 16)
    [7.14, 8.96, 12.62, 19.92, 36.62]
    >>> floors("w4", "h200", 1, 16), floors("w4a8", "h200", 1, 16)
    ([4.81, 44.02], [4.34, 28.96])
    >>> floors("bf16", "h100", 1, 8), floors("fp8", "h100", 1), floors("fp8", "rtx5090", 1)
    ([17.75, 34.25], [9.58], [22.72])

    A commit of a canvas alone, without the last layer behind its keys and values, and what it adds to a step:

    >>> commit = Rows(reads=((2048, 256),))
    >>> fused = Rows(reads=((2048, 256),), canvases=(2304,))
    >>> for rows in (commit, fused):
    ...     print(round(1000 * floor_seconds(forward(published, WIDTHS["bf16"], rows), DEVICES["h200"]), 2))
    11.53
    14.26
    """
    return sum(max(work.bytes / device.bandwidth, _time(work, device)) for work in parts.values())


def byte_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """How long the bytes alone take: the floor of a forward whose operations cost nothing."""
    return sum(work.bytes for work in parts.values()) / device.bandwidth


def arithmetic_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """How long the operations alone take."""
    return sum(_time(work, device) for work in parts.values())


def throughput(
    config: ModelConfig,
    widths: WeightFormats,
    device: Device,
    users: int,
    *,
    mode: Literal["diffusion", "autoregressive"],
    context: int = 2048,
    steps: float = 12.0,
) -> float:
    """Tokens a second of all users together at the floor, each behind `context` tokens.

    A canvas takes `steps` steps, the first in one forward with the commit of the canvas before it.

    >>> from blockpress.config import PRESETS
    >>> from blockpress.costs.devices import DEVICES
    >>> published, h200 = PRESETS["diffusiongemma-26B-A4B"](), DEVICES["h200"]
    >>> token = [throughput(published, WIDTHS["bf16"], h200, n, mode="autoregressive") for n in (1, 2, 4, 8, 16)]
    >>> [round(speed) for speed in token]
    [545, 794, 1062, 1363, 1799]
    >>> [round(throughput(published, WIDTHS["bf16"], h200, n, mode="diffusion", steps=16)) for n in (1, 8)]
    [1225, 4209]
    """
    if mode == "autoregressive":
        rows = BatchShape(logit_rows=((context, 1),) * users)
        return users / floor_seconds(forward(config, widths, rows), device)
    length = config.canvas_length
    alone = BatchShape(canvases=(context,) * users)
    first = BatchShape(canvases=(context,) * users, reads=((max(0, context - length), length),) * users)
    each, begin = (floor_seconds(forward(config, widths, rows), device) for rows in (alone, first))
    return users * length / (begin + (steps - 1) * each)


def _time(work: Cost, device: Device) -> float:
    return work.flops / device.rate(work.math) if work.flops else 0.0


def _product(weights: int, width: Width, through: Iterable[int], beside: float = 0.0) -> Cost:
    """A matrix of so many weights, one for each entry of `through`: how many rows pass it."""
    counts = list(through)
    read = weights * width.size * sum(count > 0 for count in counts)
    return Cost(2.0 * weights * sum(counts), read + beside, width.math)


def _projections(config: ModelConfig, width: Width, every: int, through: list[int]) -> Cost:
    """Queries and output for the rows that pass the layer, keys and values for all."""
    flops = size = 0.0
    for layer, count in zip(config.layers, through, strict=True):
        query = 2 * config.hidden_size * config.num_heads * layer.head_dim
        key = config.hidden_size * layer.kv_heads * layer.head_dim * (2 if config.has_value(layer) else 1)
        flops += 2.0 * (count * query + every * key)
        size += (query * (count > 0) + key * (every > 0)) * width.size
    return Cost(flops, size, width.math)


def _attention(config: ModelConfig, width: Width, rows: BatchShape) -> dict[str, Cost]:
    """Scores and sums of values, and the keys and values that are read for them, by kind of layer."""
    totals: dict[str, tuple[float, float]] = {}
    for index, layer in enumerate(config.layers):
        last = index == len(config.layers) - 1
        looks = [_canvas(config, layer, context) for context in rows.canvases]
        looks += [_causal(config, layer, *read) for read in (rows.logit_rows if last else rows.logit_rows + rows.reads)]
        name = "attention sliding" if layer.sliding else "attention full"
        pairs, keys = totals.get(name, (0.0, 0.0))
        pairs += 4.0 * config.num_heads * layer.head_dim * sum(pair for pair, _ in looks)
        keys += 2.0 * layer.kv_heads * layer.head_dim * width.size * sum(key for _, key in looks)
        totals[name] = (pairs, keys)
    return {name: Cost(flops, size, width.math) for name, (flops, size) in sorted(totals.items(), reverse=True)}


def _canvas(config: ModelConfig, layer: LayerConfig, context: int) -> tuple[int, int]:
    """Pairs of a query and a key, and keys, of a canvas."""
    seen = (min(context, config.sliding_window - 1) if layer.sliding else context) + config.canvas_length
    return config.canvas_length * seen, seen


def _causal(config: ModelConfig, layer: LayerConfig, context: int, tokens: int) -> tuple[int, int]:
    """The same of tokens that see what lies before them."""
    if not layer.sliding:
        return tokens * context + tokens * (tokens + 1) // 2, context + tokens
    window = config.sliding_window
    growing = max(0, min(tokens, window - context))  # the first tokens see all that there is, themselves included
    pairs = growing * context + growing * (growing + 1) // 2 + (tokens - growing) * window
    return pairs, min(context, window - 1) + tokens
