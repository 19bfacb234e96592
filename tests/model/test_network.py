"""The two passes of the network: what they may see, what they may change, and that the way in does not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.config import PRESETS, LayerConfig
from blockpress.model import Cache, Network
from blockpress.ops import attention

SLIDING = LayerConfig(kind="sliding_attention", head_dim=8, kv_heads=2)
FULL = LayerConfig(kind="full_attention", head_dim=16, kv_heads=1)
TINY = PRESETS["tiny"]()
WINDOW, CANVAS = TINY.sliding_window, TINY.canvas_length


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network(random_network) -> Network:  # type: ignore[no-untyped-def]
    """Five layers of both kinds; the canvas (12) is longer than the window (8).

    Every token goes through all experts, so that no rounding can send it to another one.
    """
    return random_network(replace(TINY, layers=(SLIDING, SLIDING, FULL, SLIDING, FULL), top_k_experts=4), seed=11)


@pytest.fixture(scope="module")
def local_network(random_network):  # type: ignore[no-untyped-def]
    """`local_network(n)`: n sliding layers and no full one, so that a token's reach is n windows."""
    return lambda count: random_network(replace(TINY, layers=(SLIDING,) * count), seed=5)


def prefilled(network: Network, *rows: Tensor) -> Cache:
    counts = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(counts.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return network.read(padded, network.empty_cache(len(rows)), counts)[1]


def signal_for(network: Network, batch: int, seed: int = 3) -> Tensor:
    return network.soft_embedding(torch.randn(batch, CANVAS, 64, generator=torch.Generator().manual_seed(seed)) * 3)


def close(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@settings(max_examples=12)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
@torch.no_grad()
def test_chunked_prefill_equals_the_whole(network: Network, chunks: list[int], seed: int):
    row = tokens(1, sum(chunks), seed=seed)
    whole, cache = network.read(row, network.empty_cache(1))
    pieces, chunked = [], network.empty_cache(1)
    for piece in row.split(chunks, dim=1):
        hidden, chunked = network.read(piece, chunked)
        pieces.append(hidden)
    close(torch.cat(pieces, dim=1), whole)
    for ours, theirs in zip(chunked.layers, cache.layers, strict=True):
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])
    canvas = tokens(1, CANVAS, seed=seed + 1)
    close(network.denoise(canvas, chunked, None), network.denoise(canvas, cache, None))


@settings(max_examples=12)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.data())
@torch.no_grad()
def test_a_row_in_a_ragged_batch_equals_the_row_alone(network: Network, lengths: list[int], data: st.DataObject):
    rows = [tokens(length, seed=length) for length in lengths]
    more = [tokens(data.draw(st.integers(1, 15)), seed=row) for row in range(len(rows))]
    canvas, signal = tokens(len(rows), CANVAS, seed=8), signal_for(network, len(rows))
    counts = torch.tensor([len(row) for row in more])
    padded = torch.nn.utils.rnn.pad_sequence(more, batch_first=True)
    hidden, cache = network.read(padded, prefilled(network, *rows), counts)
    together = network.denoise(canvas, cache, signal)
    for place, row in enumerate(rows):
        own, alone = network.read(more[place][None], prefilled(network, row))
        close(hidden[place, : len(more[place])], own[0])
        close(together[place], network.denoise(canvas[place][None], alone, signal[place][None])[0])


@torch.no_grad()
def test_padding_has_no_influence(network: Network):
    padded, counts = tokens(2, 9), torch.tensor([9, 4])
    other = padded.clone()
    other[1, 4:] = 63 - other[1, 4:]
    caches = [network.read(x, network.empty_cache(2), counts)[1] for x in (padded, other)]
    canvas = tokens(2, CANVAS)
    assert torch.equal(*(network.denoise(canvas, cache, None) for cache in caches))


@torch.no_grad()
def test_denoise_changes_no_cache(network: Network):
    cache = prefilled(network, tokens(20), tokens(5))
    before = [x.clone() for pair in cache.layers for x in pair]
    network.denoise(tokens(2, CANVAS), cache, signal_for(network, 2))
    assert all(torch.equal(x, old) for x, old in zip((x for pair in cache.layers for x in pair), before, strict=True))
    assert cache.lengths.tolist() == [20, 5]


@pytest.mark.parametrize("op", [attention.plain, attention.fused])
@torch.no_grad()
def test_a_later_token_has_no_influence_on_an_earlier_one(network: Network, op, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(network, "attention_op", op)
    row = tokens(1, 25)
    changed = row.clone()
    changed[0, 17] = 63 - changed[0, 17]
    one, other = (network.read(x, network.empty_cache(1))[0] for x in (row, changed))
    assert torch.equal(one[0, :17], other[0, :17])
    assert (one[0, 17:] != other[0, 17:]).any(-1).all()


@torch.no_grad()
def test_both_attentions_give_the_same_network(network: Network, monkeypatch: pytest.MonkeyPatch):
    runs = []
    for op in (attention.plain, attention.fused):
        monkeypatch.setattr(network, "attention_op", op)
        cache = prefilled(network, tokens(20), tokens(5))
        runs.append(network.denoise(tokens(2, CANVAS), cache, signal_for(network, 2)))
    close(*runs)


def influential(network: Network, length: int) -> list[int]:
    """The places of a context whose token moves anything on a canvas behind it: each is changed in a row of its own."""
    rows = tokens(length).repeat(length + 1, 1)
    rows[range(length), range(length)] = 63 - rows[0]
    canvas = tokens(1, CANVAS, seed=9).expand(length + 1, -1)
    *changed, as_it_was = network.denoise(canvas, prefilled(network, *rows), None)
    return [place for place, read in enumerate(changed) if (read - as_it_was).norm() > 1e-4 * as_it_was.norm()]


@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_sliding_layers_reach_one_window_a_layer(local_network, layers: int):  # type: ignore[no-untyped-def]
    # A canvas sees window - 1 tokens of the context, and each of those, a layer below, window - 1 before itself.
    assert influential(local_network(layers), 30) == list(range(30 - layers * (WINDOW - 1), 30))


@torch.no_grad()
def test_through_a_full_layer_the_whole_context_is_seen(network: Network):
    assert influential(network, 30) == list(range(30))


@torch.no_grad()
def test_every_canvas_token_sees_the_same_context_however_long_the_canvas(local_network):  # type: ignore[no-untyped-def]
    network, context = local_network(1), tokens(20)
    other = context.clone()
    other[20 - (WINDOW - 1)] = 63 - other[20 - (WINDOW - 1)]
    canvas = tokens(1, CANVAS, seed=9)
    one, two = (network.denoise(canvas, prefilled(network, x), None)[0] for x in (context, other))
    assert (one != two).any(-1).all()


@pytest.mark.parametrize("place", [0, 5, CANVAS - 1])
@torch.no_grad()
def test_every_canvas_token_sees_the_whole_canvas(local_network, place: int):  # type: ignore[no-untyped-def]
    network = local_network(1)
    cache, canvas = prefilled(network, tokens(20)), tokens(1, CANVAS)
    other = canvas.clone()
    other[0, place] = 63 - other[0, place]
    one, two = (network.denoise(x, cache, None)[0] for x in (canvas, other))
    assert (one != two).any(-1).all()


@torch.no_grad()
def test_the_canvas_goes_on_from_the_contexts_length(local_network):  # type: ignore[no-untyped-def]
    # The same last tokens behind a longer past: only the distance counts, so the canvas reads the same.
    network = local_network(1)
    near = tokens(WINDOW - 1, seed=1)
    far = torch.cat((tokens(9, seed=2), near))
    canvas = tokens(1, CANVAS)
    close(*(network.denoise(canvas, prefilled(network, x), None) for x in (near, far)))


@torch.no_grad()
def test_the_null_signal_is_a_zero_vector_and_not_zero_logits(network: Network):
    cache, canvas = prefilled(network, tokens(6)), tokens(1, CANVAS)
    first = network.denoise(canvas, cache, None)
    assert torch.equal(first, network.denoise(canvas, cache, torch.zeros(1, CANVAS, 32)))
    even = network.soft_embedding(torch.zeros(1, CANVAS, 64))
    assert (network.denoise(canvas, cache, even) - first).norm() > 0.05 * first.norm()


@torch.no_grad()
def test_each_pass_has_its_own_layer_scalars(random_network):  # type: ignore[no-untyped-def]
    network = random_network(TINY, seed=2)
    row, canvas = tokens(1, 10), tokens(1, CANVAS)

    def both() -> tuple[Tensor, Tensor]:
        hidden, cache = network.read(row, network.empty_cache(1))
        return hidden, network.denoise(canvas, cache, None)

    causal, denoised = both()
    network.layers[0].layer_scalar.mul_(1.5)
    moved = both()
    assert torch.equal(moved[0], causal)
    assert not torch.equal(moved[1], denoised)
    network.layers[0].causal_scalar.mul_(1.5)
    assert not torch.equal(both()[0], causal)


@torch.no_grad()
def test_one_matrix_is_embedding_head_and_soft_embedding(network: Network):
    weight = network.embed_tokens.weight
    row = tokens(1, CANVAS)
    assert torch.equal(network.embed(row), weight[row] * torch.tensor(32**0.5))
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)) * 40
    raw = hidden.double() @ weight.double().T
    close(network.logits(hidden).double(), 30 * torch.tanh(raw / 30))
    assert network.logits(hidden).abs().max() <= 30
    scaled = torch.randn(1, CANVAS, 64, generator=torch.Generator().manual_seed(1))
    close(network.soft_embedding(scaled).double(), scaled.double().softmax(-1) @ weight.double() * 32**0.5)
    sure = torch.full((1, CANVAS, 64), -1e4).scatter(-1, row[..., None], 1e4)
    close(network.soft_embedding(sure), network.embed(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_both_types_run_and_logits_are_float32(random_network, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    network = random_network(TINY).to(dtype)
    cache = prefilled(network, tokens(20), tokens(3))
    hidden = network.denoise(tokens(2, CANVAS), cache, None)
    again = network.denoise(tokens(2, CANVAS), cache, network.soft_embedding(network.logits(hidden)))
    assert hidden.dtype == again.dtype == dtype
    assert network.logits(again).dtype == torch.float32
    assert cache.layers[0][0].dtype == dtype


@torch.no_grad()
def test_bfloat16_is_near_float32(random_network):  # type: ignore[no-untyped-def]
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        network = random_network(replace(TINY, top_k_experts=4)).to(dtype)
        runs.append(network.logits(network.denoise(tokens(1, CANVAS), prefilled(network, tokens(20)), None)))
    assert (runs[1] - runs[0]).norm() < 0.1 * runs[0].norm()


@torch.no_grad()
def test_layers_of_one_kind_may_differ_in_their_key_value_heads(random_network):  # type: ignore[no-untyped-def]
    network = random_network(
        replace(TINY, layers=(SLIDING, replace(SLIDING, kv_heads=4), replace(FULL, kv_heads=2), FULL))
    )
    cache = prefilled(network, tokens(9), tokens(3)).select(torch.tensor([1, 0, 1]))
    assert network.denoise(tokens(3, CANVAS), cache, None).isfinite().all()


def test_rotary_tables_are_cached_for_the_same_positions_only(random_network: RandomNetwork, tiny: ModelConfig) -> None:
    network, dtype = random_network(tiny), torch.float32
    here, there = torch.arange(5)[None], torch.arange(1, 6)[None]
    with torch.inference_mode():
        first = network._rotary(here, dtype)
        assert network._rotary(here.clone(), dtype) is first
        assert network._rotary(here, torch.bfloat16) is not first
        other = network._rotary(there, dtype)
        fresh = network._rotary(here, dtype)
    for kind, tables in fresh.items():
        assert all(map(torch.equal, tables, first[kind])) and not torch.equal(tables[0], other[kind][0])
    assert not any(table.is_inference() for pair in network._rotary(here, dtype).values() for table in pair)


def test_a_network_without_memory_draws_no_weights(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta" a draw does nothing, and torch imports its compiler for it: a second before every answer."""

    def refused(weight: Tensor, **options: float) -> Tensor:
        assert not weight.is_meta
        return weight.fill_(1)

    monkeypatch.setattr(Tensor, "normal_", refused)
    with torch.device("meta"):
        network = Network(tiny)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert bool((Network(tiny).embed_tokens.weight == 1).all()), "with memory they are drawn"
