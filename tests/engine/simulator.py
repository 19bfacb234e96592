"""A simulated engine: plans are carried out on dicts instead of tensors, and every look at a page is checked.

What a page holds at a place is a print: a hash of the whole context up to that token, pictures included, which is what
keys and values depend on. A forward that sees another print than its request's own would have given other tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from blockpress.config import PRESETS, AutoregressiveSampling, LayerKind, ModelConfig, Sampling
from blockpress.decoding import SequenceState
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.engine.scheduler import ScheduledRequest, Scheduler
from blockpress.engine.sizing import DROPPED

PAGE, WINDOW, CONTEXT, STOP = 4, 6, 60, 1
KINDS: dict[str, tuple[LayerKind, ...]] = {
    "both": ("sliding_attention", "full_attention"),
    "sliding": ("sliding_attention",),
    "full": ("full_attention",),
}


def small(window: int = WINDOW, context: int = CONTEXT) -> ModelConfig:
    """A network whose pages hold four tokens."""
    return replace(PRESETS["tiny"](), canvas_length=PAGE, sliding_window=window, context_length=context)


def ask(
    prompt: Sequence[int],
    speaks: str = "diffusion",
    pictures: tuple[HashedImageSpan, ...] = (),
    max_tokens: int | None = None,
) -> Request:
    """A request with a row of its own."""
    diffusion = speaks != "autoregressive"
    row = SequenceState(
        0,
        list(prompt),
        0,
        stop_ids=[STOP],
        canvas_length=PAGE if diffusion else 1,
        room=CONTEXT - len(prompt),
        max_tokens=max_tokens,
    )
    request = Request(
        row, Sampling(max_verifications=2 * (speaks == "checked")) if diffusion else AutoregressiveSampling()
    )
    request.image_spans = pictures
    return request


class Simulator:
    """Carries out what a scheduler plans, as a core would."""

    def __init__(self, config: ModelConfig, options: EngineOptions, pages: Mapping[LayerKind, int]) -> None:
        self.config, self.options = config, options
        self.scheduler = Scheduler(config, options, pages)
        self.contents: dict[tuple[LayerKind, int, int], int] = {}
        self.heard: dict[Request, int] = {}

    def forward(self) -> list[ScheduledRequest]:
        """Plan one forward, check what every token of it sees, and book it."""
        works = self.scheduler.schedule()
        self.scheduler.check()
        self.check_shares(works)
        for work in works:
            self.write(work)
        for work in works:
            self.look(work)
        for work in works:
            if not is_judged(work):
                self.scheduler.mark_computed(work)
        self.scheduler.check()
        return works

    def take(self, work: ScheduledRequest, chance: random.Random, ending: float = 0.2) -> None:
        """What comes of a work: a step, a finished canvas or token, an answer, or a canvas that is begun again."""
        request = work.request
        if is_judged(work):
            self.judge(work, chance)
            return
        request.step += work.canvas
        if work.stop < len(request.context):
            return
        if request.mode == "diffusion" and request.step < chance.choice([1, 2, 4]):
            return
        if chance.random() < 0.1:
            self.scheduler.commit(request, [])
            return
        count = PAGE if request.mode == "diffusion" else 1
        tokens = [STOP if chance.random() < ending / count else chance.choice([5, 6]) for _ in range(count)]
        request.row.draft(tokens, request.step)
        if request.num_logit_tokens and request.mode == "diffusion":
            self.scheduler.commit(request, request.row.proposal, draft=True)
            return
        self.commit(request)

    def judge(self, work: ScheduledRequest, chance: random.Random) -> None:
        """The causal pass agrees with a proposal, or with its beginning: then it is corrected, or denoised again."""
        request, row = work.request, work.request.row
        base, agreed = len(request.context) - request.num_draft_tokens, chance.randint(0, request.num_draft_tokens)
        assert work.start == base, "a proposal is read in one forward, behind all of the context"
        row.count_causal_pass(verification=True)
        again = agreed < request.num_draft_tokens and row.verifications < 3 and chance.random() < 0.5
        if again:
            row.redo({})
        elif agreed < request.num_draft_tokens:
            row.correct([*row.draft_tokens[:agreed], 7, *row.draft_tokens[agreed + 1 :]])
        events = [] if again else list(row.commit())
        assert again or events
        self.scheduler.accept_draft(work, row.num_kept)
        self.heard[request] = base + row.num_kept
        assert len(request.context) == base + row.num_kept and not request.num_draft_tokens
        self.go_on(request)

    def commit(self, request: Request) -> None:
        list(request.row.commit())
        self.go_on(request)

    def go_on(self, request: Request) -> None:
        if request.row.finish_reason is None:
            self.scheduler.commit(request, request.row.new_tokens)
        else:
            self.scheduler.end(request)

    def write(self, work: ScheduledRequest) -> None:
        told = prints(work.request)
        for kind, table in work.request.tables.items():
            for at in range(work.start, work.stop):
                self.contents[kind, table[at // PAGE], at % PAGE] = told[at]

    def look(self, work: ScheduledRequest) -> None:
        """Every token sees what `model/masks.py` says: all of the context, or the last window of it, itself included."""
        told, window = prints(work.request), self.config.sliding_window
        for kind, table in work.request.tables.items():
            oldest = 0 if kind == "full_attention" else max(0, work.start - (window - 1))
            for at in range(oldest, work.stop):
                assert table[at // PAGE] != DROPPED, f"token {at} is seen by {work}, and its {kind} page is gone"
                seen = self.contents.get((kind, table[at // PAGE], at % PAGE))
                assert seen == told[at], f"{kind} page {table[at // PAGE]} holds something else at token {at}"
        if work.request.num_logit_tokens and work.stop == len(work.request.context):
            assert work.num_logit_tokens == min(work.request.num_logit_tokens, work.stop - work.start)
            whole = work.num_logit_tokens == work.request.num_logit_tokens
            assert whole or self.heard.get(work.request) == work.stop, "a token was not heard"
            self.heard[work.request] = work.stop

    def check_shares(self, works: Sequence[ScheduledRequest]) -> None:
        """Each forward goes on with the oldest; nobody gets more than the options allow, and no picture is cut."""
        assert bool(works) == bool(self.scheduler.running)
        requests = [work.request for work in works]
        assert len(set(requests)) == len(requests) <= self.options.max_running
        assert [one.number for one in requests] == sorted(one.number for one in requests)
        prefill = 0
        for work in works:
            request = work.request
            assert request.state == "running" and work.start == request.num_computed_tokens
            ends = work.stop == len(request.context)
            assert work.canvas == (ends and request.mode == "diffusion" and not request.num_draft_tokens)
            assert work.stop > work.start or ends
            assert not any(
                one.start < cut < one.stop for one in request.image_spans for cut in (work.start, work.stop)
            ), "a picture is cut"
            if work.start < request.last_commit_start:
                whole = [one for one in request.image_spans if one.start == work.start]
                assert work.stop - work.start <= max(self.options.chunk, *(one.length for one in whole), 0)
                assert work.stop - work.start <= self.options.prefill_tokens or (whole and not prefill)
                prefill += work.stop - work.start
        reading = sum(work.start < work.request.last_commit_start for work in works)
        assert prefill <= self.options.prefill_tokens or reading == 1


def is_judged(work: ScheduledRequest) -> bool:
    """Whether the forward has read a proposal, so that only what is judged of it says how much of it is context."""
    return work.request.num_draft_tokens > 0 and work.stop == len(work.request.context)


def prints(request: Request) -> list[int]:
    """For each token of the context a hash of all that its keys and values depend on."""
    told, last = [], 0
    for at, token in enumerate(request.context):
        shown = next((one for one in request.image_spans if one.start <= at < one.stop), None)
        last = hash((last, token, shown))
        told.append(last)
    return told


def drawn(works: Sequence[ScheduledRequest], names: Mapping[Request, str]) -> str:
    """A forward as text: who reads which tokens, and ~ where a canvas is denoised behind them."""
    return "  ".join(
        names[work.request] + (f" {work.start}:{work.stop}" if work.stop > work.start else "") + " ~" * work.canvas
        for work in works
    )
