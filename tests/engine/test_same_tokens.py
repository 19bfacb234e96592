"""The engine writes what the reference loop writes, whoever runs beside, whatever is reused, cut into chunks or paused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch

import blockpress
from blockpress import sudoku
from blockpress.config import PRESETS, AutoregressiveSampling, Sampling
from blockpress.decoding import Denoised, Done, Reply
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.model import Network

from ..conftest import make_random_network
from .driver import AnySampling, drive, prompts, reference_reply, reply, row
from .special import damped

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192, num_experts=8)  # so many that they are grouped
SHORT = Sampling(steps=4, confidence=0.0)
WARM = AutoregressiveSampling(temperature=1.2, top_k=20)


@pytest.fixture(scope="module")
def network() -> Network:
    """Random, its signal damped: at full strength rounding grows three to four times a step."""
    return damped(CONFIG)


Alone = Callable[..., Reply]


@pytest.fixture(scope="module")
def alone(network: Network) -> Alone:
    """`alone(prompt, index, sampling, logprobs=None)`: the reference loop's answer, once for all tests."""
    kept: dict[tuple[object, ...], Reply] = {}

    def answer(prompt: list[int], index: int, sampling: AnySampling, logprobs: int | None = None) -> Reply:
        key = (tuple(prompt), index, sampling, logprobs)
        if key not in kept:
            kept[key] = reference_reply(network, CONFIG, prompt, index, sampling, logprobs=logprobs)
        return kept[key]

    return answer


def samplings(kind: str, count: int) -> list[AnySampling]:
    mixed: list[AnySampling] = [
        SHORT,
        SHORT.with_(steps=7, t_max=1.5),
        WARM,
        Sampling(steps=3),
        AutoregressiveSampling(),
    ]
    return list(islice(cycle({"diffusion": [SHORT], "autoregressive": [WARM], "mixed": mixed}[kind]), count))


OPTIONS = {
    "roomy": EngineOptions(memory=1 << 24),
    "without reuse": EngineOptions(memory=1 << 24, reuse_prefixes=False),
    "chunks of 1": EngineOptions(memory=1 << 24, chunk=1, prefill_tokens=3),
    "chunks of 7": EngineOptions(memory=1 << 24, chunk=7, prefill_tokens=20),
    "five at once": EngineOptions(memory=1 << 24, max_running=5),
    "scarce": EngineOptions(memory=1 << 19, max_running=16, chunk=16),
}


@pytest.mark.parametrize(
    ("kind", "count", "options"),
    [pytest.param(kind, 8, how, marks=pytest.mark.slow) for kind in ("diffusion", "autoregressive") for how in OPTIONS]
    + [("mixed", count, options) for count in (1, 3, 8) for options in ("roomy", "scarce")]
    + [pytest.param("mixed", 32, options, marks=pytest.mark.slow) for options in ("roomy", "scarce")],
)
def test_engine_and_reference_loop_give_the_same_replies(
    network: Network, alone: Alone, kind: str, count: int, options: str
):
    """Requests of mixed lengths that arrive at different times; each is compared with its own run alone."""
    given = prompts(CONFIG, count, 60, seed=count, shared=30)
    how = samplings(kind, count)
    requests = [Request(row(CONFIG, i, p, s), s) for i, (p, s) in enumerate(zip(given, how, strict=True))]
    told = drive(EngineCore(network, OPTIONS[options]), requests, arrivals=[2 * i % 7 for i in range(count)])
    for i, request in enumerate(requests):
        got, wanted = reply(told[request]), alone(given[i], i, how[i])
        assert got == wanted, f"request {i} of {count}"


@pytest.mark.parametrize("options", ["roomy", "chunks of 7"])
def test_a_family_without_canvases_gives_the_same_replies(options: str):
    """Gemma 4: pages of 256 tokens, one kind of scalar, no slots."""
    config = replace(CONFIG, family="gemma4", canvas_length=1)
    sibling = make_random_network(config, seed=2).requires_grad_(False)
    given, how = prompts(config, 5, 60, seed=3, shared=30), samplings("autoregressive", 5)
    requests = [Request(row(config, i, p, s), s) for i, (p, s) in enumerate(zip(given, how, strict=True))]
    told = drive(EngineCore(sibling, replace(OPTIONS[options], memory=1 << 23)), requests, arrivals=[0, 1, 1, 5, 9])
    for i, request in enumerate(requests):
        assert reply(told[request]) == reference_reply(sibling, config, given[i], i, how[i])


@pytest.mark.parametrize(
    "options", [*(pytest.param(how, marks=pytest.mark.slow) for how in ("roomy", "chunks of 7")), "scarce"]
)
@pytest.mark.parametrize("logprobs", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_verification_and_logprobs_are_the_same(network: Network, alone: Alone, logprobs: int | None, options: str):
    """Verified decoding and log-probabilities, token by token too, beside requests that ask for neither."""
    how: list[AnySampling] = [
        SHORT.with_(max_verifications=2),
        SHORT,
        WARM,
        Sampling(steps=3, max_verifications=9),
        SHORT.with_(max_verifications=1),
        SHORT.with_(max_repairs=2, repair_below=0.2),
    ]
    given = prompts(CONFIG, len(how), 40, seed=4, shared=20)
    tell = [logprobs if i != 1 else None for i in range(len(how))]
    requests = [Request(row(CONFIG, i, p, how[i], logprobs=tell[i]), how[i]) for i, p in enumerate(given)]
    told = drive(EngineCore(network, OPTIONS[options]), requests, arrivals=[0, 1, 2, 2, 5, 6])
    for i, request in enumerate(requests):
        got, wanted = reply(told[request]), alone(given[i], i, how[i], logprobs=tell[i])
        assert (got.tokens, got.usage, got.finish_reason) == (wanted.tokens, wanted.usage, wanted.finish_reason)
        ours, theirs = ([(t.token, *(id for id, _ in t.top)) for t in r.logprobs or ()] for r in (got, wanted))
        assert ours == theirs
        values = [[t.logprob for t in r.logprobs or ()] for r in (got, wanted)]
        torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(values[1]), rtol=1e-4, atol=1e-4)
    assert sum(reply(told[request]).usage.redos for request in requests) > 0
    assert sum(reply(told[request]).usage.repairs for request in requests) > 0


@pytest.mark.parametrize("count", [1, 3, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_cancelled_requests_keep_committed_tokens_and_disturb_no_other(network: Network, alone: Alone, count: int):
    given = prompts(CONFIG, count, 60, seed=count, shared=30)
    how = samplings("mixed", count)
    requests = [Request(row(CONFIG, i, p, s), s) for i, (p, s) in enumerate(zip(given, how, strict=True))]
    cancels = {i: 1 + 3 * i % 11 for i in range(0, count, 2)}
    core = EngineCore(network, EngineOptions(memory=1 << 22, max_running=8))
    told = drive(core, requests, cancels=cancels)
    assert reply(told[requests[0]]).finish_reason == "cancelled"
    for i, request in enumerate(requests):
        got, wanted = reply(told[request]), alone(given[i], i, how[i])
        if got.finish_reason == "cancelled":
            assert i in cancels
            assert got.tokens == wanted.tokens[: len(got.tokens)]
        else:
            assert got == wanted
    assert core.scheduler.running == core.scheduler.waiting == 0


@pytest.mark.slow
def test_the_shipped_model_gives_the_same_replies():
    """Trained weights, settled canvases of 90, a batch of 8 that shares a page with nobody."""
    lm = blockpress.load("sudoku-nano")
    given = [lm.encode(sudoku.layout(sudoku.generate_puzzle(seed, givens=36).puzzle)) for seed in range(8)]
    sampling = lm.generation.sampling.with_(steps=16)
    requests = [Request(row(lm.config, i, p, sampling, max_tokens=None), sampling) for i, p in enumerate(given)]
    told = drive(EngineCore(lm.network, EngineOptions(memory=1 << 26)), requests)
    for i, request in enumerate(requests):
        assert reply(told[request]) == reference_reply(lm.network, lm.config, given[i], i, sampling, max_tokens=None)


def test_events_are_those_of_the_reference_loop(network: Network):
    """Step by step: canvas, argmax, accepted, entropies; and one `Done` at the end."""
    from blockpress.decoding.generate import generate

    [prompt] = prompts(CONFIG, 1, 30, seed=1)
    request = Request(row(CONFIG, 0, prompt, SHORT), SHORT)
    told = drive(EngineCore(network, EngineOptions(memory=1 << 22)), [request])[request]
    wanted = list(generate(network, [row(CONFIG, 0, prompt, SHORT)], SHORT))
    assert [type(event) for event in told] == [type(event) for event in wanted]
    for ours, theirs in zip(told, wanted, strict=True):
        if isinstance(ours, Denoised) and isinstance(theirs, Denoised):
            assert (ours.canvas, ours.step, ours.settled) == (theirs.canvas, theirs.step, theirs.settled)
            assert torch.equal(ours.argmax, theirs.argmax) and torch.equal(ours.accepted, theirs.accepted)
            torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-5)
    assert isinstance(told[-1], Done)


def test_pictures_are_read_whole_and_reused(network: Network):
    """A picture is never cut, sees itself, and pages that show another picture are not taken for it."""
    generator = torch.Generator().manual_seed(0)
    prompt = prompts(CONFIG, 1, 1, seed=2)[0] * 50
    shown = [{7: torch.randn(9, CONFIG.hidden_size, generator=generator)} for _ in range(2)]
    for options in (OPTIONS["roomy"], OPTIONS["chunks of 7"]):
        requests = []
        for i, images in enumerate([shown[0], shown[0], shown[1]]):
            one = row(CONFIG, i, prompt, SHORT)
            one.images = images
            requests.append(Request(one, SHORT))
        told = drive(EngineCore(network, options), requests, arrivals=[0, 12, 12])
        wanted = [
            reference_reply(network, CONFIG, prompt, i, SHORT, images=images)
            for i, images in enumerate([shown[0], shown[0], shown[1]])
        ]
        assert [reply(told[request]) for request in requests] == wanted
        assert wanted[0].tokens != wanted[2].tokens
