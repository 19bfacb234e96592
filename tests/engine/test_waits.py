"""The engine on a stand-in for a GPU: the tokens of the processor to the last bit, and how often a forward is waited for.

Figures are (waits, staged copies) of one forward; the line that caused one stands in the failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.checkpoints import load_network
from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Event, Failed, Reply
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.modes import reads_draft
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.model import Network
from blockpress.quantize.encoders import FORMATS
from blockpress.quantize.synthetic import synthesize

from ..conftest import make_random_network
from ..standin import Card, Tally, plain_torch
from .driver import AnySampling, drive, prompts, reply, row, submitted
from .special import CONFIG, SHORT, damped, special

pytestmark = pytest.mark.end_to_end
GREEDY = AutoregressiveSampling()
WARM = AutoregressiveSampling(temperature=1.2, top_k=20, top_p=0.9)
ROOMY = EngineOptions(memory=1 << 23)
SCARCE = EngineOptions(memory=5 << 14, max_running=6, chunk=16)
MIXED: list[AnySampling] = [
    SHORT,
    WARM,
    SHORT.with_(steps=3, max_verifications=2),
    GREEDY,
    WARM.with_(temperature=0.7),
    SHORT,
]


def there(network: Network, card: Card) -> Network:
    """The network on the card, with what it makes once: the tables of angles, and those of codes."""
    network = network.to("cuda")
    requests = [Request(row(network.config, 0, [5, 6, 7], how, room=60, max_tokens=1), how) for how in ways(network)]
    drive(EngineCore(network, ROOMY), requests)
    card.take()
    return network


def ways(network: Network) -> list[AnySampling]:
    return [GREEDY, Sampling(steps=1)] if network.config.has_canvas else [GREEDY]


def watched(card: Card, core: EngineCore) -> list[tuple[Sequence[ScheduledRequest], list[bool], Tally]]:
    """What every forward of a core comes to: its parts, which of them read drafts, and its tally."""
    found, step, plan = [], core.step, core.scheduler.schedule
    drafts: list[bool] = []

    def planned() -> Sequence[ScheduledRequest]:
        works = plan()
        drafts[:] = [reads_draft(work) for work in works]
        return works

    def stepped() -> Any:
        card.take()
        record = step()
        found.append((record.scheduled, [*drafts], card.take()))
        return record

    core.scheduler.schedule, core.step = planned, stepped  # type: ignore[method-assign]
    return found


def asked(how: Sequence[AnySampling], logprobs: int | None = None, longest: int = 30, **changes: Any) -> list[Request]:
    """Random prompts; those of canvases deny and pin."""
    given, changes = prompts(CONFIG, len(how), longest, seed=7, shared=14), {"max_tokens": 14, **changes}
    rows = [
        special(i, given[i], one, logprobs=logprobs, **changes)
        if isinstance(one, Sampling)
        else row(CONFIG, i, given[i], one, logprobs=logprobs, **changes)
        for i, one in enumerate(how)
    ]
    return [Request(*pair) for pair in zip(rows, how, strict=True)]


CASES: dict[str, tuple[list[AnySampling], int | None, EngineOptions, dict[int, int]]] = {
    "diffusion": ([SHORT] * 3, None, ROOMY, {}),
    "rules of their own": ([SHORT, SHORT.with_(accept=lambda entropy: entropy < 0.5)] * 2, None, ROOMY, {}),
    "greedy": ([GREEDY] * 3, None, ROOMY, {}),
    "sampled": ([WARM] * 4, None, ROOMY, {}),
    "mixed": (MIXED, None, ROOMY, {}),
    "chunks": (MIXED, None, replace(ROOMY, chunk=7, prefill_tokens=20), {}),
    "preempted": (MIXED, None, SCARCE, {}),
    "cancelled": (MIXED, None, ROOMY, {0: 2, 1: 3, 4: 1}),
    "verified": ([SHORT.with_(max_verifications=2)] * 3, None, ROOMY, {}),
    "log-probabilities": (MIXED, 2, ROOMY, {}),
}


QUICK = ("mixed",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_device_gives_the_same_tokens_with_one_wait_a_forward(case: str, card: Card):
    """Whatever it holds; once more where canvases that were read are judged, and once more for the log-probabilities of
    tokens, however many requests there are."""
    how, logprobs, options, cancels = CASES[case]
    arrivals = [2 * i % 7 for i in range(len(how))]
    changes: dict[str, Any] = (
        {"max_tokens": 30, "stop_ids": ()} if case == "preempted" else {}
    )  # so long that pages run out
    with plain_torch():
        requests = asked(how, logprobs, **changes)
        wanted = [reply(told) for told in drive(EngineCore(damped(), options), requests, arrivals, cancels).values()]
    core = EngineCore(there(damped(), card), options)
    found, requests = watched(card, core), asked(how, logprobs, **changes)
    answers = drive(core, requests, arrivals, cancels)
    for request, expected in zip(requests, wanted, strict=True):
        got = reply(answers[request])
        assert replace(got, logprobs=None) == replace(expected, logprobs=None)
        values = [[each.logprob for each in told.logprobs or ()] for told in (got, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-4), "few rows have other kernels on a processor"
    assert len(found) > 5 and (core.scheduler.stats.preemptions > 0) == (case == "preempted")
    for works, drafts, tally in found:
        tokens = [isinstance(work.request.sampling, AutoregressiveSampling) for work in works]
        checked = any(draft and not token for draft, token in zip(drafts, tokens, strict=True))
        told = (
            any(token and work.num_logit_tokens for work, token in zip(works, tokens, strict=True))
            and logprobs is not None
        )
        seen = any(work.canvas or work.num_logit_tokens for work in works)
        assert tally.figures == (seen + checked + told, 0), (works, tally)


def test_prefill_alone_has_no_wait(card: Card):
    """Chunks whose keys and values alone are wanted: nothing comes back."""
    core = EngineCore(there(damped(), card), replace(ROOMY, chunk=16, reuse_prefixes=False))
    found, prompt = watched(card, core), [5, 6, 7] * 20
    for how in (GREEDY, SHORT):
        drive(core, [Request(row(CONFIG, 0, prompt, how), how)])
        figures = [tally.figures for *_, tally in found]
        silent = [works[0].num_logit_tokens == 0 and not works[0].canvas for works, *_ in found]
        assert silent[:2] == [True, True] and not silent[-1]
        assert figures == [(0, 0) if quiet else (1, 0) for quiet in silent]
        found.clear()


def test_features_on_the_device_cost_no_wait(card: Card):
    features = torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    prompt = prompts(CONFIG, 1, 1, seed=2)[0] * 50

    def answer(core: EngineCore) -> Reply:
        one = row(CONFIG, 0, prompt, SHORT)
        one.images = {at: features.to(core.network.device) for at in (7, 30)}
        request = Request(one, SHORT)
        return reply(drive(core, [request])[request])

    with plain_torch():
        wanted = answer(EngineCore(damped(), ROOMY))
    core = EngineCore(there(damped(), card), ROOMY)
    found = watched(card, core)
    assert answer(core) == wanted
    assert {tally.figures for *_, tally in found} == {(1, 0)}


def test_a_family_without_canvases_has_one_wait_a_token(card: Card):
    config = replace(CONFIG, family="gemma4", canvas_length=1)

    def answers(core: EngineCore) -> list[Reply]:
        given = prompts(config, 3, 30, seed=3)
        requests = [
            Request(row(config, i, p, how), how)
            for i, (p, how) in enumerate(zip(given, (WARM, GREEDY, WARM), strict=True))
        ]
        told = drive(core, requests)
        return [reply(told[request]) for request in requests]

    def network() -> Network:
        return make_random_network(config, seed=2).requires_grad_(False)

    with plain_torch():
        wanted = answers(EngineCore(network(), ROOMY))
    core = EngineCore(there(network(), card), ROOMY)
    found = watched(card, core)
    assert answers(core) == wanted
    assert {tally.figures for *_, tally in found} == {(1, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_packed_weights_give_the_same_tokens_on_a_device(form: str, tmp_path: Path, card: Card):
    """Read onto the card. Without Triton the experts are run one by one: a wait a layer says who has how many tokens."""
    synthesize("tiny", tmp_path / form, FORMATS[form]())

    def answers(core: EngineCore) -> list[Reply]:
        config = core.network.config
        given = prompts(config, 3, 20, seed=3)
        requests = [Request(row(config, i, p, SHORT, room=40), SHORT) for i, p in enumerate(given)]
        told = drive(core, requests)
        return [reply(told[request]) for request in requests]

    with plain_torch():
        wanted = answers(EngineCore(load_network(tmp_path / form, dtype="float32", compute_dtype="float32"), ROOMY))
    network = load_network(tmp_path / form, dtype="float32", compute_dtype="float32", device="cuda")
    core = EngineCore(there(network, card), ROOMY)
    found = watched(card, core)
    assert answers(core) == wanted
    assert {tally.figures for *_, tally in found} == {(1 + len(network.layers), 0)}


@pytest.mark.slow
def test_nan_and_sampling_errors_end_only_their_request_on_a_device(card: Card, monkeypatch: pytest.MonkeyPatch):
    """One request's keys are NaN, another's turn cannot say what it denies: the third is answered, in as many waits."""
    network = there(damped(), card)
    for how in (GREEDY, WARM):
        wanted = lone(network, how)
        core, requests = EngineCore(network, ROOMY), asked([how] * 3)
        found = watched(card, core)
        monkeypatch.setattr(type(requests[1].row), "banned_ids", property(banned_by({requests[1].row})))
        told = play_spoilt(core, requests, spoilt=requests[0])
        monkeypatch.undo()
        failed = [told[request][-1] for request in requests[:2]]
        assert all(isinstance(event, Failed) for event in failed)
        assert "NaN" in failed[0].error.message and "cannot be told" in failed[1].error.message  # type: ignore[union-attr]
        assert reply(told[requests[2]]) == wanted
        assert {tally.figures for *_, tally in found} == {(1, 0)}


def banned_by(broken: set[Any]) -> Callable[[Any], Mapping[int, Any]]:
    def banned(one: Any) -> Mapping[int, Any]:
        if one in broken:
            raise ValueError("what is banned cannot be told")
        return {}

    return banned


def lone(network: Network, how: AnySampling) -> Reply:
    request = asked([how] * 3)[2]
    return reply(drive(EngineCore(network, ROOMY), [request])[request])


def play_spoilt(core: EngineCore, requests: Sequence[Request], spoilt: Request) -> dict[Request, list[Event]]:
    """Play, and put NaN into the pages of one request once its prompt has been read."""
    told: dict[Request, list[Event]] = {request: [] for request in requests}
    copies = dict(zip(requests, submitted(core, requests), strict=True))
    while core.busy:
        for request, event in core.step().events:
            told[request].append(event)
        if copies[spoilt].num_computed_tokens == len(spoilt.row.prompt):
            spoil(core, copies[spoilt])
    return told


def spoil(core: EngineCore, request: Request) -> None:
    for layer, kind in enumerate(core.kv_cache.kinds):
        part: Tensor
        for part in core.kv_cache.pages(layer):
            for page in request.tables[kind]:
                part[:, page] = torch.nan
