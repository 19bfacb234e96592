"""Who takes part in the next forward, with which tokens: continuous batching, decided without a tensor.

    queue                running, in order of arrival                  one forward
    F E D   --admit-->   A  canvas under way                           A        ................
                         B  finished a canvas                          B ###### ................     commit, first step
                         C  prompt of three chunks                     C ####                        second chunk
            <-preempt-   where pages run out, the youngest goes back   # read causally   . denoised

Every running request takes part in every forward, but for prompts that wait for their turn within `prefill_tokens`.
Prefill, commits and canvases share forwards, each request at a step of its own.

Invariant: running requests are older than waiting ones, and the oldest can always go on: it may have the pages of all
others. So every request ends, whatever the others do.
Run it:  python -m pytest tests/engine/test_scheduler.py tests/engine/test_state_machine.py
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from blockpress.config import LayerKind, ModelConfig
from blockpress.engine.block_tables import BlockTables
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import Request
from blockpress.errors import Overloaded, RequestError
from blockpress.multimodal.placeholders import ImageSpan, part_end


@dataclass(frozen=True)
class ScheduledRequest:
    """One request's part of a forward: its context tokens [start, stop) are read causally, perhaps none; where `canvas`
    is set, a denoising step runs after them. `num_logit_tokens`: for how many of these tokens, counted from the last,
    the hidden states are needed.

    Its tables have pages for all tokens before `stop` that are seen. start == stop only where a canvas is denoised, or
    an autoregressive request chooses its next token once more.
    """

    request: Request
    start: int
    stop: int
    canvas: bool
    num_logit_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """Pages of one kind of layer: all, those that requests hold, those that may be taken over, and how many were given
    up so far for want of room."""

    total: int
    held: int
    reusable: int
    evicted: int


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """What is, and what has been: requests, preemptions for want of pages, tokens that were not read because pages held
    them already."""

    running: int
    waiting: int
    submitted: int
    ended: int
    preemptions: int
    reused_tokens: int
    pages: Mapping[LayerKind, PageCounts]


@final
class Scheduler:
    """Plans forwards for requests that come and go. `pages`: how many of each kind there are (`pages.plan_pages`)."""

    def __init__(self, config: ModelConfig, options: EngineOptions, pages: Mapping[LayerKind, int]) -> None:
        self._config, self._options = config, options
        self._tables = BlockTables(config, options, pages)
        self._running: list[Request] = []
        self._queue: deque[Request] = deque()
        self._slots = list(range(options.max_running))
        self._submitted = self._ended = self._preemptions = self._reused = 0

    @property
    def running(self) -> int:
        """Requests that take part in forwards."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones among them."""
        return len(self._queue)

    @property
    def stats(self) -> SchedulerStats:
        pages = {
            kind: PageCounts(
                total=pool.total,
                held=pool.total - pool.available,
                reusable=pool.reusable,
                evicted=pool.evicted,
            )
            for kind, pool in self._tables.pools.items()
        }
        return SchedulerStats(
            running=self.running,
            waiting=self.waiting,
            submitted=self._submitted,
            ended=self._ended,
            preemptions=self._preemptions,
            reused_tokens=self._reused,
            pages=pages,
        )

    def submit(self, request: Request) -> None:
        """Put a request into the queue, its row's room cut to what the pages hold for it alone.

        Raises:
            Overloaded: the queue is full. RequestError: its prompt can never fit the pages; names `memory`.
        """
        assert request.state == "new", f"a request that is {request.state} was submitted before"
        capacity, prompt = self._tables.capacity(request), len(request.context)
        # What is written last is not always read, and then needs no pages.
        room = None if capacity is None else capacity - prompt + self._never_read(request)
        least = 1 if request.mode == "autoregressive" else self._config.canvas_length
        if room is not None and room < least:
            raise RequestError(
                f"the prompt has {prompt} tokens, and the pages hold a context of {prompt + room - least}",
                hint=f"raise the engine option memory (it is {self._options.memory}), or shorten the prompt",
            )
        fresh = sum(one.state == "waiting" for one in self._queue)
        if fresh >= self._options.max_waiting:
            raise Overloaded(
                f"the queue is full: {fresh} requests wait, and max_waiting is {self._options.max_waiting}",
                hint="ask again later, or raise the engine option max_waiting",
            )
        if room is not None:
            request.row.limit(room)
        request.number, request.state = self._submitted, "waiting"
        self._submitted += 1
        self._queue.append(request)

    def cancel(self, request: Request) -> None:
        """Take a request out of the queue or the batch; its pages and its slot are free at once."""
        self.end(request)

    def schedule(self) -> list[ScheduledRequest]:
        """What the next forward runs, in order of arrival; empty only where nothing is running or waiting."""
        works: list[ScheduledRequest] = []
        left = self._options.prefill_tokens
        for request in list(self._running):
            if request.state != "running":
                break  # preempted for an older one, and so is whoever is younger
            work, rest = self._part(request, request.num_computed_tokens, left)
            if work is None or self._find_pages(request, work.stop):
                left = rest
                works += [] if work is None else [work]
        while self._queue and len(self._running) < self._options.max_running:
            work, left = self._admit(self._queue[0], left)
            if work is None:
                break
            works.append(work)
        assert works or not (self._running or self._queue), "no request can go on"
        return works

    def mark_computed(self, scheduled: ScheduledRequest) -> None:
        """The forward ran: the work's tokens are in pages. Nothing happens where its request has ended since."""
        if scheduled.request.state == "running":
            assert scheduled.start == scheduled.request.num_computed_tokens, (
                "another work of this request came in between"
            )
            self._tables.mark_written(scheduled.request, scheduled.stop)

    def accept_draft(self, scheduled: ScheduledRequest, num_accepted: int) -> None:
        """The forward has read a draft, of which the first `num_accepted` tokens stand; the others leave the context."""
        request = scheduled.request
        if request.state != "running":
            return
        base = len(request.context) - request.num_draft_tokens
        del request.context[base + num_accepted :]
        request.num_draft_tokens = 0
        self.mark_computed(replace(scheduled, stop=base + num_accepted, canvas=False))

    def commit(self, request: Request, tokens: list[int], draft: bool = False) -> None:
        """What was written joins the context and is read by the next plan; without tokens it is begun again.

        Args:
            draft: the tokens may yet be taken back, by `accept_draft`.
        """
        assert request.state == "running" and not request.num_pending_tokens, (
            "what it was written behind has not been read"
        )
        request.pending_start = len(request.context)
        request.context += tokens
        request.num_draft_tokens = len(tokens) if draft else 0
        request.step = 0
        capacity = self._tables.capacity(request)
        assert capacity is None or len(request.context) <= capacity, "the row wrote more than its room"

    def end(self, request: Request, discard: bool = False) -> None:
        """A request is answered or given up: its pages and its slot are free. Nothing where it has ended already.

        Args:
            spoilt: whether what it has in pages must not be taken over by others.
        """
        if request.state in ("new", "ended"):
            return
        (self._running if request.state == "running" else self._queue).remove(request)
        self._tables.release(request, discard)
        if request.slot is not None:
            heapq.heappush(self._slots, request.slot)
        request.slot, request.state = None, "ended"
        self._ended += 1

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold; for tests."""
        self._tables.check(self._running)
        numbers = [request.number for request in (*self._running, *self._queue)]
        assert numbers == sorted(set(numbers)), "running or waiting requests are out of order"
        preempted = [request for request in self._queue if request.state == "preempted"]
        slots = [-1 if request.slot is None else request.slot for request in (*self._running, *preempted)]
        assert sorted([*slots, *self._slots]) == list(range(self._options.max_running)), "a slot is lost, or used twice"
        assert all(request.state == "running" for request in self._running)
        for request in self._queue:
            assert request.state in ("waiting", "preempted") and not request.tables and not request.num_computed_tokens
            assert (request.slot is not None) == (request.state == "preempted")

    def _never_read(self, request: Request) -> int:
        """Tokens that it writes and never reads: the last token, or the last canvas where nobody judges it."""
        if request.mode == "autoregressive":
            return 1
        return 0 if request.num_logit_tokens else self._config.canvas_length

    def _part(self, request: Request, read: int, left: int) -> tuple[ScheduledRequest | None, int]:
        """What a request can do in this forward after `read` computed tokens, and what is left of the prefill tokens.

        None where it needs more than is left; then nobody behind it gets any, so that prompts are read in turn.
        """
        end = len(request.context)
        if read >= request.pending_start:
            stop = end
        elif left == 0:
            return None, 0
        else:
            runs = [ImageSpan(one.start, one.length) for one in request.image_spans]
            stop = part_end(read, min(read + min(self._options.chunk, left), request.pending_start), runs)
            if stop - read > left and left < self._options.prefill_tokens:
                return None, 0  # a picture that is read as a whole, in a forward of which no other prompt has taken any
            left = max(0, left - (stop - read))
        canvas = stop == end and request.mode == "diffusion" and not request.num_draft_tokens
        heard = min(request.num_logit_tokens, stop - read) if stop == end else 0
        return ScheduledRequest(request, read, stop, canvas, heard), left

    def _find_pages(self, request: Request, stop: int) -> bool:
        """Pages for its tokens up to `stop`; the youngest are preempted where they run out. False: so was this one."""
        while not self._tables.extend(request, stop):
            youngest = self._running.pop()
            self._tables.release(youngest)
            youngest.state = "preempted"
            self._queue.appendleft(youngest)
            self._preemptions += 1
            if youngest is request:
                return False
        return True

    def _admit(self, request: Request, left: int) -> tuple[ScheduledRequest | None, int]:
        """Take the first of the queue into the batch; None where pages or prefill tokens do not suffice."""
        found = self._tables.match(request)
        read = max((len(table) for table in found.values()), default=0) * self._tables.page
        work, rest = self._part(request, read, left)
        if work is None or not self._tables.has_room(request, found, self._running):
            return None, left
        self._queue.popleft()
        self._reused += self._tables.adopt(request, found)
        if request.slot is None:
            request.slot = heapq.heappop(self._slots)
        request.state = "running"
        self._running.append(request)
        fits = self._tables.extend(request, work.stop)
        assert fits, "room that was there is gone"
        return work, rest
