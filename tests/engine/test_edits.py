"""Requests with edited logits in the engine: the same bits alone and in any batch, and the reference loop's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.constrain import ConstraintState
from blockpress.engine import EngineCore, Request

from .driver import drive, prompts, reference_reply, reply, row
from .test_constrained import CONFIG, held
from .test_same_bits import OTHERS, ROOMY, network, run, slow_but

pytestmark = pytest.mark.end_to_end

MOST = 24  # a canvas, and half of the next
STEPS = Sampling(steps=3, confidence=0.0, t_max=1.5)
WARM = AutoregressiveSampling(temperature=1.2)
BIASED: dict[str, Any] = {"logit_bias": {5: 4.0, 9: -100.0, 1: -2.0}, "suppress_tokens": [7, 8]}
FREQUENT: dict[str, Any] = {"frequency_penalty": 1.2, "presence_penalty": 0.4}
REPEATED: dict[str, Any] = {"repetition_penalty": 1.5, "top_p": 0.8}
LATELY: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "repeat_last_n": 9}
FEW: dict[str, Any] = {"allowed_token_ids": [*range(1, 40)], "frequency_penalty": 2.0, "min_p": 0.1}
MIXED: list[tuple[Any, int | None, str | None]] = [
    (STEPS.with_(**BIASED), None, None),
    (STEPS, None, None),
    (STEPS.with_(**FREQUENT, max_verifications=2), None, None),
    (STEPS.with_(**REPEATED, **BIASED), 2, "([a-f]{2}|[0-9]{3})*x"),
    (WARM.with_(**REPEATED, **BIASED), 2, None),
    (STEPS, None, "z[0-9]{12,30}z"),
    (STEPS.with_(**FEW, max_repairs=2, repair_below=0.2), None, None),
    (WARM.with_(**FREQUENT), None, "[a-z]{4,9}"),
    (STEPS.with_(top_k=5, release=1), None, None),
    (STEPS.with_(**LATELY), None, None),
    (STEPS.with_(**FREQUENT, **BIASED), None, "[a-z]{20,40}"),
]


def made(mixed: Any = MIXED) -> list[Callable[[], Request]]:
    """Functions that make each request anew."""

    def maker(index: int, prompt: list[int]) -> Callable[[], Request]:
        sampling, logprobs, pattern = mixed[index]
        constraint = None if pattern is None else held(pattern)

        def make() -> Request:
            state = None if constraint is None else ConstraintState(constraint)
            return Request(
                row(CONFIG, index, prompt, sampling, logprobs=logprobs, constraint=state, max_tokens=MOST), sampling
            )

        return make

    return [maker(index, prompt) for index, prompt in enumerate(prompts(CONFIG, len(mixed), 60, seed=7, shared=20))]


@pytest.fixture(scope="module")
def alone() -> list[list[object]]:
    """What each request tells when it is alone in its engine."""
    return [run(network(torch.float32, CONFIG), [make])[0][0] for make in made()]


@pytest.mark.parametrize("chosen", [slice(0, 2), slice(2, 6), slice(None, None, -1)])
def test_an_edited_request_has_the_same_bits_alone_and_in_any_batch(alone: list[list[object]], chosen: slice) -> None:
    assert run(network(torch.float32, CONFIG), made()[chosen])[0] == alone[chosen]


@pytest.mark.parametrize("options", slow_but(OTHERS, "chunks of 7"))
def test_chunks_reuse_and_preemption_leave_the_bits_alone(alone: list[list[object]], options: str) -> None:
    makers = made()
    arrivals = [2 * i % 7 for i in range(len(makers))]
    told, core = run(network(torch.float32, CONFIG), makers, OTHERS[options], arrivals=arrivals)
    assert told == alone
    assert ("scarce" not in options) or core.stats.scheduler.preemptions, "the case is one"


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16, torch.float16], torch.float16))
def test_narrow_types_keep_the_bits_too(dtype: torch.dtype) -> None:
    net, makers = network(dtype, CONFIG), made()[:5]
    assert run(net, makers)[0] == [run(net, [make])[0][0] for make in makers]


def test_an_edited_request_is_answered_as_by_the_reference_loop() -> None:
    net, requests = network(torch.float32, CONFIG), [make() for make in made()]
    told = drive(EngineCore(net, ROOMY), requests)
    for index, (request, (sampling, logprobs, pattern)) in enumerate(zip(requests, MIXED, strict=True)):
        ours, state = reply(told[request]), None if pattern is None else ConstraintState(held(pattern))
        changes = {"logprobs": logprobs, "max_tokens": MOST, "constraint": state}
        theirs = reference_reply(net, CONFIG, request.row.prompt, index, sampling, **changes)
        assert (ours.tokens, ours.usage, ours.finish_reason) == (theirs.tokens, theirs.usage, theirs.finish_reason)
        assert ours.invalid is None
        assert not {*ours.tokens} & {*sampling.suppress_tokens}


def test_requests_without_edits_take_the_pass_that_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an edit nor a pass of its own for a request whose sampling has none."""
    calls: list[tuple[int, bool]] = []
    from blockpress.ops import vocabulary

    whole = vocabulary.sample_from_hidden

    def counted(hidden: Any, *args: Any, changes: Any = None, truncation: Any = None, **more: Any) -> Any:
        calls.append((len(hidden), changes is None and truncation is None))
        return whole(hidden, *args, changes=changes, truncation=truncation, **more)

    monkeypatch.setattr(vocabulary, "sample_from_hidden", counted)
    net, canvas = network(torch.float32, CONFIG), CONFIG.canvas_length
    run(net, made([(STEPS, None, None)] * 3))
    assert all(free for _, free in calls) and (3 * canvas, True) in calls
    calls.clear()
    run(net, made([(STEPS, None, None), (STEPS.with_(**BIASED), None, None), (STEPS, None, None)]))
    assert {(canvas, False), (2 * canvas, True)} <= {*calls}
