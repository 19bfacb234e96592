"""What a step of the engine reads from the vocabulary, in tiles and blocks, with either soft embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from blockpress.config import Sampling
from blockpress.decoding import Reply
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.batch import Part
from blockpress.engine.canvas_state import CanvasState
from blockpress.engine.denoising import CanvasBatch, begin_step, finish_step, packed_entry
from blockpress.engine.options import SoftEmbedding
from blockpress.model import Network
from blockpress.ops import vocabulary
from blockpress.ops.vocabulary import TILE, SampleStats, blocks, fused

from .driver import drive, prompts, reference_reply, reply, row
from .special import CONFIG, damped

SEVERAL_TILES = replace(CONFIG, vocab_size=TILE + 37)
LOOSE = [Sampling(steps=3 + i, confidence=0.0, entropy_bound=2.0) for i in range(4)]
"""Canvases end at different steps."""


@pytest.fixture(scope="module")
def network() -> Network:
    """Some of its rows are sure of their token, and some are not."""
    made = damped(SEVERAL_TILES)
    made.embed_tokens.weight.mul_(4)
    return made


def answers(network: Network, soft_embedding: SoftEmbedding) -> tuple[list[list[int]], list[Reply]]:
    given = prompts(SEVERAL_TILES, 4, 20, seed=5)
    core = EngineCore(network, EngineOptions(memory=1 << 23, soft_embedding=soft_embedding))
    requests = [Request(row(SEVERAL_TILES, i, prompt, LOOSE[i]), LOOSE[i]) for i, prompt in enumerate(given)]
    told = drive(core, requests, arrivals=[0, 0, 1, 3])
    return given, [reply(told[request]) for request in requests]


@pytest.mark.parametrize("soft_embedding", ["exact", "sparse"])
def test_a_last_step_has_the_same_bits_beside_a_canvas_that_goes_on(
    network: Network, soft_embedding: SoftEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the vocabulary is read tile by tile without a soft embedding, as a large one is."""
    monkeypatch.setattr(fused, "FUSED", 0)
    states = torch.randn(SEVERAL_TILES.canvas_length, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    for scale in (0.3, 1.0, 2.0):
        (full, _), (last, _) = (stepped(network, soft_embedding, states * scale, on) for on in (True, False))
        assert torch.equal(full.entropy, last.entropy) and torch.equal(full.packed_results, last.packed_results)


@pytest.mark.parametrize("rows", [5, 1000])
def test_tokens_do_not_depend_on_vocabulary_tiles(network: Network, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of so many rows, which are no whole canvases."""
    monkeypatch.setattr(blocks, "BUFFER", rows * SEVERAL_TILES.vocab_size * 4)
    given, found = answers(network, "exact")
    assert found == [reference_reply(network, SEVERAL_TILES, prompt, i, LOOSE[i]) for i, prompt in enumerate(given)]
    assert len({token for answer in found for token in answer.tokens}) > 5
    assert any(token >= TILE for answer in found for token in answer.tokens)


def test_a_sparse_soft_embedding_generates(network: Network) -> None:
    """Other tokens may come of it, but whole answers."""
    _, found = answers(network, "sparse")
    assert {answer.finish_reason for answer in found} <= {"stop", "length"} and all(answer.tokens for answer in found)


@torch.inference_mode()
def stepped(
    network: Network,
    soft_embedding: SoftEmbedding,
    hidden: Tensor,
    goes_on: bool = True,
    pins: Mapping[int, int] = MappingProxyType({}),
) -> tuple[Any, Tensor]:
    """The first step of one request's canvas whose final hidden states are these, and its next signal."""
    slots, request = CanvasState(network, 1), Request(row(SEVERAL_TILES, 0, [5, 6], LOOSE[0]), LOOSE[0])
    request.slot, request.row.pins = 0, pins
    features = replace(slots.begin([request]), goes_on=goes_on)
    part = Part(request=request, first=0, start=0, stop=SEVERAL_TILES.canvas_length, canvas=True)
    canvases = CanvasBatch.of(torch.tensor([packed_entry(part)]))
    finished = finish_step(
        network,
        slots,
        canvases,
        features,
        begin_step(network, slots, canvases, features),
        hidden,
        soft_embedding,
    )
    return finished, slots.signal[0]


def test_a_sparse_soft_embedding_is_near_the_exact_one_and_changes_nothing_else(network: Network) -> None:
    """It leaves out at most 2^-9 of the probability."""
    sizes = torch.linspace(0.1, 4, SEVERAL_TILES.canvas_length)[:, None]
    hidden = torch.randn(SEVERAL_TILES.canvas_length, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    (exact, wanted), (sparse, got) = (stepped(network, kind, hidden * sizes) for kind in ("exact", "sparse"))
    assert torch.equal(exact.packed_results, sparse.packed_results) and torch.equal(exact.accepted, sparse.accepted)
    assert torch.equal(exact.entropy, sparse.entropy)
    longest = float(network.embed_tokens.weight.norm(dim=-1).max() * network.embed_scale())
    apart = (got - wanted).norm(dim=-1)
    assert bool((apart <= 2.0**-9 * longest + 1e-5).all())
    assert bool((apart > 1e-5).any()), "rows that are sure leave something out"


def test_a_step_that_is_the_last_of_all_its_canvases_computes_no_soft_embedding(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canvases of three and of four steps: the one that goes on needs its own."""
    asked, read = list[SoftEmbedding | None](), vocabulary.sample_from_hidden

    def watched(*given: Any, signal: SoftEmbedding | None, **more: Any) -> SampleStats:
        asked.append(signal)
        return read(*given, signal=signal, **more)

    monkeypatch.setattr(vocabulary, "sample_from_hidden", watched)
    given = prompts(SEVERAL_TILES, 2, 20, seed=5)
    core = EngineCore(network, EngineOptions(memory=1 << 23))
    requests = [
        Request(row(SEVERAL_TILES, i, prompt, LOOSE[i], max_tokens=12), LOOSE[i]) for i, prompt in enumerate(given)
    ]
    told = drive(core, requests)
    assert asked == ["exact", "exact", "exact", None]
    for i, (request, prompt) in enumerate(zip(requests, given, strict=True)):
        expected = reference_reply(network, SEVERAL_TILES, prompt, i, LOOSE[i], max_tokens=12)
        assert reply(told[request]) == expected


def test_without_a_soft_embedding_a_step_is_the_same_and_its_slot_keeps_the_old_one(network: Network) -> None:
    hidden = torch.randn(SEVERAL_TILES.canvas_length, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    pinned = {1: 9}
    (full, signal), (last, kept) = (stepped(network, "exact", hidden, goes_on, pinned) for goes_on in (True, False))
    assert torch.equal(full.packed_results, last.packed_results) and torch.equal(full.entropy, last.entropy)
    assert bool(signal.any()) and not bool(kept.any())
    assert last.argmax[0, 1] == 9
