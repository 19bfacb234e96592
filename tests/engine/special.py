"""Requests that deny and pin, attention over pages in torch, and graphs on paper: what GPU paths are tested with here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from blockpress.config import PRESETS, LayerConfig, ModelConfig, Sampling
from blockpress.decoding import Done, Reply, SequenceState
from blockpress.decoding.generate import generate
from blockpress.decoding.output import TextOutputProcessor
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.attention import PagedAttention
from blockpress.engine.cuda_graphs import CudaGraphs, GraphBody, Record, Recorded
from blockpress.model import Network
from blockpress.model.masks import canvas_mask, causal_mask
from blockpress.ops.attention import plain

from ..conftest import make_random_network
from .driver import row

LAYERS = (
    LayerConfig(kind="sliding_attention", head_dim=16, kv_heads=2),
    LayerConfig(kind="full_attention", head_dim=32, kv_heads=1),
)
CONFIG = replace(PRESETS["tiny"](), context_length=192, layers=LAYERS)
"""Heads that the kernels read."""
SHORT = Sampling(steps=4, confidence=0.0)
BANNED = [{}, {3: range(1000), 9: {0, 5}}, {}, {1: range(6), **{token: {token % 12} for token in range(20, 31)}}]
PINNED = [{}, {0: 7}, {3: 3, 11: 60}]


def damped(config: ModelConfig = CONFIG) -> Network:
    """Random, its signal damped: at full strength rounding grows three to four times a step."""
    network = make_random_network(config, seed=5).requires_grad_(False)
    assert network.self_conditioning is not None
    network.self_conditioning.down_proj.weight.mul_(0.05)
    return network


def special(index: int, prompt: list[int], sampling: Sampling, **changes: Any) -> SequenceState:
    """Every other row denies something, and of three two hold pins in their first canvas."""
    turn = TextOutputProcessor(None)
    turn.banned_ids = BANNED[index % len(BANNED)]
    one = row(CONFIG, index, prompt, sampling, processor=turn, **changes)
    one.pins = PINNED[index % len(PINNED)]
    return one


def asked(given: Sequence[list[int]], samplings: Sequence[Sampling], **changes: Any) -> list[Request]:
    return [Request(special(i, given[i], one, **changes), one) for i, one in enumerate(samplings)]


def alone(network: Network, index: int, prompt: list[int], sampling: Sampling) -> Reply:
    """What the reference loop makes of a special row."""
    events = generate(network, [special(index, prompt, sampling)], sampling)
    [reply] = [event.reply for event in events if isinstance(event, Done)]
    return reply


def poison(core: EngineCore) -> EngineCore:
    """NaN in all pages, as if nothing had ever been written there."""
    for layer in range(len(core.kv_cache.kinds)):
        for part in core.kv_cache.pages(layer):
            part.fill_(torch.nan)
    return core


@dataclass(frozen=True, kw_only=True)
class SpanTable:
    """As `ops.kernels.attention` has them."""

    first: Tensor
    count: Tensor
    stop: Tensor
    causal: Tensor
    table: Tensor


class InTorch:
    """`ops/kernels/attention.py` in torch: spans one by one, in the words of its docstring."""

    SpanTable = SpanTable

    @staticmethod
    def attend(
        query: Tensor, key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor], spans: SpanTable, *, window: int | None
    ) -> Tensor:
        out = torch.zeros_like(query)
        columns = (spans.first, spans.count, spans.stop, spans.causal, spans.table)
        for first, count, stop, causal, table in zip(*(column.tolist() for column in columns), strict=True):
            if not count:
                continue
            rows, before = slice(first, first + count), stop - count if causal else stop
            start = 0 if window is None else max(0, before - (window - 1))
            at = torch.arange(start, stop)
            page = pages[0].shape[2]
            where = torch.tensor([table[i // page] for i in at.tolist()], dtype=torch.long), at % page
            keys, values = (part[:, where[0], where[1]] for part in pages)
            length = torch.tensor([before - start])
            if causal:
                mask = causal_mask(length, before - start, count, window)
            else:
                keys = torch.cat((keys, key[rows].transpose(0, 1)), dim=1)
                values = torch.cat((values, value[rows].transpose(0, 1)), dim=1)
                mask = canvas_mask(length, before - start, count, window)
            out[rows] = plain(query[rows].transpose(0, 1)[None], keys[None], values[None], mask)[0].transpose(0, 1)
        return out

    @staticmethod
    def write_kv(key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor], places: Tensor) -> None:
        for whole, part in zip(pages, (key, value), strict=True):
            page = whole.shape[2]
            whole[:, places // page, places % page] = part.transpose(0, 1)


class OnPaper:
    """Repeats work as a graph does: into the outputs of the first run, at the addresses that it had then."""

    def __init__(self, core: EngineCore) -> None:
        self.slots = core.runner.slots

    def addresses(self) -> list[int]:
        slots = self.slots
        state = (
            slots.canvas,
            slots.argmax,
            slots.signal,
            slots.unchanged,
            slots.pins,
            slots.start,
            slots.ids,
            slots.banned,
        )
        return [tensor.data_ptr() for tensor in state]

    def __call__(self, work: GraphBody) -> Recorded:
        outputs, known, before = work(), self.addresses(), [*map(len, (self.slots.ids,))]

        def replay() -> None:
            fresh = work()
            assert self.addresses()[:6] == known[:6]
            assert self.addresses() == known or len(self.slots.ids) > before[0], "moved beneath a graph"
            for field in fields(outputs):
                getattr(outputs, field.name).copy_(getattr(fresh, field.name))

        return replay, outputs


def on_paper(
    network: Network, options: EngineOptions, attention: PagedAttention | None = None, record: Record | None = None
) -> EngineCore:
    """A core that takes the way of a GPU: looks through spans, steps of canvases alone from graphs."""
    core = EngineCore(network, options)
    runner = core.runner
    runner.attention = attention or InTorch()
    runner.captured = CudaGraphs(
        network, runner.slots, core.kv_cache, options.soft_embedding, runner.attention, record or OnPaper(core)
    )
    return core
