"""The pages of each request: taken as its context is read, let go as the window passes, shared where contexts agree.

    position        0     P     2P    3P    4P   read    stop
    full          [ 4  |  5  |  6  |  9  |  10 |  11 |   ]      one table a kind of layer, an entry a page
    sliding       [ -1 |  -1 |  2  |  3  |  7  |  8  |   ]      -1: DROPPED, ends at or before read - (window - 1)
                                            ^^^^^^^^^^
    whole pages are published under their digests     pages that are being written are one request's alone

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

Found = dict[LayerKind, list[int]]


@final
class BlockTables:
    """Pools of pages for each kind of layer, and what requests do with them."""

    def __init__(self, config: ModelConfig, options: EngineOptions, pages: Mapping[LayerKind, int]) -> None:
        self.page = page_length(config)
        self.pools: dict[LayerKind, BlockPool] = {kind: BlockPool(count) for kind, count in pages.items()}
        self._config, self._options = config, options
        self._window = config.sliding_window if "sliding_attention" in pages else None

    def capacity(self, request: Request) -> int | None:
        """Most tokens of context that the request could have in pages if it were alone; None: no limit."""
        limits = []
        for kind, pool in self.pools.items():
            if kind == "full_attention" or pool.total < window_pages(self._config, self._part(request)):
                limits.append(pool.total * self.page)
        return min(limits, default=None)

    def match(self, request: Request) -> Found:
        """Pages that hold the beginning of its context already, as tables; nothing is taken yet."""
        if not self._options.reuse_prefixes:
            return {kind: [] for kind in self.pools}
        pages: dict[LayerKind, list[int | None]] = {kind: [] for kind in self.pools}

        def known(number: int) -> tuple[bool, bool]:
            digest = prefix_cache.extend_digests(request, number + 1, self.page)[-1]
            for kind, pool in self.pools.items():
                pages[kind].append(pool.find(digest))
            there = {kind: found[-1] is not None for kind, found in pages.items()}
            return there.get("full_attention", True), there.get("sliding_attention", True)

        count = prefix_cache.longest_prefix(request, self.page, known, self._window)
        return {kind: self._seen(kind, found[:count], count * self.page) for kind, found in pages.items()}

    def has_room(self, request: Request, found: Found, running: Iterable[Request]) -> bool:
        """Whether its whole context fits beside what the running requests are still to read of theirs."""
        promised = dict.fromkeys(self.pools, 0)
        for other in running:
            for kind in promised:
                promised[kind] += self._lacking(kind, other, other.tables[kind], other.num_computed_tokens)
        for kind, pool in self.pools.items():
            idle = sum(page != DROPPED and not pool.holders(page) for page in found[kind])
            lacking = self._lacking(kind, request, found[kind], len(found[kind]) * self.page)
            if promised[kind] + lacking > pool.available - idle:
                return False
        return True

    def adopt(self, request: Request, found: Found) -> int:
        """Take over the pages that `match` found; returns how many tokens need not be read."""
        assert not request.tables and not request.num_computed_tokens
        for kind, table in found.items():
            for page in table:
                if page != DROPPED:
                    self.pools[kind].retain(page)
        request.tables = found
        request.num_computed_tokens = max((len(table) for table in found.values()), default=0) * self.page
        return request.num_computed_tokens

    def extend(self, request: Request, stop: int) -> bool:
        """Pages for the tokens up to `stop`, of every kind or, where there are too few, of none.

        Full pages for its whole context at once: so they follow one another, whoever else is reading.
        """
        ends = {kind: len(request.context) if kind == "full_attention" else stop for kind in self.pools}
        lacking = {kind: num_pages(end, self.page) - len(request.tables[kind]) for kind, end in ends.items()}
        if any(count > self.pools[kind].available for kind, count in lacking.items()):
            return False
        for kind, count in lacking.items():
            if count > 0:
                table = request.tables[kind]
                behind = table[-1] if table and table[-1] != DROPPED else None
                pages = self.pools[kind].allocate(count, behind)
                assert pages is not None
                table += pages
        return True

    def mark_written(self, request: Request, stop: int) -> None:
        """The tokens up to `stop` are in pages now: publish whole pages, drop what the window has passed."""
        before, request.num_computed_tokens = request.num_computed_tokens, stop
        if self._options.reuse_prefixes:
            digests = prefix_cache.extend_digests(request, stop // self.page, self.page)
            for number in range(before // self.page, stop // self.page):
                for kind, table in request.tables.items():
                    if table[number] != DROPPED:
                        self.pools[kind].publish(table[number], digests[number])
        for kind, table in request.tables.items():
            # What is dropped is a beginning of the table, so the search ends at the first page dropped before.
            for number in range(self._oldest(kind, stop) - 1, -1, -1):
                if table[number] == DROPPED:
                    break
                self.pools[kind].release(table[number])
                table[number] = DROPPED

    def release(self, request: Request, spoilt: bool = False) -> None:
        """Give all of its pages back; where they are spoilt, nobody may take them over either."""
        if spoilt:
            for digest in request.digests:
                for pool in self.pools.values():
                    pool.withdraw(digest)
        for kind, table in request.tables.items():
            # The last page first: of a chain the end is given up before the beginning, which more requests share.
            for page in reversed(table):
                if page != DROPPED:
                    self.pools[kind].release(page)
        request.tables, request.num_computed_tokens = {}, 0

    def check(self, running: Iterable[Request]) -> None:
        """Raises AssertionError where the pools do not hold exactly the pages of these requests."""
        running = list(running)
        for kind, pool in self.pools.items():
            pool.check()
            held = [page for request in running for page in request.tables[kind] if page != DROPPED]
            for page in range(pool.total):
                assert pool.holders(page) == held.count(page), f"{kind} page {page} has holders that are not there"
            for request in running:
                table, oldest = request.tables[kind], self._oldest(kind, request.num_computed_tokens)
                assert num_pages(request.num_computed_tokens, self.page) <= len(table)
                assert all((page == DROPPED) == (number < oldest) for number, page in enumerate(table))
                for page in table[request.num_computed_tokens // self.page :]:
                    assert page == DROPPED or (pool.holders(page) == 1 and not pool.published(page)), "written by two"

    def _seen(self, kind: LayerKind, found: list[int | None], stop: int) -> list[int]:
        """The table behind which position `stop` comes, without the pages that nobody sees from there."""
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

    def _lacking(self, kind: LayerKind, request: Request, table: list[int], read: int) -> int:
        """Most pages that it still has to be given until its whole context is read."""
        whole = num_pages(len(request.context), self.page)
        if kind == "full_attention" or read == len(request.context):
            return max(0, whole - len(table))
        held = sum(page != DROPPED for page in table)
        return max(0, min(whole, window_pages(self._config, self._part(request))) - held)

    def _part(self, request: Request) -> int:
        """Most tokens of the request that one forward reads."""
        longest = max((picture.length for picture in request.image_spans), default=0)
        return max(self._options.chunk, self._config.canvas_length, longest)
