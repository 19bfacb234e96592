"""Page ids of one kind of layer: who holds them, which are free, and which hold something that may be wanted again.

    free       nobody holds it, and what is in it means nothing
    held       by one request or by several that begin alike
    reusable   nobody holds it, but its contents are known by a digest; those of longest ago go first

      allocate --> held --release, without a digest--> free <--+
                   |  ^                                        | evict, where room is needed
           release |  | retain                                 |
                   v  |                                        |
                 reusable -------------------------------------+

Ids that follow one another are handed out where there are some: tensors behind them can be seen without a copy.

Invariant: every page is free, held or reusable, one of the three; a digest belongs to one page at most.
Run it:  python -m pytest tests/engine/test_sizing.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

_BATCH = 32


@final
class FreeRuns:
    """Free ids as runs [start, stop), no two of them side by side.

    A new request begins in the middle of the longest run, so that both it and its neighbour can grow:

    >>> runs = FreeRuns(8)
    >>> first = runs.take(2); second = runs.take(1)
    >>> first, second, runs.take(1, behind=1), runs.take(2, behind=5)
    ([0, 1], [5], [2], [6, 7])
    """

    def __init__(self, total: int) -> None:
        self._stops = {0: total} if total else {}
        self._starts = {stop: start for start, stop in self._stops.items()}
        self.count = total

    def take(self, most: int, after: int | None = None) -> list[int]:
        """At most `most` ids of one run, at least one: from the id after `after` on, if that is free."""
        assert self.count, "no id is free"
        start = self._choose() if after is None or after + 1 not in self._stops else after + 1
        stop = self._stops[start]
        count = min(most, stop - start)
        at = start
        if start != 0 and (after is None or start != after + 1):
            at = min(start + (stop - start) // 2, stop - count)
        self._remove(start)
        self._add(start, at)
        self._add(at + count, stop)
        self.count -= count
        return list(range(at, at + count))

    def longest(self, after: int | None) -> int:
        """How many ids `take` could give at most: of the run after `after` if that is free, else of the longest."""
        if not self._stops:
            return 0
        start = self._choose() if after is None or after + 1 not in self._stops else after + 1
        return self._stops[start] - start

    def put(self, page: int) -> None:
        """One more free id, joined to its neighbours."""
        start = self._starts.get(page, page)
        stop = self._stops.get(page + 1, page + 1)
        for old in {start, page + 1} & self._stops.keys():
            self._remove(old)
        self._add(start, stop)
        self.count += 1

    def ids(self) -> Iterable[int]:
        """All of them."""
        return (page for start, stop in self._stops.items() for page in range(start, stop))

    def _choose(self) -> int:
        return max(self._stops, key=lambda start: (self._stops[start] - start, -start))

    def _remove(self, start: int) -> None:
        del self._starts[self._stops.pop(start)]

    def _add(self, start: int, stop: int) -> None:
        if start < stop:
            self._stops[start], self._starts[stop] = stop, start


@final
class BlockPool:
    """`total` pages, numbered from 0."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evicted = 0
        """Reusable pages that were given up so far."""
        self._free = FreeRuns(total)
        self._holders = [0] * total
        self._digests: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._reusable: dict[int, int] = {}
        """The release in which each became reusable, the oldest first."""
        self._releases = 0

    @property
    def available(self) -> int:
        """Pages that can be handed out: the free and the reusable ones."""
        return self._free.count + len(self._reusable)

    @property
    def reusable(self) -> int:
        return len(self._reusable)

    def holders(self, page: int) -> int:
        """How many requests hold it."""
        return self._holders[page]

    def published(self, page: int) -> bool:
        """Whether its contents are known by a digest."""
        return page in self._digests

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """That many pages, held once each, after `after` where these are free; None where there are too few.

        Reusable pages are given up for a run in one piece even while as many others are free: what is in one piece is
        seen without a copy at every step of its request.
        """
        if count > self.available:
            return None
        pages: list[int] = []
        while len(pages) < count:
            if self._reusable and self._free.longest(after) < count - len(pages):
                self._evict(count - len(pages), after)
            pages += self._free.take(count - len(pages), after)
            after = pages[-1]
        for page in pages:
            assert not self._holders[page] and page not in self._digests
            self._holders[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """One more holder of a page that is held or reusable."""
        assert self._holders[page] or page in self._reusable, f"page {page} is free"
        self._reusable.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less. The last one leaves it reusable where its contents are known, and free otherwise."""
        assert self._holders[page], f"nobody holds page {page}"
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._digests:
            self._releases += 1
            self._reusable[page] = self._releases
        else:
            self._free.put(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Make its contents known. Where another page of these contents is known already, this one is not."""
        assert self._holders[page], f"nobody holds page {page}"
        if digest not in self._pages and page not in self._digests:
            self._pages[digest], self._digests[page] = page, digest

    def find(self, digest: bytes) -> int | None:
        """The page of these contents, if one is known."""
        return self._pages.get(digest)

    def withdraw(self, digest: bytes) -> None:
        """Nobody may take over the page of these contents any more; who holds it keeps it."""
        page = self._pages.get(digest)
        if page is not None:
            self._forget(page)

    def check(self) -> None:
        """Raises AssertionError where a page is in two states, or lost."""
        free = list(self._free.ids())
        held = [page for page, count in enumerate(self._holders) if count]
        assert sorted([*free, *held, *self._reusable]) == list(range(self.total)), "a page is lost, or there twice"
        assert len(free) == self._free.count and min(self._holders, default=0) >= 0
        assert self._pages == {digest: page for page, digest in self._digests.items()}
        assert set(self._reusable) <= set(self._digests) and not set(free) & set(self._digests)
        assert list(self._reusable.values()) == sorted(self._reusable.values())

    def _evict(self, count: int, after: int | None) -> None:
        """Free about `count` reusable pages that lie side by side, at least one.

        The oldest one and its neighbours, as far as these are of the older half; or, where the page after `after` is
        of that half, it and those that follow.
        """
        oldest = next(iter(self._reusable))
        half = (self._reusable[oldest] + self._releases) // 2
        follows = after is not None and self._reusable.get(after + 1, half + 1) <= half
        start = after + 1 if after is not None and follows else oldest
        stop, most = start + 1, max(count, self.total // _BATCH)
        while stop - start < most and self._reusable.get(stop, half + 1) <= half:
            stop += 1
        while stop - start < most and not follows and self._reusable.get(start - 1, half + 1) <= half:
            start -= 1
        for page in range(start, stop):
            self._forget(page)
        self.evicted += stop - start

    def _forget(self, page: int) -> None:
        """Its contents are not known any more; if nobody holds it, it is free."""
        del self._pages[self._digests.pop(page)]
        if self._reusable.pop(page, None) is not None:
            self._free.put(page)
