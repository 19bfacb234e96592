"""Who takes part in which forward: timelines, a line a forward.

A 0:5      A reads its tokens 0 to 4             A 5:8 ~     it reads the rest, and its canvas is denoised behind it
A ~        one more step                         A 8:12 ~    the commit of a canvas, and the first step of the next
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpress import engine
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import HashedImageSpan, Request
from blockpress.errors import Overloaded, RequestError
from tests.engine.simulator import KINDS, PAGE, STOP, Simulator, ask, drawn, small

TEXT = list(range(10, 50))


class Show:
    """Requests by name, and the lines that are drawn of their forwards."""

    def __init__(self, pages: int = 40, **options: int | bool) -> None:
        self.simulator = Simulator(small(), EngineOptions(**options), dict.fromkeys(KINDS["both"], pages))  # type: ignore[arg-type]
        self.scheduler = self.simulator.scheduler
        self.names: dict[Request, str] = {}

    def ask(
        self, name: str, prompt: list[int], speaks: str = "diffusion", pictures: tuple[HashedImageSpan, ...] = ()
    ) -> Request:
        request = ask(prompt, speaks, pictures)
        self.names[request] = name
        self.scheduler.submit(request)
        return request

    def forward(self, finished: str = "") -> str:
        """One forward; the canvases or tokens of the named requests are finished in it."""
        works = self.simulator.forward()
        for work in works:
            request = work.request
            request.step += work.canvas
            if self.names[request] in finished.split():
                request.row.draft([5] * (PAGE if work.canvas else 1), request.step)
                list(request.row.commit())
                self.scheduler.commit(request, request.row.new_tokens)
                assert request.step == 0
        return drawn(works, self.names)


def test_one_request_is_scheduled_from_prompt_to_end():
    show = Show(chunk=5)
    request = show.ask("A", TEXT[:8])
    assert request.state == "waiting" and request.slot is None
    assert [show.forward(), show.forward(), show.forward("A"), show.forward("A"), show.forward()] == [
        "A 0:5",
        "A 5:8 ~",
        "A ~",
        "A 8:12 ~",
        "A 12:16 ~",
    ]
    assert (request.state, request.slot, request.num_computed_tokens) == ("running", 0, 16)
    show.scheduler.end(request)
    assert (request.state, request.slot, request.tables, show.scheduler.schedule()) == ("ended", None, {}, [])


def test_requests_in_a_batch_are_at_different_steps():
    show = Show(chunk=6, reuse_prefixes=False)
    show.ask("A", TEXT[:4])
    assert show.forward() == "A 0:4 ~"
    show.ask("B", TEXT[:13]), show.ask("C", TEXT[:2], "autoregressive")
    assert [show.forward("C"), show.forward("A C"), show.forward("C"), show.forward("B")] == [
        "A ~  B 0:6  C 0:2",
        "A ~  B 6:12  C 2:3",
        "A 4:8 ~  B 12:13 ~  C 3:4",
        "A ~  B ~  C 4:5",
    ]


def test_prompts_share_the_prefill_tokens_in_turn():
    """Seven tokens a forward, five a request; canvases and commits are not counted."""
    show = Show(chunk=5, prefill_tokens=7, reuse_prefixes=False)
    for name in "ABC":
        show.ask(name, TEXT[:8])
    assert [show.forward(), show.forward("A"), show.forward(), show.forward()] == [
        "A 0:5  B 0:2",
        "A 5:8 ~  B 2:6",
        "A 8:12 ~  B 6:8 ~  C 0:5",
        "A ~  B ~  C 5:8 ~",
    ]


@pytest.mark.parametrize(
    ("chunk", "tokens", "lines"),
    [
        (4, 99, ["A 0:2", "A 2:8", "A 8:10 ~"]),
        (6, 99, ["A 0:2", "A 2:8", "A 8:10 ~"]),
        (8, 99, ["A 0:8", "A 8:10 ~"]),
        (8, 3, ["A 0:2", "A 2:8", "A 8:10 ~"]),
    ],
    ids=["longer than a chunk", "a chunk", "within", "longer than the prefill tokens"],
)
def test_a_picture_is_never_split(chunk: int, tokens: int, lines: list[str]):
    show = Show(chunk=chunk, prefill_tokens=tokens)
    show.ask("A", TEXT[:10], pictures=(HashedImageSpan(2, 6, b"sun"),))
    assert [show.forward() for _ in lines] == lines


def test_a_picture_that_does_not_fit_waits_for_its_own_forward():
    show = Show(chunk=4, prefill_tokens=5)
    (
        show.ask("A", TEXT[:4]),
        show.ask("B", TEXT[:6], pictures=(HashedImageSpan(0, 6, b"sun"),)),
        show.ask("C", TEXT[4:6]),
    )
    assert [show.forward(), show.forward(), show.forward()] == ["A 0:4 ~", "A ~  B 0:6 ~", "A ~  B ~  C 0:2 ~"]


def test_a_cached_prefix_is_not_read_again():
    show = Show()
    show.ask("A", TEXT[:12])
    assert show.forward() == "A 0:12 ~"
    show.ask("B", TEXT[:12]), show.ask("C", TEXT[:14]), show.ask("D", TEXT[:12], "autoregressive")
    assert show.forward() == "A ~  B ~  C 12:14 ~  D 8:12"
    assert show.scheduler.stats.reused_tokens == 12 + 12 + 8


def test_generated_tokens_are_a_prefix_too():
    """The second turn of a conversation: prompt and answer of the first are in pages still."""
    show = Show()
    first = show.ask("A", TEXT[:6])
    show.forward("A"), show.forward("A"), show.forward("A")
    show.scheduler.end(first)
    show.ask("B", [*TEXT[:6], *[5] * 8, 9, 9])
    assert show.forward() == "B 12:16 ~"


def test_the_youngest_is_preempted_and_resumes_at_its_step():
    """Six pages of four tokens. A takes the one that is left, then one of B's."""
    show = Show(pages=6, reuse_prefixes=False)
    a, b = show.ask("A", TEXT[:8]), show.ask("B", TEXT[8:18])
    assert [show.forward("A"), show.forward("A")] == ["A 0:8 ~  B 0:10 ~", "A 8:12 ~  B ~"]
    assert (a.slot, b.slot, b.step) == (0, 1, 2)
    assert show.forward() == "A 12:16 ~"
    assert (b.state, b.num_computed_tokens, b.tables, b.slot, b.step) == ("preempted", 0, {}, 1, 2)
    assert (show.scheduler.running, show.scheduler.waiting, show.scheduler.stats.preemptions) == (1, 1, 1)
    show.ask("C", TEXT[:1])
    assert show.forward() == "A ~"  # there is a page for C, but B comes first
    show.scheduler.end(a)
    assert show.forward() == "B 0:10 ~  C 0:1 ~"
    assert (b.slot, b.step) == (1, 3)


def test_the_youngest_preempts_itself():
    show = Show(pages=6, reuse_prefixes=False)
    show.ask("A", TEXT[:12]), show.ask("B", TEXT[8:20])
    assert [show.forward("B"), show.forward()] == ["A 0:12 ~  B 0:12 ~", "A ~"]


def test_no_request_is_admitted_that_would_be_preempted_at_once():
    """Of eight pages A has six; B needs three, and C comes behind B."""
    show = Show(pages=8, chunk=4, reuse_prefixes=False)
    show.ask("A", TEXT[:24]), show.ask("B", TEXT[:12]), show.ask("C", TEXT[:1])
    assert show.forward() == "A 0:4"
    assert show.scheduler.waiting == 2


def test_a_freed_slot_is_given_to_the_next_request():
    show = Show(max_running=2)
    a, b, c = (show.ask(name, TEXT[:4]) for name in "ABC")
    assert show.forward() == "A 0:4 ~  B 0:4 ~"
    show.scheduler.cancel(a)
    assert show.forward() == "B ~  C ~"
    assert (b.slot, c.slot) == (1, 0)


@pytest.mark.parametrize("when", ["waiting", "running", "preempted"])
def test_a_cancelled_request_frees_its_pages(when: str):
    show = Show(pages=6)
    show.ask("A", TEXT[:8])
    b = show.ask("B", TEXT[8:18])
    if when != "waiting":
        show.forward("A")
    if when == "preempted":
        show.forward("A"), show.forward()
    assert b.state == when
    show.scheduler.cancel(b), show.scheduler.cancel(b)
    assert (b.state, b.tables, b.slot) == ("ended", {}, None)
    show.scheduler.check()
    assert show.scheduler.stats.ended == 1
    assert show.forward()[0] == "A"


def test_work_of_an_ended_request_is_not_booked():
    show = Show()
    request = show.ask("A", TEXT[:8])
    (work,) = show.scheduler.schedule()
    show.scheduler.end(request)
    show.scheduler.mark_computed(work)
    assert (request.num_computed_tokens, request.tables) == (0, {})
    assert not any(pages.reusable for pages in show.scheduler.stats.pages.values())


def test_the_queue_has_a_limit():
    show = Show(max_running=1, max_waiting=2)
    show.ask("A", TEXT[:4]), show.ask("B", TEXT[:4])
    with pytest.raises(Overloaded, match="2 requests wait, and max_waiting is 2") as caught:
        show.ask("C", TEXT[:4])
    assert caught.value.hint == "ask again later, or raise the engine option max_waiting"
    show.forward()
    show.ask("C", TEXT[:4])


def test_a_prompt_that_no_pages_hold_is_refused():
    show = Show(pages=5)
    with pytest.raises(RequestError, match="the prompt has 21 tokens, and the pages hold a context of 20") as caught:
        show.ask("A", TEXT[:21])
    assert "memory" in caught.value.hint
    show.ask("A", TEXT[:20])
    with pytest.raises(RequestError, match="the prompt has 17 tokens, and the pages hold a context of 16"):
        show.ask("B", TEXT[:17], "checked")  # its only canvas will be read as well
    show.ask("B", TEXT[:16], "checked")


def written(speaks: str, prompt: int, pages: int) -> list[int]:
    """Context tokens after each commit of a request that is alone, until it ends for want of room."""
    show = Show(pages=pages)
    request = show.ask("A", TEXT[:prompt], speaks)
    lengths = []
    while request.row.finish_reason is None:
        (work,) = show.simulator.forward()
        assert STOP != 5
        request.row.draft([5] * (PAGE if work.canvas else 1), 1)
        list(request.row.commit())
        lengths.append(len(request.context))
        if request.row.finish_reason is None:
            show.scheduler.commit(request, request.row.new_tokens)
    assert request.row.finish_reason == "length"
    return lengths


@pytest.mark.parametrize(
    ("speaks", "prompt", "lengths"),
    [
        ("diffusion", 9, [9, 13, 17]),  # 17 tokens in five pages, and the last canvas is never read
        ("diffusion", 12, [12, 16, 20]),
        ("diffusion", 20, [20]),
        ("autoregressive", 18, [18, 19, 20]),
    ],
)
def test_an_answer_ends_where_pages_end(speaks: str, prompt: int, lengths: list[int]):
    assert written(speaks, prompt, pages=5) == lengths


def test_with_pages_to_spare_the_context_is_the_limit():
    assert written("diffusion", 40, pages=50)[-1] == 56


@pytest.mark.parametrize("speaks", ["diffusion", "autoregressive"])
def test_a_retried_canvas_reads_no_context_again(speaks: str):
    """A canvas that said nothing is written once more; so is a token, from the state that was heard."""
    show = Show()
    request = show.ask("A", TEXT[:4], speaks)
    show.forward()
    request.step = 7
    show.scheduler.commit(request, [])
    assert request.step == 0
    (work,) = show.scheduler.schedule()
    assert (work.start, work.stop, work.canvas) == (4, 4, speaks == "diffusion")


MISUSES: dict[str, Callable[[Show, Request], object]] = {
    "submitted before": lambda show, request: show.scheduler.submit(request),
    "has not been read": lambda show, request: show.scheduler.commit(request, [5]),
}


@pytest.mark.parametrize("said", MISUSES)
def test_the_consistency_check_finds_corruption(said: str):
    show = Show()
    request = show.ask("A", TEXT[:4])
    with pytest.raises(AssertionError, match=said):
        MISUSES[said](show, request)


@pytest.mark.parametrize(
    "name", ["options", "request", "sizing", "block_pool", "prefix_cache", "block_tables", "scheduler"]
)
def test_the_scheduler_imports_no_torch(name: str):
    """Nor by way of a room that knows it, but for the names of types."""
    source = (Path(engine.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    loaded = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    rooms = {getattr(node, "module", None) or node.names[0].name for node in loaded}
    assert not rooms & {"torch", "jaxtyping", "blockpress.decoding", "blockpress.model", "blockpress.diffusion"}
