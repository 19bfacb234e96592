"""Rules of one's own for accepting and settling: honoured by the engine as by the reference loop, beside other requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.config import PRESETS, AutoregressiveSampling, Sampling
from blockpress.decoding import Denoised, Failed
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.model import Network

from .driver import AnySampling, drive, prompts, reference_reply, reply, row
from .special import CONFIG as CAPTURED
from .special import asked, damped, on_paper

pytestmark = pytest.mark.end_to_end

CONFIG = replace(PRESETS["tiny"](), context_length=192)
ROOM = EngineOptions(memory=1 << 22)
SHORT = Sampling(steps=5, confidence=0.0)


@dataclass(frozen=True)
class SurestShare:
    share: float

    def __call__(self, entropy: Tensor) -> Tensor:
        keep = max(1, round(self.share * entropy.shape[-1]))
        return entropy <= entropy.kthvalue(keep, dim=-1, keepdim=True).values


def at_once(unchanged: Tensor, entropy: Tensor) -> Tensor:
    return torch.ones_like(unchanged, dtype=torch.bool)


@pytest.fixture(scope="module")
def network() -> Network:
    return damped(CONFIG)


def test_mixed_rules_answer_as_alone(network: Network):
    """Two that share a rule, two with others, the built-in ones, checks, and a request without canvases."""
    half = SurestShare(0.5)
    how: list[AnySampling] = [
        SHORT.with_(accept=half),
        SHORT,
        SHORT.with_(accept=SurestShare(0.9), steps=3),
        SHORT.with_(settle=at_once),
        AutoregressiveSampling(),
        SHORT.with_(accept=half, steps=7),
        SHORT.with_(accept=half, max_verifications=2),
    ]
    given = prompts(CONFIG, len(how), 40, seed=6, shared=20)
    requests = [Request(row(CONFIG, i, p, s), s) for i, (p, s) in enumerate(zip(given, how, strict=True))]
    told = drive(EngineCore(network, ROOM), requests, arrivals=[0, 0, 1, 2, 2, 3, 3])
    for i, request in enumerate(requests):
        assert reply(told[request]) == reference_reply(network, CONFIG, given[i], i, how[i]), f"request {i}"
    for i, share in ((0, 0.5), (2, 0.9)):
        steps = [event for event in told[requests[i]] if isinstance(event, Denoised)]
        keep = round(share * CONFIG.canvas_length)
        assert {int(step.accepted.sum()) for step in steps} == {keep}
    assert {e.step for e in told[requests[3]] if isinstance(e, Denoised)} == {1}


class Empty(SurestShare):
    """A rule that is false as a truth value."""

    def __len__(self) -> int:
        return 0


def test_a_rule_that_is_falsy_counts(network: Network):
    own = SHORT.with_(accept=Empty(0.5))
    requests = [Request(row(CONFIG, 0, [5, 6, 7], own), own)]
    told = drive(EngineCore(network, ROOM), requests)
    assert reply(told[requests[0]]) == reference_reply(network, CONFIG, [5, 6, 7], 0, own)


def fails(*_: Tensor) -> Tensor:
    raise ValueError("a rule at fault")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accept": fails}, "a rule at fault"),
        ({"settle": fails}, "a rule at fault"),
        ({"accept": lambda entropy: entropy}, "sampling.accept gave torch.float32"),
        ({"settle": lambda unchanged, entropy: entropy.mean() < 1}, r"sampling.settle gave torch.bool []"),
    ],
)
def test_a_failing_rule_ends_only_its_request(network: Network, changes: dict[str, Callable[..., Any]], said: str):
    how = [SHORT, SHORT.with_(**changes), SHORT.with_(accept=SurestShare(0.5))]
    requests = [Request(row(CONFIG, i, [5, 6, 7], s), s) for i, s in enumerate(how)]
    core = EngineCore(network, ROOM)
    told = drive(core, requests)
    last = told[requests[1]][-1]
    assert isinstance(last, Failed) and said in last.error.message
    for i in (0, 2):
        assert reply(told[requests[i]]) == reference_reply(network, CONFIG, [5, 6, 7], i, how[i])
    assert core.stats.failures == 1


def test_custom_rules_run_eagerly_beside_graphs(network: Network):
    core = on_paper(damped(), EngineOptions(memory=1 << 23))
    graphs = core.runner.captured
    assert graphs is not None
    given, own = prompts(CAPTURED, 2, 20, seed=3), SHORT.with_(accept=SurestShare(0.5))
    drive(core, asked(given, [own, own]))
    assert graphs.replays == 0
    drive(core, asked(given, [SHORT, SHORT]))
    assert graphs.replays > 0 and core.runner.eager is None
