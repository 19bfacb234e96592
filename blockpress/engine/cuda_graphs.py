"""Denoising steps as CUDA graphs: what takes 2,000 launches is one, and the processor only fills in numbers.

    parts --numbers--> pinned --copy--> static input --replay--> slots, static outputs --clones--> what the step did

A forward of canvases alone is a graph of its own for each number of canvases in `SIZES`, each width of page tables and
each kind of rules. A smaller forward is filled up with entries that are nobody's: they have no rows to look with, and
wait in the spare slot. Graphs share their memory, since one runs at a time. Before one is captured it runs twice as it
is, filled with nobody, so that kernels are compiled and nothing of a request is touched.

Invariant: a replay does what `begin_step`, the stack and `finish_step` do eagerly, and reads nothing but its inputs,
slots and pages. Where capturing fails, `failed` says why, and all further forwards are eager.
Run it:  python -m pytest tests/engine/test_cuda_graphs.py      on a GPU the ones marked `gpu`, too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockpress.config import LayerKind
from blockpress.engine.attention import PagedAttention, TritonPagedAttention
from blockpress.engine.batch import Part
from blockpress.engine.canvas_state import CanvasState, StepFeatures
from blockpress.engine.denoising import (
    FIELDS,
    CanvasBatch,
    Numbers,
    StepOutputs,
    begin_step,
    finish_step,
    packed_entry,
    padding_entry,
)
from blockpress.engine.kv_cache import KVCache
from blockpress.engine.options import SoftEmbedding
from blockpress.model import Network
from blockpress.model.layers import Experts

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Canvases of a graph: at most a third of a forward is nobody's."""

LEAST_WIDTH = 8
"""Pages of the narrowest table; wider ones have four times as many, again and again."""

KEPT = 64
"""Most graphs at a time; the one that was not used for the longest time goes."""

GraphBody = Callable[[], StepOutputs]
Recorded = tuple[Callable[[], None], StepOutputs]
Record = Callable[[GraphBody], Recorded]
"""Makes a piece of work repeatable: gives what runs it again, and the outputs that every run writes."""


@dataclass(frozen=True, kw_only=True)
class GraphKey:
    """What a graph is captured for."""

    canvases: int
    width: int
    features: StepFeatures

    @classmethod
    def of(cls, canvases: int, pages: int, most: int, features: StepFeatures) -> GraphKey:
        """The smallest graph that holds so many canvases of at most `most`, with tables of so many pages.

        >>> key = Key.of(5, 9, 32, StepFeatures(begins=False))
        >>> key.canvases, key.width, key.rules.begins
        (6, 32, True)
        >>> Key.of(7, 8, 7, StepFeatures()).canvases
        7
        """
        size, width = min(most, next((size for size in SIZES if size >= canvases), most)), LEAST_WIDTH
        while width < pages:
            width *= 4
        return cls(canvases=size, width=width, rules=StepFeatures(pinned=features.pinned, banned=features.banned))


class CudaGraphs:
    """Runs steps of canvases as recorded graphs, which it makes as they are needed."""

    def __init__(
        self,
        network: Network,
        slots: CanvasState,
        kv_cache: KVCache,
        signal: SoftEmbedding,
        attention: PagedAttention,
        record: Record | None = None,
    ) -> None:
        self.network, self.slots, self.kv_cache, self.signal, self.attention = (
            network,
            slots,
            kv_cache,
            signal,
            attention,
        )
        self.failed: str | None = None
        self.captures = self.replays = 0
        self._record = record or GraphRecorder()
        self._graphs: dict[GraphKey, CapturedGraph] = {}

    def step(self, parts: Sequence[Part], rules: StepFeatures) -> StepOutputs | None:
        """One step of these canvases, behind contexts that are in pages; None where it must be run eagerly.

        All that is given back but `host_words` are copies; `host_words` is overwritten by the next step.
        """
        if self.failed is not None:
            return None
        pages = max(len(table) for part in parts for table in part.request.tables.values())
        key = GraphKey.of(len(parts), pages, self.slots.padding_slot, rules)
        graph = self._graph(key)
        if graph is None:
            return None
        graph.fill([[*packed_entry(part), *self._tables(part, key.width)] for part in parts])
        graph.replay()
        self.replays += 1
        done, own = graph.outputs, slice(len(parts))
        return StepOutputs(
            argmax=done.argmax[own].clone(),
            accepted=done.accepted[own].clone(),
            entropy=done.entropy[own].clone(),
            changed=done.changed[own].clone(),
            host_words=done.host_words[own],
        )

    @torch.inference_mode()
    def prepare(self, most: int, pages: int = LEAST_WIDTH) -> None:
        """Capture what steps of up to `most` canvases without rules run, so that no request waits for that."""
        keys = {GraphKey.of(count, pages, self.slots.padding_slot, StepFeatures()) for count in range(1, most + 1)}
        for key in sorted(keys, key=lambda key: -key.canvases):  # the largest first: the others fit into its memory
            if self._graph(key) is None:
                return

    def _graph(self, key: GraphKey) -> CapturedGraph | None:
        """The graph of a key, as the one used last; None where it cannot be captured."""
        graph = self._graphs.pop(key, None)
        if graph is None:
            try:
                graph = self._capture(key)
            except Exception as error:  # of any kind: what cannot be captured can still be run
                self.failed = " ".join(f"{type(error).__name__}: {error}".split())
                self._graphs.clear()
                return None
        self._graphs[key] = graph
        return graph

    def _capture(self, key: GraphKey) -> CapturedGraph:
        for old in [old for old in self._graphs if 0 < old.features.banned < key.features.banned]:
            del self._graphs[old]  # ids have moved to a wider table, and nobody asks for it again
        if len(self._graphs) >= KEPT:
            del self._graphs[next(iter(self._graphs))]
        kinds = list(self.network.windows())
        nobody = [*padding_entry(self.slots.padding_slot), *[0] * (key.width * len(kinds))]
        graph = CapturedGraph(key.canvases, nobody, self.network.device)
        graph.record(self._record, lambda: self._work(graph.numbers, kinds, key))
        self.captures += 1
        return graph

    def _tables(self, part: Part, width: int) -> list[int]:
        """A request's pages in every kind of layer, as columns behind its numbers."""
        tables = [part.request.tables[kind] for kind in self.network.windows()]
        return [page for table in tables for page in (*table, *[0] * (width - len(table)))]

    def _work(self, numbers: Numbers, kinds: Sequence[LayerKind], key: GraphKey) -> StepOutputs:
        """The whole step, from its numbers on."""
        network, length = self.network, self.slots.length
        canvases = CanvasBatch.of(numbers)
        begun = begin_step(network, self.slots, canvases, key.features)
        positions = (canvases.context[:, None] + torch.arange(length, device=numbers.device)).flatten()[None]
        first = torch.arange(0, key.canvases * length, length, dtype=torch.int32, device=numbers.device)
        spans = {
            kind: self.attention.SpanTable(
                first=first,
                count=canvases.rows.int(),
                stop=canvases.context.int(),
                causal=torch.zeros_like(first, dtype=torch.bool),
                table=numbers[:, FIELDS + at * key.width : FIELDS + (at + 1) * key.width].int(),
            )
            for at, kind in enumerate(kinds)
        }
        windows = network.windows()
        attends = [
            TritonPagedAttention(self.attention, self.kv_cache.pages(layer), spans[kind], windows[kind])
            for layer, kind in enumerate(self.kv_cache.kinds)
        ]
        hidden = network.run(begun.x, positions, attends, causal=False)[0]
        return finish_step(network, self.slots, canvases, key.features, begun, hidden, self.signal)


class CapturedGraph:
    """A recorded step: its numbers in pinned memory and on the device, and where its outputs are.

    nobody: the numbers of an entry that is not used.
    """

    replay: Callable[[], None]
    outputs: StepOutputs

    def __init__(self, canvases: int, nobody: Sequence[int], device: torch.device) -> None:
        self._padding = torch.tensor(nobody)
        self._host = self._padding.expand(canvases, -1).contiguous()
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self.numbers = self._host.to(device, copy=True)

    def record(self, record: Record, work: GraphBody) -> None:
        """Record work that reads `numbers`."""
        self.replay, self.outputs = record(work)

    def fill(self, entries: Sequence[Sequence[int]]) -> None:
        """What the next replay reads. The last copy is done by then: the step that it was for has been waited for."""
        self._host[: len(entries)] = torch.tensor(entries)
        self._host[len(entries) :] = self._padding
        self.numbers.copy_(self._host, non_blocking=True)


class GraphRecorder:
    """Captures work as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: GraphBody) -> Recorded:
        """Run work twice on a stream beside the current one, then capture it."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: their calls are none of this graph's.
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
            finished = work()
        return graph.replay, finished


def why_not_capturable(network: Network, attention: PagedAttention | None) -> str | None:
    """Why steps of a network on a GPU cannot be captured: what of them would wait for the device; None: they can."""
    if attention is None:
        return "no kernels look at its pages: Triton is missing, or a head's size is no power of two from 16 on"
    if not isinstance(network.embed_tokens.weight, Tensor):
        return "its vocabulary is packed, and no kernel reads that"
    from blockpress.ops.kernels.experts import packing_of

    for name, module in network.named_modules():
        if isinstance(module, Experts):
            kinds = {packing_of(module.gate_up_proj), packing_of(module.down_proj)}
            if network.dtype != torch.bfloat16 or len(kinds) > 1 or None in kinds:
                return f"no kernel reads the experts of {name} in {network.dtype}"
    return None
