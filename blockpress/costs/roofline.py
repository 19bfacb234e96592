"""The roofline of a forward, the least time it can take: its operations and bytes, part by part, over a device's rates.

    rows        canvases    reads                  logit rows
    what        a step      a prefill or commit    tokens whose next token is requested
    positions   canvas      any number             1, or a canvas under verification
    head        yes         no                     yes

Every weight is read once per forward, however many rows there are; an expert only if a row is routed to it. Parts run
one after another, so the floor is the sum over the parts of the longer of two times: of the bytes and of the
operations. A read needs only keys and values of the last layer.

Invariant: the floor is never above the time of the best program: work that a program may skip is not counted.

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
    """Bytes per stored weight, scales included, and the type that its products are computed in."""

    size: float
    math: str


@dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """The widths of a network. dense: attention, dense MLP, self-conditioning. rest: activations and KV cache too."""

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
"""Published weight formats; 4 bits with a 16-bit scale per 32 weights are 0.5625 bytes."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The rows of one forward. canvases: the tokens of context of each canvas. reads: (context, tokens) of each prompt
    chunk or commit. logit_rows: (context, tokens) of those whose logits the head computes. goes_on: whether there is
    a further step, and so a soft embedding."""

    canvases: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    logit_rows: tuple[tuple[int, int], ...] = ()
    goes_on: bool = True


@dataclass(frozen=True)
class Cost:
    """One part of a forward: operations, bytes to read, and the type of its products."""

    flops: float
    bytes: float
    product_dtype: str


def distinct(experts: int, chosen: int, tokens: int) -> float:
    """The expected number of experts used by `tokens` rows that choose `chosen` each, if all are equally likely.

    >>> [round(distinct(128, 8, tokens), 1) for tokens in (0, 1, 2, 4, 16, 64, 256)]
    [0.0, 8.0, 15.5, 29.1, 82.4, 125.9, 128.0]
    """
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def forward_cost(
    config: ModelConfig, widths: WeightFormats, batch: BatchShape, *, touched: float | None = None, soft: bool = True
) -> dict[str, Cost]:
    """Operations and bytes of the parts of one forward.

    Args:
        touched: most experts of a layer that the rows use, if measured; None: all are equally likely.
        soft: whether the soft embedding is a product over the whole vocabulary; a sparse one counts as nothing.

    Source: reference kernels, section 1: one canvas after 2,048 tokens, in bfloat16.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> parts = forward_cost(published, WIDTHS["bf16"], BatchShape(canvases=(2048,)))
    >>> for name, cost in parts.items():
    ...     print(f"{name:18} {cost.flops / 1e9:6.1f} GFLOP {cost.bytes / 1e9:7.3f} GB")
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
    canvas = len(batch.canvases) * config.canvas_length
    embedded = canvas * (soft and batch.goes_on)
    head_rows = canvas + sum(tokens for _, tokens in batch.logit_rows)
    all_rows = head_rows + sum(tokens for _, tokens in batch.prefills)
    # The rows that pass a whole layer: all, except in the last, where a read stops at its keys and values.
    layer_rows = [all_rows] * (len(config.layers) - 1) + [head_rows]
    sparse, rest = config.num_experts > 0, widths.rest
    gated, vocabulary = 3 * config.hidden_size * config.intermediate_size, config.vocab_size * config.hidden_size
    experts_met = [
        min(
            distinct(config.num_experts, config.top_k_experts, count),
            config.num_experts if touched is None else touched,
        )
        for count in layer_rows
    ]
    routed, expert = config.hidden_size * config.num_experts, expert_parameters(config)
    logits = config.vocab_size * rest.size
    parts = {"projections": _projections(config, widths.dense, all_rows, layer_rows)}
    parts |= _attention(config, rest, batch)
    parts |= {
        "router": _product(routed * sparse, rest, layer_rows),
        "experts": Cost(2 * sum(layer_rows) * config.top_k_experts * expert,
                        sum(experts_met) * expert * widths.experts.size, widths.experts.math),
        "dense MLP": _product(gated, widths.dense, layer_rows),
        "head": _product(vocabulary, widths.embedding, [head_rows], extra_bytes=head_rows * logits),
        "sampling": Cost(0, head_rows * logits, rest.math),
        "soft embedding": _product(vocabulary, widths.embedding, [embedded], extra_bytes=embedded * logits),
        "self-conditioning": _product(gated, widths.dense, [canvas]),
    }  # fmt: skip
    return {name: cost for name, cost in parts.items() if cost.flops or cost.bytes}


def floor_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """The floor of a forward: its parts one after another, each bound by its bytes or its operations.

    Source: reference kernels, section 1, at a context of 2,048 tokens, in milliseconds for 1, 2, 4, 8, 16 canvases.

    >>> from blockpress.config import PRESETS
    >>> from blockpress.costs.devices import DEVICES
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> def floors(widths, device, *batches):
    ...     steps = [forward_cost(published, WIDTHS[widths], BatchShape(canvases=(2048,) * batch)) for batch in batches]
    ...     return [round(1000 * floor_seconds(step, DEVICES[device]), 2) for step in steps]
    >>> floors("bf16", "h200", 1, 2, 4, 8, 16)
    [12.99, 15.35, 20.08, 29.54, 52.64]
    >>> floors("fp8", "h200", 1, 2, 4, 8, 16)
    [7.14, 8.96, 12.62, 19.92, 36.62]
    >>> floors("w4", "h200", 1, 16), floors("w4a8", "h200", 1, 16)
    ([4.81, 44.02], [4.34, 28.96])
    >>> floors("bf16", "h100", 1, 8), floors("fp8", "h100", 1), floors("fp8", "rtx5090", 1)
    ([17.75, 34.25], [9.58], [22.72])

    The commit of a canvas alone, which needs only keys and values of the last layer, and together with a step:

    >>> commit = BatchShape(prefills=((2048, 256),))
    >>> fused = BatchShape(prefills=((2048, 256),), canvases=(2304,))
    >>> for rows in (commit, fused):
    ...     print(round(1000 * floor_seconds(forward_cost(published, WIDTHS["bf16"], rows), DEVICES["h200"]), 2))
    11.53
    14.26
    """
    return sum(max(cost.bytes / device.bandwidth, _time(cost, device)) for cost in parts.values())


def byte_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """Seconds for the bytes alone: the floor of a forward whose operations cost nothing."""
    return sum(cost.bytes for cost in parts.values()) / device.bandwidth


def arithmetic_seconds(parts: Mapping[str, Cost], device: Device) -> float:
    """Seconds for the operations alone."""
    return sum(_time(cost, device) for cost in parts.values())


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
    """Tokens per second of all users together at the floor, each with `context` tokens.

    A canvas takes `steps` steps, the first in one forward with the commit of the previous canvas.

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
        return users / floor_seconds(forward_cost(config, widths, rows), device)
    length = config.canvas_length
    alone = BatchShape(canvases=(context,) * users)
    first = BatchShape(canvases=(context,) * users, prefills=((max(0, context - length), length),) * users)
    later_step, first_step = (floor_seconds(forward_cost(config, widths, rows), device) for rows in (alone, first))
    return users * length / (first_step + (steps - 1) * later_step)


def _time(cost: Cost, device: Device) -> float:
    return cost.flops / device.rate(cost.product_dtype) if cost.flops else 0.0


def _product(weights: int, width: Width, row_counts: Iterable[int], extra_bytes: float = 0.0) -> Cost:
    """Products with matrices of `weights` weights, one for each entry of `row_counts`: its number of rows."""
    counts = list(row_counts)
    read = weights * width.size * sum(count > 0 for count in counts)
    return Cost(2.0 * weights * sum(counts), read + extra_bytes, width.math)


def _projections(config: ModelConfig, width: Width, all_rows: int, layer_rows: list[int]) -> Cost:
    """Queries and output for the rows that pass the layer, keys and values for all rows."""
    flops = size = 0.0
    for layer, count in zip(config.layers, layer_rows, strict=True):
        query = 2 * config.hidden_size * config.num_heads * layer.head_dim
        key = config.hidden_size * layer.kv_heads * layer.head_dim * (2 if config.has_value(layer) else 1)
        flops += 2.0 * (count * query + all_rows * key)
        size += (query * (count > 0) + key * (all_rows > 0)) * width.size
    return Cost(flops, size, width.math)


def _attention(config: ModelConfig, width: Width, batch: BatchShape) -> dict[str, Cost]:
    """Scores and weighted values, and the keys and values read for them, by kind of layer."""
    totals: dict[str, tuple[float, float]] = {}
    for index, layer in enumerate(config.layers):
        last = index == len(config.layers) - 1
        counts = [_canvas(config, layer, context) for context in batch.canvases]
        counts += [
            _causal(config, layer, *read) for read in (batch.logit_rows if last else batch.logit_rows + batch.prefills)
        ]
        name = "attention sliding" if layer.sliding else "attention full"
        pairs, keys = totals.get(name, (0.0, 0.0))
        pairs += 4.0 * config.num_heads * layer.head_dim * sum(pair for pair, _ in counts)
        keys += 2.0 * layer.kv_heads * layer.head_dim * width.size * sum(key for _, key in counts)
        totals[name] = (pairs, keys)
    return {name: Cost(flops, size, width.math) for name, (flops, size) in sorted(totals.items(), reverse=True)}


def _canvas(config: ModelConfig, layer: LayerConfig, context: int) -> tuple[int, int]:
    """Query-key pairs, and keys, of a canvas."""
    visible = (min(context, config.sliding_window - 1) if layer.sliding else context) + config.canvas_length
    return config.canvas_length * visible, visible


def _causal(config: ModelConfig, layer: LayerConfig, context: int, tokens: int) -> tuple[int, int]:
    """The same for causal tokens."""
    if not layer.sliding:
        return tokens * context + tokens * (tokens + 1) // 2, context + tokens
    window = config.sliding_window
    growing = max(0, min(tokens, window - context))  # the first tokens attend to everything so far, themselves included
    pairs = growing * context + growing * (growing + 1) // 2 + (tokens - growing) * window
    return pairs, min(context, window - 1) + tokens
