"""Denoising steps as CUDA graphs: one launch replaces 2,000, and the host only fills in numbers.

    parts --numbers--> pinned --copy--> static input --replay--> slots, static outputs --clones--> step outputs

Forwards of canvases only have one graph for each number of canvases in `SIZES`, each width of block tables and each
`StepFeatures`. A smaller forward is filled up with padding entries, which have no query rows and use the padding slot.
Graphs share their memory, since one runs at a time. Before its capture a graph's body runs twice eagerly with padding
only, so that kernels are compiled and no request is touched.

Invariant: a replay does what `begin_step`, the stack and `finish_step` do eagerly, and reads nothing but its inputs,
slots and pages. If a capture fails, `failed` says why, and all further forwards are eager.
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
from blockpress.errors import one_line
from blockpress.model import Network
from blockpress.model.layers import Experts

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Canvases of a graph: at most a third of a forward is padding."""

MIN_WIDTH = 8
"""Pages of the narrowest table; each wider one has four times as many."""

MAX_GRAPHS = 64
"""Most graphs at a time; the least recently used one is dropped."""

GraphBody = Callable[[], StepOutputs]
Recorded = tuple[Callable[[], None], StepOutputs]
Record = Callable[[GraphBody], Recorded]
"""Records a graph body: returns what replays it, and the outputs that every replay writes."""


@dataclass(frozen=True, kw_only=True)
class GraphKey:
    """What a graph is captured for."""

    canvases: int
    width: int
    features: StepFeatures

    @classmethod
    def of(cls, canvases: int, pages: int, most: int, features: StepFeatures) -> GraphKey:
        """The smallest graph that holds `canvases` canvases (`most` is the limit) and tables of `pages` pages.

        >>> key = GraphKey.of(5, 9, 32, StepFeatures(begins=False))
        >>> key.canvases, key.width, key.features.begins
        (6, 32, True)
        >>> GraphKey.of(7, 8, 7, StepFeatures()).canvases
        7
        """
        size, width = min(most, next((size for size in SIZES if size >= canvases), most)), MIN_WIDTH
        while width < pages:
            width *= 4
        return cls(canvases=size, width=width, features=StepFeatures(pinned=features.pinned, banned=features.banned))


class CudaGraphs:
    """Runs steps of canvases as graphs, captured when they are first needed."""

    def __init__(
        self,
        network: Network,
        slots: CanvasState,
        kv_cache: KVCache,
        signal: SoftEmbedding,
        attention: PagedAttention,
        record: Record | None = None,
    ) -> None:
        self.network, self.slots, self.kv_cache = network, slots, kv_cache
        self.signal, self.attention = signal, attention
        self.failed: str | None = None
        self.captures = self.replays = 0
        self._record = record or GraphRecorder()
        self._graphs: dict[GraphKey, CapturedGraph] = {}

    def step(self, parts: Sequence[Part], features: StepFeatures) -> StepOutputs | None:
        """One step of these canvases, whose contexts are in pages; None if it must run eagerly.

        The outputs are copies, except `packed_results`, which the next step overwrites.
        """
        if self.failed is not None:
            return None
        pages = max(len(table) for part in parts for table in part.request.tables.values())
        key = GraphKey.of(len(parts), pages, self.slots.padding_slot, features)
        graph = self._graph(key)
        if graph is None:
            return None
        graph.fill([[*packed_entry(part), *self._tables(part, key.width)] for part in parts])
        graph.replay()
        self.replays += 1
        outputs, used = graph.outputs, slice(len(parts))
        return StepOutputs(
            argmax=outputs.argmax[used].clone(),
            accepted=outputs.accepted[used].clone(),
            entropy=outputs.entropy[used].clone(),
            changed=outputs.changed[used].clone(),
            packed_results=outputs.packed_results[used],
        )

    @torch.inference_mode()
    def prepare(self, most: int, pages: int = MIN_WIDTH) -> None:
        """Capture the graphs for up to `most` canvases without pins and bans, so that no request waits for that."""
        keys = {GraphKey.of(count, pages, self.slots.padding_slot, StepFeatures()) for count in range(1, most + 1)}
        for key in sorted(keys, key=lambda key: -key.canvases):  # the largest first: the others fit into its memory
            if self._graph(key) is None:
                return

    def _graph(self, key: GraphKey) -> CapturedGraph | None:
        """The graph of a key, marked as most recently used; None if it cannot be captured."""
        graph = self._graphs.pop(key, None)
        if graph is None:
            try:
                graph = self._capture(key)
            except Exception as error:  # any exception: the step can still run eagerly
                self.failed = one_line(error)
                self._graphs.clear()
                return None
        self._graphs[key] = graph
        return graph

    def _capture(self, key: GraphKey) -> CapturedGraph:
        for old in [old for old in self._graphs if 0 < old.features.banned < key.features.banned]:
            del self._graphs[old]  # the banned ids have moved to a wider tensor, so it is never used again
        if len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        kinds = list(self.network.windows())
        padding = [*padding_entry(self.slots.padding_slot), *[0] * (key.width * len(kinds))]
        graph = CapturedGraph(key.canvases, padding, self.network.device)
        graph.record(self._record, lambda: self._body(graph.numbers, kinds, key))
        self.captures += 1
        return graph

    def _tables(self, part: Part, width: int) -> list[int]:
        """A request's block tables for every kind of layer, as columns after its numbers."""
        tables = [part.request.tables[kind] for kind in self.network.windows()]
        return [page for table in tables for page in (*table, *[0] * (width - len(table)))]

    def _body(self, numbers: Numbers, kinds: Sequence[LayerKind], key: GraphKey) -> StepOutputs:
        """The whole step, from its numbers to its outputs."""
        network, length = self.network, self.slots.length
        canvases = CanvasBatch.of(numbers)
        inputs = begin_step(network, self.slots, canvases, key.features)
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
        hidden = network.run(inputs.x, positions, attends, causal=False)[0]
        return finish_step(network, self.slots, canvases, key.features, inputs, hidden, self.signal)


class CapturedGraph:
    """A recorded step: its numbers in pinned memory and on the device, and its static outputs.

    padding: the numbers of an unused entry.
    """

    replay: Callable[[], None]
    outputs: StepOutputs

    def __init__(self, canvases: int, padding: Sequence[int], device: torch.device) -> None:
        self._padding = torch.tensor(padding)
        self._host = self._padding.expand(canvases, -1).contiguous()
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self.numbers = self._host.to(device, copy=True)

    def record(self, record: Record, body: GraphBody) -> None:
        """Record a body that reads `numbers`."""
        self.replay, self.outputs = record(body)

    def fill(self, entries: Sequence[Sequence[int]]) -> None:
        """Set what the next replay reads. The previous copy has finished: its step's outputs have been waited for."""
        self._host[: len(entries)] = torch.tensor(entries)
        self._host[len(entries) :] = self._padding
        self.numbers.copy_(self._host, non_blocking=True)


class GraphRecorder:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, body: GraphBody) -> Recorded:
        """Run the body twice on a side stream, then capture it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                body()
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; their calls are not part of this graph.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            outputs = body()
        return graph.replay, outputs


def why_not_capturable(network: Network, attention: PagedAttention | None) -> str | None:
    """Why steps of a network on a GPU cannot be captured, because something waits for the device; None: they can."""
    if attention is None:
        return "no kernel reads its pages: Triton is missing, or a head's size is not a power of two from 16 on"
    if not isinstance(network.embed_tokens.weight, Tensor):
        return "its vocabulary is packed, and no kernel reads that"
    from blockpress.ops.kernels.experts import packing_of

    for name, module in network.named_modules():
        if isinstance(module, Experts):
            kinds = {packing_of(module.gate_up_proj), packing_of(module.down_proj)}
            if network.dtype != torch.bfloat16 or len(kinds) > 1 or None in kinds:
                return f"no kernel reads the experts of {name} in {network.dtype}"
    return None
