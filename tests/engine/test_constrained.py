"""Constrained requests in the engine: the same bits alone and in any batch, by any path, and valid however they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from blockpress.config import PRESETS
from blockpress.constrain import Constraint, ConstraintState
from blockpress.constrain.regex import parse_regex
from blockpress.constrain.tokens import TokenBytes
from blockpress.constrain.turns import THOUGHT, THOUGHT_END, Turn
from blockpress.decoding import Committed, Denoised, Done
from blockpress.engine import EngineCore, Request

from .driver import drive, prompts, reference_reply, reply, row
from .test_same_bits import MIXED, OTHERS, ROOMY, bits, network, run, slow_but

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192, hidden_size=34, vocab_size=77)
MOST = 24  # a canvas, and half of the next
VOCABULARY = TokenBytes(
    [None, None, *(chr(97 + i).encode() for i in range(26)), *(b"%d" % i for i in range(47)), None, None],
    {75: THOUGHT, 76: THOUGHT_END},
)


def held(pattern: str, turn: Turn | None = None) -> Constraint:
    expression = parse_regex(pattern)
    return Constraint.of(expression if turn is None else turn.expression(expression), VOCABULARY, (1,), pattern)


CONSTRAINTS = [
    held("([a-f]{2}|[0-9]{3})*x"),
    None,
    held("z[0-9]{12,30}z"),
    held("[0-9]{4}", Turn(opening="thought")),
]


def made(count: int) -> list[Callable[[], Request]]:
    """Functions that make each request anew, constraints and modes in turn."""

    def maker(index: int, prompt: list[int]) -> Callable[[], Request]:
        sampling, logprobs = MIXED[index % len(MIXED)]
        constraint = CONSTRAINTS[index % len(CONSTRAINTS)]

        def make() -> Request:
            state = None if constraint is None else ConstraintState(constraint)
            most = {"max_tokens": MOST}
            return Request(row(CONFIG, index, prompt, sampling, logprobs=logprobs, constraint=state, **most), sampling)

        return make

    return [maker(index, prompt) for index, prompt in enumerate(prompts(CONFIG, count, 60, seed=7, shared=20))]


@pytest.fixture(scope="module")
def alone() -> list[list[object]]:
    """What each request tells when it is alone in its engine."""
    return [run(network(torch.float32, CONFIG), [make])[0][0] for make in made(8)]


@pytest.mark.parametrize("size", [2, 8])
def test_a_constrained_request_has_the_same_bits_alone_and_in_any_batch(alone: list[list[object]], size: int) -> None:
    assert run(network(torch.float32, CONFIG), made(8)[-size:])[0] == alone[-size:]


@pytest.mark.parametrize("options", slow_but(OTHERS, "chunks of 7"))
def test_chunks_reuse_and_preemption_leave_the_bits_alone(alone: list[list[object]], options: str) -> None:
    makers = made(8)
    arrivals = [2 * i % 7 for i in range(len(makers))]
    told, core = run(network(torch.float32, CONFIG), makers, OTHERS[options], arrivals=arrivals)
    assert told == alone
    assert ("scarce" not in options) or core.stats.scheduler.preemptions, "the case is one"


def test_a_constrained_request_is_answered_as_by_the_reference_loop_and_is_valid() -> None:
    net, requests = network(torch.float32, CONFIG), [make() for make in made(8)]
    told = drive(EngineCore(net, ROOMY), requests)
    for index, request in enumerate(requests):
        ours = reply(told[request])
        kept = CONSTRAINTS[index % len(CONSTRAINTS)]
        changes = {"logprobs": request.row.logprobs, "max_tokens": MOST}
        state = None if kept is None else ConstraintState(kept)
        theirs = reference_reply(net, CONFIG, request.row.prompt, index, request.sampling, constraint=state, **changes)
        assert (ours.tokens, ours.usage, ours.finish_reason) == (theirs.tokens, theirs.usage, theirs.finish_reason)
        assert ours.invalid is None


def test_what_a_prefix_that_is_reused_answers_is_what_a_fresh_one_does(alone: list[list[object]]) -> None:
    net = network(torch.float32, CONFIG)
    core = EngineCore(net, ROOMY)
    for _ in range(2):
        assert [run_in(core, make()) for make in made(8)[:4]] == alone[:4]
    assert core.stats.scheduler.reused_tokens


def run_in(core: EngineCore, request: Request) -> list[object]:
    return bits(drive(core, [request])[request])


def test_the_last_step_of_a_constrained_canvas_is_what_is_committed() -> None:
    """Streamed steps never show a settled canvas that is then changed, but where a verification redoes it."""
    [request, *_] = [make() for make in made(1)]
    events = drive(EngineCore(network(torch.float32, CONFIG), ROOMY), [request])[request]
    steps = [event for event in events if isinstance(event, Denoised)]
    for event in events:
        if isinstance(event, Committed):
            last = [step for step in steps if step.canvas == event.canvas][-1]
            assert last.argmax.tolist()[: len(event.tokens)] == event.tokens


def test_a_cancelled_constrained_request_says_so_and_disturbs_no_other() -> None:
    net, makers = network(torch.float32, CONFIG), made(8)
    alone = [reply(drive(EngineCore(net, ROOMY), [request])[request]) for request in (make() for make in makers)]
    requests = [make() for make in makers]
    told = drive(EngineCore(net, ROOMY), requests, cancels={0: 2, 2: 4})
    for index, request in enumerate(requests):
        [done] = [event for event in told[request] if isinstance(event, Done)]
        if index in (0, 2):
            assert done.reply.finish_reason == "cancelled"
            assert done.reply.invalid is None or "needs" in done.reply.invalid
            assert done.reply.tokens == alone[index].tokens[: len(done.reply.tokens)]
        else:
            assert done.reply == alone[index]


def test_seeds_make_other_answers_and_the_same_one_the_same() -> None:
    net = network(torch.float32, CONFIG)

    def answer(seed: int) -> list[int]:
        sampling = MIXED[0][0]
        state = ConstraintState(held("[a-z]{12}"))
        one = row(CONFIG, 0, [5, 6, 7], sampling, constraint=state, max_tokens=20)
        one.seed = seed
        request = Request(one, sampling)
        return reply(drive(EngineCore(net, ROOMY), [request])[request]).tokens

    answers = [answer(seed) for seed in range(4)]
    assert len({tuple(tokens) for tokens in answers}) > 1 and answer(2) == answers[2]
