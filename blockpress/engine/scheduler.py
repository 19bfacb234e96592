"""Which requests take part in the next forward, with which tokens: continuous batching, decided without tensors.

    queue                running, in order of arrival                  one forward
    F E D   --admit-->   A  denoising a canvas                         A        ................
                         B  finished a canvas                          B ###### ................     commit, first step
                         C  prompt of three chunks                     C ####                        second chunk
            <-preempt-   when pages run out, the youngest goes back    # read causally   . denoised

Every running request takes part in every forward, except prompts that wait because `prefill_tokens` is used up.
Prefill, commits and canvases share forwards, each request at a step of its own.

Invariant: running requests are older than waiting ones, and the oldest can always continue: it can preempt all others.
So every request finishes, whatever the others do.
Run it:  python -m pytest tests/engine/test_scheduler.py tests/engine/test_state_machine.py
"""

from __future__ import annotations

import heapq
import time
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
    """One request's part of a forward: its context tokens [start, stop) are read causally, possibly none; if `canvas`
    is set, a denoising step runs after them. `num_logit_tokens`: for how many of these tokens, counted from the last,
    the hidden states are needed. `last_step`: whether the canvas has no further step.

    Its tables have pages for all visible tokens before `stop`. start == stop only if a canvas is denoised, or an
    autoregressive request chooses its next token again.
    """

    request: Request
    start: int
    stop: int
    canvas: bool
    num_logit_tokens: int = 0
    last_step: bool = False


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """Pages of one kind of layer: all, those held by requests, those that may be reused, and how many reusable ones
    were evicted so far."""

    total: int
    held: int
    reusable: int
    evicted: int


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """Current and past counts: requests, preemptions for lack of pages, tokens not computed because cached pages held
    them."""

    running: int
    waiting: int
    submitted: int
    ended: int
    preemptions: int
    reused_tokens: int
    pages: Mapping[LayerKind, PageCounts]


@final
class Scheduler:
    """Schedules forwards for requests that come and go. `pages`: how many of each kind exist (`sizing.plan_pages`)."""

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
        """Requests in the queue, including preempted ones."""
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
        """Add a request to the queue, and limit its row's room to what the pages could hold if it were alone.

        Raises:
            Overloaded: the queue is full. RequestError: its prompt can never fit into the pages; names `memory`.
        """
        assert request.state == "new", f"a request that is {request.state} was submitted before"
        capacity, prompt = self._tables.capacity(request), len(request.context)
        # The last tokens are not always read, and then need no pages.
        room = None if capacity is None else capacity - prompt + self._never_read(request)
        minimum = 1 if request.mode == "autoregressive" else self._config.canvas_length
        if room is not None and room < minimum:
            raise RequestError(
                f"the prompt has {prompt} tokens, and the pages hold a context of {prompt + room - minimum}",
                hint=f"raise the engine option memory (it is {self._options.memory}), or shorten the prompt",
            )
        waiting = sum(other.state == "waiting" for other in self._queue)
        if waiting >= self._options.max_waiting:
            raise Overloaded(
                f"the queue is full: {waiting} requests wait, and max_waiting is {self._options.max_waiting}",
                hint="ask again later, or raise the engine option max_waiting",
            )
        if room is not None:
            request.row.limit(room)
        request.number, request.state = self._submitted, "waiting"
        self._submitted += 1
        self._queue.append(request)

    def cancel(self, request: Request) -> None:
        """Remove a request from the queue or the batch; its pages and its slot are free at once."""
        self.end(request)

    def schedule(self) -> list[ScheduledRequest]:
        """What the next forward runs, in order of arrival; empty only if nothing is running or waiting."""
        scheduled: list[ScheduledRequest] = []
        left = self._options.prefill_tokens
        for request in list(self._running):
            if request.state != "running":
                break  # preempted for an older one, and so are all younger ones
            part, rest = self._part(request, request.num_computed_tokens, left)
            if part is None or self._find_pages(request, part.stop):
                left = rest
                scheduled += [] if part is None else [part]
        while self._queue and len(self._running) < self._options.max_running:
            part, left = self._admit(self._queue[0], left)
            if part is None:
                break
            scheduled.append(part)
        assert scheduled or not (self._running or self._queue), "no request can continue"
        return scheduled

    def mark_computed(self, scheduled: ScheduledRequest) -> None:
        """The forward ran: the scheduled tokens are in pages. No effect if the request has ended since."""
        if scheduled.request.state == "running":
            assert scheduled.start == scheduled.request.num_computed_tokens, "another forward came in between"
            self._tables.mark_written(scheduled.request, scheduled.stop)

    def accept_draft(self, scheduled: ScheduledRequest, num_accepted: int) -> None:
        """The forward has read a draft: its first `num_accepted` tokens stay in the context, the others are removed."""
        request = scheduled.request
        if request.state != "running":
            return
        base = len(request.context) - request.num_draft_tokens
        del request.context[base + num_accepted :]
        request.num_draft_tokens = 0
        self.mark_computed(replace(scheduled, stop=base + num_accepted, canvas=False))

    def commit(self, request: Request, tokens: list[int], draft: bool = False) -> None:
        """Append tokens to the context, to be read by the next schedule; without tokens the canvas is restarted.

        Args:
            draft: whether `accept_draft` may still reject the tokens.
        """
        assert request.state == "running" and not request.num_pending_tokens, "the context has not been read"
        request.last_commit_start = len(request.context)
        request.context += tokens
        request.num_draft_tokens = len(tokens) if draft else 0
        request.step = 0
        capacity = self._tables.capacity(request)
        assert capacity is None or len(request.context) <= capacity, "the row wrote more than its room"

    def end(self, request: Request, discard: bool = False) -> None:
        """End a request: its pages and its slot become free. No effect if it has ended already.

        Args:
            discard: whether other requests must not reuse its pages.
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
        """Raises AssertionError if an invariant does not hold; for tests."""
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
        """Tokens that it writes and never reads: the last token, or the last canvas if no causal pass scores it."""
        if request.mode == "autoregressive":
            return 1
        return 0 if request.num_logit_tokens else self._config.canvas_length

    def _part(self, request: Request, read: int, left: int) -> tuple[ScheduledRequest | None, int]:
        """A request's part of this forward after `read` computed tokens, and what is left of the prefill tokens.

        None if it needs more than is left; then later requests get none either, so that prompts are read in order.
        """
        end = len(request.context)
        if read >= request.last_commit_start:
            stop = end
        elif left == 0:
            return None, 0
        else:
            spans = [ImageSpan(span.start, span.length) for span in request.image_spans]
            stop = part_end(read, min(read + min(self._options.chunk, left), request.last_commit_start), spans)
            if stop - read > left and left < self._options.prefill_tokens:
                return None, 0  # an image is read as a whole, and needs a forward with all its prefill tokens left
            left = max(0, left - (stop - read))
        canvas = stop == end and request.mode == "diffusion" and not request.num_draft_tokens
        num_logit_tokens = min(request.num_logit_tokens, stop - read) if stop == end else 0
        return ScheduledRequest(request, read, stop, canvas, num_logit_tokens, canvas and request.at_last_step), left

    def _find_pages(self, request: Request, stop: int) -> bool:
        """Allocate pages for its tokens up to `stop`; the youngest are preempted if they run out. False: it was one."""
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
        """Move the first request of the queue into the batch; None if pages or prefill tokens do not suffice."""
        found = self._tables.match(request)
        read = max((len(table) for table in found.values()), default=0) * self._tables.page
        part, rest = self._part(request, read, left)
        if part is None or not self._tables.has_room(request, found, self._running):
            return None, left
        self._queue.popleft()
        reused = self._tables.adopt(request, found)
        self._reused += reused
        if request.state == "waiting":  # what it finds again after it was preempted is its own
            request.handle.num_cached_tokens, request.handle.first_run = reused, time.monotonic()
        if request.slot is None:
            request.slot = heapq.heappop(self._slots)
        request.state = "running"
        self._running.append(request)
        fits = self._tables.extend(request, part.stop)
        assert fits, "pages that were free are gone"
        return part, rest
