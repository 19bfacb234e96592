"""Block tables: a request's pages, allocated as its context is read, dropped as the window passes, shared by prefix.

    position        0     P     2P    3P    4P   read    stop
    full          [ 4  |  5  |  6  |  9  |  10 |  11 |   ]      one table per kind of layer, one entry per page
    sliding       [ -1 |  -1 |  2  |  3  |  7  |  8  |   ]      -1: DROPPED, ends at or before read - (window - 1)
                                            ^^^^^^^^^^
    full pages are published under their digests      pages being written belong to one request only

Invariant: a request's tables hold every token of `context[:num_computed_tokens]` that a token at that position or a
later one can see.
Run it:  python -m pytest tests/engine/test_prefix_cache.py tests/engine/test_scheduler.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

from blockpress.config import LayerKind, ModelConfig
from blockpress.engine import prefix_cache
from blockpress.engine.block_pool import BlockPool
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import Request
from blockpress.engine.sizing import DROPPED, num_pages, page_length, window_pages

Tables = dict[LayerKind, list[int]]


@final
class BlockTables:
    """The page pools of each kind of layer, and the block tables of requests in them."""

    def __init__(self, config: ModelConfig, options: EngineOptions, pages: Mapping[LayerKind, int]) -> None:
        self.page = page_length(config)
        self.pools: dict[LayerKind, BlockPool] = {kind: BlockPool(count) for kind, count in pages.items()}
        self._config, self._options = config, options
        self._window = config.sliding_window if "sliding_attention" in pages else None

    def capacity(self, request: Request) -> int | None:
        """The largest context that the request could have if it were alone, in tokens; None: no limit."""
        limits = []
        for kind, pool in self.pools.items():
            if kind == "full_attention" or pool.total < window_pages(self._config, self._part(request)):
                limits.append(pool.total * self.page)
        return min(limits, default=None)

    def match(self, request: Request) -> Tables:
        """Cached pages that hold the beginning of its context, as tables; they are not held yet."""
        if not self._options.reuse_prefixes:
            return {kind: [] for kind in self.pools}
        pages: dict[LayerKind, list[int | None]] = {kind: [] for kind in self.pools}

        def known(number: int) -> tuple[bool, bool]:
            digest = prefix_cache.extend_digests(request, number + 1, self.page)[-1]
            for kind, pool in self.pools.items():
                pages[kind].append(pool.find(digest))
            cached = {kind: found[-1] is not None for kind, found in pages.items()}
            return cached.get("full_attention", True), cached.get("sliding_attention", True)

        count = prefix_cache.longest_prefix(request, self.page, known, self._window)
        return {kind: self._visible(kind, found[:count], count * self.page) for kind, found in pages.items()}

    def has_room(self, request: Request, found: Tables, running: Iterable[Request]) -> bool:
        """Whether its whole context fits, given the pages that running requests still need for theirs."""
        reserved = dict.fromkeys(self.pools, 0)
        for other in running:
            for kind in reserved:
                reserved[kind] += self._missing(kind, other, other.tables[kind], other.num_computed_tokens)
        for kind, pool in self.pools.items():
            idle = sum(page != DROPPED and not pool.holders(page) for page in found[kind])
            missing = self._missing(kind, request, found[kind], len(found[kind]) * self.page)
            if reserved[kind] + missing > pool.available - idle:
                return False
        return True

    def adopt(self, request: Request, found: Tables) -> int:
        """Hold the pages that `match` found; returns how many tokens need not be computed."""
        assert not request.tables and not request.num_computed_tokens
        for kind, table in found.items():
            for page in table:
                if page != DROPPED:
                    self.pools[kind].retain(page)
        request.tables = found
        request.num_computed_tokens = max((len(table) for table in found.values()), default=0) * self.page
        return request.num_computed_tokens

    def extend(self, request: Request, stop: int) -> bool:
        """Allocate pages for the tokens up to `stop`, of every kind or, if there are too few, of none.

        Full-attention pages are allocated for the whole context at once, so that they are contiguous.
        """
        ends = {kind: len(request.context) if kind == "full_attention" else stop for kind in self.pools}
        missing = {kind: num_pages(end, self.page) - len(request.tables[kind]) for kind, end in ends.items()}
        if any(count > self.pools[kind].available for kind, count in missing.items()):
            return False
        for kind, count in missing.items():
            if count > 0:
                table = request.tables[kind]
                last = table[-1] if table and table[-1] != DROPPED else None
                pages = self.pools[kind].allocate(count, last)
                assert pages is not None
                table += pages
        return True

    def mark_written(self, request: Request, stop: int) -> None:
        """The tokens up to `stop` are in pages now: publish full pages, drop those that the window has passed."""
        before, request.num_computed_tokens = request.num_computed_tokens, stop
        if self._options.reuse_prefixes:
            digests = prefix_cache.extend_digests(request, stop // self.page, self.page)
            for number in range(before // self.page, stop // self.page):
                for kind, table in request.tables.items():
                    if table[number] != DROPPED:
                        self.pools[kind].publish(table[number], digests[number])
        for kind, table in request.tables.items():
            # Dropped pages are a prefix of the table, so the search ends at the first page dropped before.
            for number in range(self._oldest(kind, stop) - 1, -1, -1):
                if table[number] == DROPPED:
                    break
                self.pools[kind].release(table[number])
                table[number] = DROPPED

    def release(self, request: Request, discard: bool = False) -> None:
        """Release all of its pages; with `discard`, no other request may reuse them either."""
        if discard:
            for digest in request.digests:
                for pool in self.pools.values():
                    pool.withdraw(digest)
        for kind, table in request.tables.items():
            # The last page first: the end of a chain is evicted before its beginning, which more requests share.
            for page in reversed(table):
                if page != DROPPED:
                    self.pools[kind].release(page)
        request.tables, request.num_computed_tokens = {}, 0

    def check(self, running: Iterable[Request]) -> None:
        """Raises AssertionError if the pools do not hold exactly the pages of these requests."""
        running = list(running)
        for kind, pool in self.pools.items():
            pool.check()
            held = [page for request in running for page in request.tables[kind] if page != DROPPED]
            for page in range(pool.total):
                assert pool.holders(page) == held.count(page), f"{kind} page {page} has the wrong number of holders"
            for request in running:
                table, oldest = request.tables[kind], self._oldest(kind, request.num_computed_tokens)
                assert num_pages(request.num_computed_tokens, self.page) <= len(table)
                assert all((page == DROPPED) == (number < oldest) for number, page in enumerate(table))
                for page in table[request.num_computed_tokens // self.page :]:
                    assert page == DROPPED or (pool.holders(page) == 1 and not pool.published(page)), "written by two"

    def _visible(self, kind: LayerKind, found: list[int | None], stop: int) -> list[int]:
        """The table of the pages before position `stop`, without those that no token from there on can see."""
        oldest = self._oldest(kind, stop)
        table = []
        for number, page in enumerate(found):
            assert page is not None or number < oldest
            table.append(DROPPED if page is None or number < oldest else page)
        return table

    def _oldest(self, kind: LayerKind, position: int) -> int:
        """The first page that tokens from `position` on can see."""
        if kind == "full_attention" or self._window is None:
            return 0
        return max(0, position - (self._window - 1)) // self.page

    def _missing(self, kind: LayerKind, request: Request, table: list[int], read: int) -> int:
        """Most pages that it still needs until its whole context is read."""
        whole = num_pages(len(request.context), self.page)
        if kind == "full_attention" or read == len(request.context):
            return max(0, whole - len(table))
        held = sum(page != DROPPED for page in table)
        return max(0, min(whole, window_pages(self._config, self._part(request))) - held)

    def _part(self, request: Request) -> int:
        """Most tokens of the request that one forward reads."""
        longest = max((span.length for span in request.image_spans), default=0)
        return max(self._options.chunk, self._config.canvas_length, longest)
