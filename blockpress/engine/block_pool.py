"""Page ids of one kind of layer: which are held, which are free, and which hold contents that may be needed again.

    free       not held, contents meaningless
    held       by one request, or by several with the same prefix
    reusable   not held, but its contents have a digest; least recently released pages are evicted first

      allocate --> held --release, without a digest--> free <--+
                   |  ^                                        | evict, when room is needed
           release |  | retain                                 |
                   v  |                                        |
                 reusable -------------------------------------+

Consecutive ids are preferred: their tensors can be read as a view, without a copy.

Invariant: every page is exactly one of free, held or reusable; a digest belongs to at most one page.
Run it:  python -m pytest tests/engine/test_sizing.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

_BATCH = 32


@final
class FreeRuns:
    """Free ids as runs [start, stop), no two of them adjacent.

    A new request begins in the middle of the longest run, so that both it and its neighbour can grow:

    >>> runs = FreeRuns(8)
    >>> first = runs.take(2); second = runs.take(1)
    >>> first, second, runs.take(1, after=1), runs.take(2, after=5)
    ([0, 1], [5], [2], [6, 7])
    """

    def __init__(self, total: int) -> None:
        self._stops = {0: total} if total else {}
        self._starts = {stop: start for start, stop in self._stops.items()}
        self.count = total

    def take(self, most: int, after: int | None = None) -> list[int]:
        """At most `most` ids of one run, at least one: those that follow id `after`, if that run is free."""
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
        """The most ids that `take` could give: of the run that follows id `after` if free, else of the longest."""
        if not self._stops:
            return 0
        start = self._choose() if after is None or after + 1 not in self._stops else after + 1
        return self._stops[start] - start

    def put(self, page: int) -> None:
        """Free an id and join it to its neighbours."""
        start = self._starts.get(page, page)
        stop = self._stops.get(page + 1, page + 1)
        for old in {start, page + 1} & self._stops.keys():
            self._remove(old)
        self._add(start, stop)
        self.count += 1

    def ids(self) -> Iterable[int]:
        """All free ids."""
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
        """Reusable pages evicted so far."""
        self._free = FreeRuns(total)
        self._holders = [0] * total
        self._digests: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._reusable: dict[int, int] = {}
        """The number of the release that made each page reusable, oldest first."""
        self._releases = 0

    @property
    def available(self) -> int:
        """Pages that can be allocated: the free and the reusable ones."""
        return self._free.count + len(self._reusable)

    @property
    def reusable(self) -> int:
        return len(self._reusable)

    def holders(self, page: int) -> int:
        """How many requests hold a page."""
        return self._holders[page]

    def published(self, page: int) -> bool:
        """Whether a page's contents have a digest."""
        return page in self._digests

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, held once each, following page `after` if those are free; None if there are too few.

        Reusable pages are evicted for one contiguous run even while enough others are free: contiguous pages are read
        without a copy at every step of their request.
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
        """Add a holder to a page that is held or reusable."""
        assert self._holders[page] or page in self._reusable, f"page {page} is free"
        self._reusable.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Remove a holder. Without holders a page is reusable if its contents have a digest, and free otherwise."""
        assert self._holders[page], f"page {page} is not held"
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._digests:
            self._releases += 1
            self._reusable[page] = self._releases
        else:
            self._free.put(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Give a page's contents their digest; no effect if another page has it already."""
        assert self._holders[page], f"page {page} is not held"
        if digest not in self._pages and page not in self._digests:
            self._pages[digest], self._digests[page] = page, digest

    def find(self, digest: bytes) -> int | None:
        """The page with these contents, if there is one."""
        return self._pages.get(digest)

    def withdraw(self, digest: bytes) -> None:
        """Let no further request reuse the page with these contents; its holders keep it."""
        page = self._pages.get(digest)
        if page is not None:
            self._forget(page)

    def check(self) -> None:
        """Raises AssertionError if a page is in two states, or lost."""
        free = list(self._free.ids())
        held = [page for page, count in enumerate(self._holders) if count]
        assert sorted([*free, *held, *self._reusable]) == list(range(self.total)), "a page is lost, or there twice"
        assert len(free) == self._free.count and min(self._holders, default=0) >= 0
        assert self._pages == {digest: page for page, digest in self._digests.items()}
        assert set(self._reusable) <= set(self._digests) and not set(free) & set(self._digests)
        assert list(self._reusable.values()) == sorted(self._reusable.values())

    def _evict(self, count: int, after: int | None) -> None:
        """Free about `count` adjacent reusable pages, at least one.

        The oldest one and its neighbours, as far as these are in the older half; or, if the page that follows `after`
        is in that half, it and its successors.
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
        """Drop a page's digest; if it is not held, it becomes free."""
        del self._pages[self._digests.pop(page)]
        if self._reusable.pop(page, None) is not None:
            self._free.put(page)
