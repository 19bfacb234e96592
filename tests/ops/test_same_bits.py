"""A row has the same bits alone and among any others, at any place: each operation, type and weight, C++ and torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from blockpress.ops import attention, experts, geglu, linear, norm, rope, rows, vocabulary
from blockpress.ops.attention import AttentionSpan
from blockpress.ops.cpu import bridge
from blockpress.ops.integers import quantized
from blockpress.ops.packed import HalfFloats
from blockpress.ops.spans import varlen_attention
from blockpress.ops.vocabulary import native
from tests.ops import layouts
from tests.ops.draws import numbers, threads

pytestmark = pytest.mark.usefixtures("no_gradients")
TYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
DEPTH, COLUMNS, MANY = 96, 80, 70
SOME = [(0, 1), (3, 4), (69, 70), (5, 7), (20, 23), (60, 64), (1, 6), (11, 24), (0, 70)]
"""Rows that are computed alone: a single one, as few as kernels for few rows take, and more, at any place."""
WEIGHTS: dict[str, Callable[[torch.dtype], object]] = {
    "its own": lambda dtype: numbers(COLUMNS, DEPTH, dtype=dtype, seed=1),
    "transposed": lambda dtype: numbers(DEPTH, COLUMNS, dtype=dtype, seed=1).T,
    "halves": lambda dtype: HalfFloats(values=numbers(COLUMNS, DEPTH, dtype=torch.float16, seed=1)),
    "float8": lambda dtype: layouts.fp8((COLUMNS, DEPTH), 1),
    "int8": lambda dtype: layouts.int8((COLUMNS, DEPTH), 1, group=32, asymmetric=True),
    "int4": lambda dtype: layouts.int4((COLUMNS, DEPTH), 1, group=32),
    "nvfp4": lambda dtype: layouts.nvfp4((COLUMNS, DEPTH), 1),
    "mxfp4": lambda dtype: layouts.mxfp4((COLUMNS, DEPTH), 1),
    "integers": lambda dtype: quantized(numbers(COLUMNS, DEPTH, seed=1)),
}


@pytest.fixture(params=["C++", "torch"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """torch: what runs where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(bridge, "library", lambda: None)
        monkeypatch.setattr(bridge, "_worth", lambda: False)
        monkeypatch.setattr(rows, "_library", lambda: None)
        monkeypatch.setattr(native, "_library", lambda: None)
    elif bridge.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def same(op: Callable[..., Tensor], *given: Tensor, count: int = MANY) -> None:
    """op over the first axis of its arguments: any of its rows alone, in copies of their own, have the same bits."""
    whole = op(*given)
    assert len(whole) == count and whole.isfinite().any()
    for first, last in SOME:
        some = op(*(x[first:last].clone() for x in given))
        assert torch.equal(some.nan_to_num(), whole[first:last].nan_to_num()), f"rows {first} to {last}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.usefixtures("version")
def test_a_row_of_a_product_does_not_depend_on_the_others(kind: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[kind](dtype)
    same(lambda x: linear.linear(x, weight), numbers(MANY, DEPTH, dtype=dtype))
    if kind != "transposed":
        shares = torch.softmax(numbers(MANY, COLUMNS), dim=-1).to(dtype)
        same(lambda x: linear.combine(x, weight), shares)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("columns", "depth"), [(3, 5), (16, 16), (130, 900), (7, 2100)])
@pytest.mark.usefixtures("version")
def test_products_of_any_shape(columns: int, depth: int, dtype: torch.dtype) -> None:
    """Smaller than any kernel's tile, and deeper than what is summed in one go."""
    weight = numbers(columns, depth, dtype=dtype, seed=1)
    same(lambda x: linear.linear(x, weight), numbers(MANY, depth, dtype=dtype))
    with threads(2):
        same(lambda x: linear.linear(x, weight), numbers(MANY, depth, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (8, 2), (8, 3)])
@pytest.mark.usefixtures("version")
def test_a_token_of_the_experts_does_not_depend_on_the_others(count: int, top_k: int, dtype: torch.dtype) -> None:
    gate_up = numbers(count, 2 * 24, DEPTH, dtype=dtype, seed=1) * DEPTH**-0.5
    down = numbers(count, DEPTH, 24, dtype=dtype, seed=2)
    scale = torch.rand(count, generator=torch.Generator().manual_seed(3)) + 0.5

    def run(x: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = experts.route(scores, top_k, scale)
        return experts.moe_forward(x, weights, chosen, gate_up, down)

    same(run, numbers(MANY, DEPTH, dtype=dtype), numbers(MANY, count, dtype=dtype, seed=4))
    tokens, scores = numbers(1100, DEPTH, dtype=dtype), numbers(1100, count, dtype=dtype, seed=4)
    assert torch.equal(run(tokens, scores)[500:690], run(tokens[500:690], scores[500:690])), "as a canvas of six"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [10, 34, 64, 256])
@pytest.mark.usefixtures("version")
def test_a_row_of_what_lies_between_products_does_not_depend_on_the_others(size: int, dtype: torch.dtype) -> None:
    x, other = numbers(MANY, size, dtype=dtype), numbers(MANY, size, dtype=dtype, seed=1)
    weight = numbers(size, dtype=dtype, seed=2)
    same(lambda x: norm.rms_norm(x, weight, 1e-6), x)
    same(geglu.geglu, x, other)
    same(lambda x: attention.softmax(x[None, None].clone(), None)[0, 0], x)
    frequencies = torch.rand(size // 2, generator=torch.Generator().manual_seed(4))

    def turned(positions: Tensor, x: Tensor) -> Tensor:
        cos, sin = rope.rotary_tables(positions[None], frequencies, dtype)
        return rope.rotate(x.unflatten(-1, (1, size)).transpose(0, 1)[None], cos, sin)[0, 0]

    same(turned, torch.arange(MANY) * 37 % 1000, x)


def attend(query: Tensor, kv: tuple[Tensor, Tensor], parts: list[tuple[int, int]], window: int) -> Tensor:
    """Causal attention in parts, each of which sees the keys from its window's beginning to its own end."""
    spans = []
    for start, stop in parts:
        first = max(0, start - window)
        at, keys = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        mask = None if stop - start == 1 else (keys <= at) & (keys >= at - window)
        pieces = tuple(x[:, first:stop] for x in kv)
        spans.append(AttentionSpan(start=start, stop=stop, kv=(pieces,), mask=mask, first_key=first))
    return varlen_attention(query, spans)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [29, 1000])
@pytest.mark.usefixtures("version")
def test_a_query_does_not_depend_on_how_its_prompt_is_cut(window: int, dtype: torch.dtype) -> None:
    query = numbers(4, 200, 16, dtype=dtype)
    kv = (numbers(2, 200, 16, dtype=dtype, seed=1), numbers(2, 200, 16, dtype=dtype, seed=2))
    whole = attend(query, kv, [(0, 200)], window)
    for parts in ([(0, 1), (1, 3), (3, 77), (77, 200)], [(0, 64), (64, 128), (128, 199), (199, 200)]):
        assert torch.equal(attend(query, kv, parts, window), whole), parts
    assert torch.equal(attend(query, kv, [(i, i + 1) for i in range(200)], window), whole), "token by token"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("version")
def test_a_canvas_attends_alike_alone_and_among_others(dtype: torch.dtype) -> None:
    kv = (numbers(2, 160, 16, dtype=dtype, seed=1), numbers(2, 160, 16, dtype=dtype, seed=2))
    spans, start = [], 0
    for queries, keys in [(24, 40), (24, 40), (24, 44), (12, 160), (24, 12)]:
        pieces = tuple(x[:, :keys] for x in kv)
        spans.append(AttentionSpan(start=start, stop=start + queries, kv=(pieces,)))
        start += queries
    query = numbers(4, start, 16, dtype=dtype)
    whole = varlen_attention(query, spans)
    for span in spans:
        alone = AttentionSpan(start=0, stop=span.queries, kv=span.kv)
        got = varlen_attention(query[:, span.start : span.stop].clone(), [alone])
        assert torch.equal(got, whole[:, span.start : span.stop])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("signal", ["exact", "sparse", None])
@pytest.mark.parametrize("vocab", [50, native.TABLED + 3])
@pytest.mark.usefixtures("version")
def test_a_position_of_a_step_does_not_depend_on_the_others(
    vocab: int, signal: vocabulary.SignalKind, dtype: torch.dtype
) -> None:
    """Each at a temperature of its own, some so low that a table of weights would overflow."""
    weight = numbers(vocab, DEPTH, dtype=dtype, seed=1) * 0.3
    draw = torch.Generator().manual_seed(2)
    temperature = torch.linspace(0.2, 1.5, 10).repeat(MANY // 10)
    uniform = torch.rand(MANY, generator=draw, dtype=torch.float64)
    for field in [each.name for each in fields(vocabulary.SampleStats) if signal or each.name != "signal"]:

        def run(hidden: Tensor, temperature: Tensor, uniform: Tensor, field: str = field) -> Tensor:
            stats = vocabulary.sample_from_hidden(
                hidden,
                weight,
                cap=30.0,
                temperature=temperature,
                uniform=uniform,
                signal=signal,
                scale=weight.new_ones(()),
            )
            return getattr(stats, field)  # type: ignore[no-any-return]

        same(run, numbers(MANY, DEPTH, dtype=dtype), temperature, uniform)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.usefixtures("version")
def test_a_tokens_logprobs_do_not_depend_on_the_others(wide: bool, dtype: torch.dtype) -> None:
    """Nor on how many alternatives another request wants: tokens that tie come in the order of their ids."""
    weight = numbers(300, DEPTH, dtype=dtype, seed=1)[torch.arange(300) % 150]  # every product twice
    hidden, tokens = numbers(MANY, DEPTH, dtype=dtype), torch.arange(MANY)

    def run(hidden: Tensor, tokens: Tensor, top: int = 5) -> Tensor:
        got = vocabulary.score_targets(hidden, weight, cap=30.0, tokens=tokens, top=top, wide=wide).logprobs
        assert got is not None
        return torch.cat((got.target[:, None], got.greedy[:, None], got.top, got.top_ids.float()), dim=1)

    same(run, hidden, tokens)
    few, many = run(hidden, tokens, 3), run(hidden, tokens, 7)
    assert torch.equal(few[:, 2:5], many[:, 2:5]) and torch.equal(few[:, 5:8], many[:, 9:12])
