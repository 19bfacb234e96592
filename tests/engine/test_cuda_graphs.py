"""Captured steps: on the CPU graphs on paper, over attention in torch; on a GPU the real ones, marked `gpu`."""

from __future__ import annotations

import copy

import pytest
import torch

from blockpress.decoding import Denoised
from blockpress.engine import EngineCore, EngineOptions
from blockpress.engine.canvas_state import StepFeatures
from blockpress.engine.cuda_graphs import SIZES, CapturedGraph, GraphKey, Recorded, why_not_capturable
from blockpress.model import Network

from .driver import drive, prompts, reply
from .special import CONFIG, SHORT, InTorch, alone, asked, damped, on_paper, poison

MEMORY = 1 << 23


@pytest.fixture(scope="module")
def network() -> Network:
    return damped()


@pytest.mark.parametrize("count", [1, 5, 8])
def test_replayed_graphs_give_the_tokens_of_the_reference_loop(network: Network, count: int):
    """Steps and temperatures of their own, banned and pinned tokens, padding, pages of NaN where nothing was written."""
    given = prompts(CONFIG, count, 60, seed=count, shared=30)
    how = [SHORT.with_(steps=3 + i % 3, t_max=0.8 + 0.1 * i) for i in range(count)]
    core = poison(on_paper(network, EngineOptions(memory=MEMORY, max_running=7)))
    requests = asked(given, how)
    told = drive(core, requests, arrivals=[3 * i % 7 for i in range(count)])
    for i, request in enumerate(requests):
        assert reply(told[request]) == alone(network, i, given[i], how[i]), f"request {i} of {count}"
    graphs = core.runner.captured
    assert graphs is not None and graphs.failed is None and core.runner.eager is None
    assert graphs.replays > graphs.captures > 0


def test_events_are_not_overwritten_by_later_replays(network: Network):
    """Events are copies: the next replay writes over the outputs."""
    given = prompts(CONFIG, 2, 20, seed=3)
    core, requests = on_paper(network, EngineOptions(memory=MEMORY)), asked(given, [SHORT, SHORT])
    for request in requests:
        core.submit(request)
    kept = []
    while core.busy:
        steps = [event for _, event in core.step().events if isinstance(event, Denoised)]
        kept += [(event, copy.deepcopy(event)) for event in steps]
    for event, then in kept:
        for name in ("argmax", "accepted", "entropy", "changed"):
            assert torch.equal(getattr(event, name), getattr(then, name)), name
    assert len({tuple(event.argmax.tolist()) for event, _ in kept}) > 2


def test_a_failed_capture_is_reported_and_changes_no_token(network: Network):
    given, how = prompts(CONFIG, 3, 30, seed=1), [SHORT] * 3
    calls = []

    def fail(work: object) -> Recorded:
        calls.append(work)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    core = on_paper(network, EngineOptions(memory=MEMORY), record=fail)
    graphs = core.runner.captured
    assert graphs is not None
    requests = asked(given, how)
    told = drive(core, requests)
    assert [reply(told[one]) for one in requests] == [alone(network, i, given[i], how[i]) for i in range(3)]
    assert core.runner.eager == "RuntimeError: operation not permitted when stream is capturing"
    assert (len(calls), graphs.replays) == (1, 0)


def test_unused_graph_rows_are_padding():
    """A canvas of the last forward must not be stepped again: its request may be paused, and go on later."""
    graph = CapturedGraph(4, [9, 9], torch.device("cpu"))
    graph.fill([[1, 1], [2, 2], [3, 3]])
    graph.fill([[4, 4]])
    assert graph.numbers.tolist() == [[4, 4], [9, 9], [9, 9], [9, 9]]


def test_few_graphs_cover_all_batch_shapes():
    """At most a third of a graph's canvases is nobody's, and page tables grow in few leaps."""
    for count in range(1, 257):
        key = GraphKey.of(count, 1, 256, StepFeatures())
        assert key.canvases in SIZES and count <= key.canvases <= max(count, 1.5 * count)
    assert {GraphKey.of(1, pages, 32, StepFeatures()).width for pages in range(1, 1025)} == {8, 32, 128, 512, 2048}
    assert GraphKey.of(2, 3, 32, StepFeatures(begins=True)) == GraphKey.of(2, 3, 32, StepFeatures(begins=False))
    assert (
        GraphKey.of(2, 3, 32, StepFeatures(pinned=True))
        != GraphKey.of(2, 3, 32, StepFeatures(banned=8))
        != GraphKey.of(2, 3, 32, StepFeatures())
    )


def test_forwards_that_synchronize_are_not_captured(network: Network):
    assert "no kernel reads its pages" in (why_not_capturable(network, None) or "")
    pytest.importorskip("triton")
    assert "experts of layers.0.experts in torch.float32" in (why_not_capturable(network, InTorch()) or "")
    assert why_not_capturable(copy.deepcopy(network).bfloat16(), InTorch()) is None
    assert EngineCore(network, EngineOptions(memory=MEMORY)).runner.eager == "it is not on a GPU"


@pytest.mark.gpu
def test_graphs_equal_eager_kernels():
    """bfloat16 on a GPU: forwards of as many canvases are rounded alike, so every token is the same."""
    network = damped().to(device="cuda", dtype=torch.bfloat16)
    given, how = prompts(CONFIG, 6, 60, seed=6, shared=30), [SHORT] * 6
    answers = []
    for graphs in (True, False):
        core = EngineCore(network, EngineOptions(memory=MEMORY, max_running=6))
        assert core.runner.eager is None
        if not graphs:
            core.runner.captured = None
        requests = asked(given, how, stop_ids=())
        answers.append([reply(told) for told in drive(core, requests).values()])
        captured = core.runner.captured
        assert captured is None or (captured.failed is None and captured.replays > 0)
    assert answers[0] == answers[1]
