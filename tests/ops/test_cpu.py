"""Products, experts and attention in C++ against float64 and the plain versions, of any size, type and layout.

Limits follow from the arithmetic: a sum of n products in float32 is off by at most (n + 1) * 2^-24 of the sum
of the products' sizes, and the result is rounded once to its type, in bfloat16 by at most 2^-8 of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blockpress.ops import attention, experts
from blockpress.ops import linear as plain_products
from blockpress.ops.attention import AttentionSpan, Piece
from blockpress.ops.cpu import attention as in_cpp_attention
from blockpress.ops.cpu import bridge, products
from blockpress.ops.cpu import experts as in_cpp_experts
from blockpress.ops.packed import Codes, HalfFloats
from tests.conftest import num_examples
from tests.ops import layouts
from tests.ops.draws import numbers, threads

pytestmark = [
    pytest.mark.skipif(bridge.library() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("no_gradients"),
]
TYPES = [torch.float32, torch.bfloat16]
STORED = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
PAIRS = [(own, stored) for own in TYPES for stored in STORED]


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    return products.linear(x, bridge.matrix(weight), out=out)


def combine(share: Tensor, weight: Tensor) -> Tensor:
    return products.combine(share, bridge.matrix(weight))


def mix(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return in_cpp_experts.moe_forward(x, weights, chosen, in_cpp_experts.stacked(gate_up, down))


def check(got: Tensor, x: Tensor, columns: Tensor) -> None:
    """got is x @ columns within the rounding of float32 sums and of the result."""
    exact, sizes = x.double() @ columns.double(), x.double().abs() @ columns.double().abs()
    limit = (x.shape[-1] + 1) * 2**-24 * sizes
    if got.dtype == torch.bfloat16:
        limit = limit + 2**-8 * (exact.abs() + limit)
    assert got.dtype == x.dtype and got.shape == exact.shape
    off = (got.double() - exact).abs() - limit
    assert bool((off <= 1e-38).all()), f"{float(off.max()):.1e} over the limit"


# ---- products


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@settings(max_examples=num_examples(40))
@given(rows=st.integers(1, 30), depth=st.integers(1, 90), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_linear_equals_torch(
    own: torch.dtype, stored: torch.dtype, rows: int, depth: int, columns: int, seed: int
) -> None:
    x, weight = numbers(rows, depth, dtype=own, seed=seed), numbers(columns, depth, dtype=stored, seed=seed + 1)
    check(linear(x, weight), x, weight.T)


LARGE = {
    "several depths of a panel": (7, 801, 70),
    "odd pairs over several depths": (5, 785, 33),
    "more rows than a task": (301, 33, 65),
    "more rows than are packed at a time": (1165, 5, 17),
    "few rows, many columns": (3, 700, 129),
}


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@pytest.mark.parametrize("case", LARGE)
def test_linear_larger_than_a_block_equals_torch(case: str, own: torch.dtype, stored: torch.dtype) -> None:
    rows, depth, columns = LARGE[case]
    x, weight = numbers(rows, depth, dtype=own), numbers(columns, depth, dtype=stored, seed=1)
    check(linear(x, weight), x, weight.T)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 23])
@pytest.mark.parametrize(("own", "stored"), PAIRS)
def test_strided_operands_give_the_same(own: torch.dtype, stored: torch.dtype, rows: int) -> None:
    """Rows of x, of the weight and of the result some way apart; nothing is written between them."""
    x = numbers(rows, 53, dtype=own)[:, 3:40]
    weight = numbers(45, 41, dtype=stored, seed=1)[:, 1:38]
    whole = torch.full((rows, 60), 7.0, dtype=own)
    got = linear(x, weight, out=whole[:, 5:50])
    check(got, x, weight.T)
    assert got.data_ptr() == whole[:, 5:].data_ptr()
    assert bool((whole[:, :5] == 7).all()) and bool((whole[:, 50:] == 7).all())
    turned = numbers(37, rows, dtype=own).T
    check(linear(turned, weight), turned, weight.T)
    repeated = numbers(1, 37, dtype=own).expand(rows, 37)
    check(linear(repeated, weight), repeated, weight.T)
    batch = numbers(2, rows, 37, dtype=own)
    assert torch.equal(linear(batch, weight)[1], linear(batch.flatten(0, 1), weight)[rows:])


@pytest.mark.parametrize("own", TYPES)
def test_no_rows_give_no_rows(own: torch.dtype) -> None:
    """An expert's or a request's share of a batch may be empty."""
    assert linear(numbers(0, 9, dtype=own), numbers(80, 9)).shape == (0, 80)
    assert combine(numbers(0, 9, dtype=own), numbers(9, 80)).shape == (0, 80)
    assert plain_products.linear(numbers(2, 0, 9, dtype=own), numbers(80, 9, dtype=own)).shape == (2, 0, 80)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises((AssertionError, TypeError)):
        linear(numbers(2, 9), numbers(80, 10))
    with pytest.raises((AssertionError, TypeError)):
        combine(numbers(2, 9), numbers(80, 9))
    with pytest.raises((AssertionError, TypeError)):
        linear(numbers(2, 9), numbers(80, 9), out=numbers(2, 81)[:, :79])


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@settings(max_examples=num_examples(25))
@given(rows=st.integers(1, 30), vocab=st.integers(1, 90), hidden=st.integers(1, 100), seed=st.integers(0, 99))
def test_combine_equals_torch(
    own: torch.dtype, stored: torch.dtype, rows: int, vocab: int, hidden: int, seed: int
) -> None:
    share, weight = numbers(rows, vocab, dtype=own, seed=seed), numbers(vocab, hidden, dtype=stored, seed=seed + 1)
    check(combine(share, weight), share, weight)


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(2, 4500, 33), (301, 41, 64), (13, 2048, 300)])
def test_combine_larger_than_a_block_equals_torch(
    rows: int, vocab: int, hidden: int, own: torch.dtype, stored: torch.dtype
) -> None:
    share = numbers(rows, vocab + 3, dtype=own)[:, 1 : 1 + vocab]
    weight = numbers(vocab, hidden + 5, dtype=stored, seed=1)[:, 2 : 2 + hidden]
    check(combine(share, weight), share, weight)


def every(dtype: torch.dtype) -> Tensor:
    """All values of a type of 16 bits."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def same_values(got: Tensor, wanted: Tensor) -> None:
    """To the bit, but for the sign of 0, which a sum that begins at 0 does not keep, and for which NaN."""
    number = ~wanted.isnan()
    assert torch.equal(got.isnan(), ~number)
    assert torch.equal((got[number] + 0.0).view(torch.int32), (wanted[number] + 0.0).view(torch.int32))


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_every_half_float_is_widened_to_the_bit(stored: torch.dtype, rows: int) -> None:
    """As columns of one value (the scalar way), and as one line (a vector at a time, with a rest)."""
    values, one = every(stored), torch.ones(rows, 1)
    for got in (linear(one, values[:, None]), combine(one, values[None])):
        for row in got:
            same_values(row, values.float())
    for some in (values[None, :-5], values[None, 1:-1]):
        same_values(combine(one, some)[-1], some[0].float())


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("rows", [2, 16])
def test_every_half_float_along_the_depth(stored: torch.dtype, rows: int) -> None:
    """A line of 16 or more values is widened as a vector; an identity picks the values out one by one."""
    values = every(stored)
    lines = values[values.isfinite()].unflatten(0, (-1, 16))
    for first in range(0, 16, rows):
        got = linear(torch.eye(16)[first : first + rows], lines)
        wanted = lines.float().T[first : first + rows]
        same_values(got.contiguous(), wanted.contiguous())


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_every_code_is_widened_to_the_bit(name: str) -> None:
    """Each line by itself; every format's codes all occur, and its groups are of one lot of codes, more, and less."""
    weight = layouts.LAYOUTS[name]((24, 480), 3)
    for row, wanted in enumerate(weight.unpack(torch.float32)):
        for count in (1, 5):
            same_values(combine(torch.ones(count, 1), weight[row : row + 1])[-1], wanted)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_every_code_is_rounded_to_the_bit(name: str) -> None:
    """An identity picks the values out, whole lots of codes in each group, more, and less."""
    weight = layouts.LAYOUTS[name]((40, 480), 4)
    got = linear(torch.eye(480, dtype=torch.bfloat16), weight)
    same_values(got.float().T.contiguous(), weight.unpack(torch.bfloat16).float())


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("columns", [16, 80, 512])
def test_lines_that_share_a_global_scale_are_rounded_to_the_bit(columns: int, divides: bool) -> None:
    """All values of such a scale are kept from call to call: another scale, in a call or among lines, is not missed."""
    weight = layouts.nvfp4((40, columns), 5, divides)
    assert weight.global_scale is not None
    one, other = torch.full_like(weight.global_scale, 0.37), torch.full_like(weight.global_scale, 1.9)
    both = torch.where(torch.arange(40).reshape(one.shape) < 21, one, other)
    for outer in (one, other, one, both, weight.global_scale, None, other):
        changed = replace(weight, global_scale=outer)
        got = linear(torch.eye(columns, dtype=torch.bfloat16), changed)
        same_values(got.float().T.contiguous(), changed.unpack(torch.bfloat16).float())


def test_float8_that_is_no_number_stays_none() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    for scale in (torch.full((1, 1), 0.3), torch.full((1, 8), 0.3, dtype=torch.bfloat16)):
        weight = Codes(codes=codes, scale=scale, group=256 // scale.shape[1])
        same_values(combine(torch.ones(1, 1), weight)[0], weight.unpack(torch.float32)[0])
        assert int(combine(torch.ones(1, 1), weight).isnan().sum()) == 2


@pytest.mark.parametrize("rows", [1, 5])
def test_results_are_rounded_to_bfloat16_as_torch_rounds(rows: int) -> None:
    """Halfway cases to even, overflow to infinity, NaN to NaN: 1 times float32 values all over the range."""
    bits = torch.arange(-(1 << 31), 1 << 31, (1 << 17) - 1531, dtype=torch.int64)
    halves = (torch.arange(1 << 16, dtype=torch.int64) << 16) + 0x8000 - (1 << 31)
    values = torch.cat((bits, halves, halves - 1, halves + 1)).to(torch.int32).view(torch.float32)
    values = values[(values.abs() > 1.2e-38) | (values == 0) | values.isnan()]  # the processor takes those for 0
    got = linear(torch.ones(rows, 1, dtype=torch.bfloat16), values[:, None])
    for row in got:
        same_values(row.float(), values.bfloat16().float())


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@given(chosen=st.lists(st.integers(0, 39), min_size=5, max_size=30))
@settings(max_examples=20)
def test_a_row_does_not_depend_on_its_neighbours(own: torch.dtype, stored: torch.dtype, chosen: list[int]) -> None:
    x, weight, some = numbers(40, 403, dtype=own), numbers(70, 403, dtype=stored), torch.tensor(chosen)
    assert torch.equal(linear(x[some], weight), linear(x, weight)[some])
    share, weight = numbers(40, 203, dtype=own), numbers(203, 70, dtype=stored)
    assert torch.equal(combine(share[some], weight), combine(share, weight)[some])


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@pytest.mark.parametrize("rows", [1, 4, 5, 60])
def test_results_do_not_depend_on_threads(own: torch.dtype, stored: torch.dtype, rows: int) -> None:
    x, weight = numbers(rows, 303, dtype=own), numbers(333, 303, dtype=stored)
    alone, mean = linear(x, weight), combine(x, weight.T.contiguous())
    for count in (2, 3):
        with threads(count):
            assert torch.equal(linear(x, weight), alone)
            assert torch.equal(combine(x, weight.T.contiguous()), mean)


def test_supported_products_use_cpp() -> None:
    x, weight = numbers(6, 40), numbers(30, 40, dtype=torch.float16)
    assert torch.equal(plain_products.linear(x, HalfFloats(values=weight)), linear(x, weight))
    share = numbers(6, 30)
    assert torch.equal(plain_products.combine(share, HalfFloats(values=weight)), combine(share, weight))
    assert bridge.for_product(x.double(), weight) is None and bridge.for_product(x, numbers(4, 40).T) is None
    both = bridge.for_product(x.bfloat16(), weight.bfloat16())
    assert (both is None) == (not bridge.supports(x.bfloat16()))
    with torch.inference_mode(False), torch.enable_grad():
        assert bridge.for_product(numbers(6, 40), weight) is None, "gradients are torch's"


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("own", "stored"), PAIRS)
def test_old_buffer_contents_have_no_influence(own: torch.dtype, stored: torch.dtype, rows: int) -> None:
    """Memory is kept from call to call, with what stood in it: here nothing but NaN."""
    bad = linear(torch.full((30, 257), torch.nan, dtype=own), torch.full((200, 257), torch.nan, dtype=stored))
    assert bool(bad.isnan().all())
    for depth in (1, 2, 31, 33, 63):
        x, weight = numbers(rows, depth, dtype=own), numbers(37, depth, dtype=stored, seed=1)
        check(linear(x, weight), x, weight.T)
        check(combine(x, weight.T.contiguous()), x, weight.T)


# ---- experts

Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def routed(tokens: int, count: int, k: int, hidden: int, size: int, stored: torch.dtype, seed: int = 0) -> Routed:
    """The first experts are chosen far more often than the last, which nobody takes unless all are taken."""
    scores = numbers(tokens, count, seed=seed) - torch.arange(count) * 0.5
    weights, chosen = experts.route(scores, k, torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.5)
    gate_up = (numbers(count, 2 * size, hidden, seed=seed + 1) * hidden**-0.5).to(stored)
    down = (numbers(count, hidden, size, seed=seed + 2) * size**-0.5).to(stored)
    return numbers(tokens, hidden, seed=seed + 3), weights, chosen, gate_up, down


def mixture(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts.moe_loop` in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(chosen.shape[1])):
        expert = chosen[token, slot]
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        y = down[expert].double() @ (F.gelu(gate, approximate="tanh") * up)
        out[token] += weights[token, slot].double() * y
    return out


MIXTURES = {
    "one token": (1, 5, 2, 33, 17),
    "one choice": (9, 4, 1, 64, 32),
    "few tokens": (4, 6, 3, 31, 70),
    "more than few": (5, 6, 3, 31, 70),
    "all experts": (7, 3, 3, 40, 9),
    "many tokens of an expert": (250, 3, 2, 18, 66),
    "deep": (13, 4, 2, 401, 21),
    "deep down": (13, 4, 2, 21, 401),
}


@pytest.mark.parametrize(("own", "stored"), PAIRS)
@pytest.mark.parametrize("case", MIXTURES)
def test_experts_equal_the_reference(case: str, own: torch.dtype, stored: torch.dtype) -> None:
    """No further from float64 than the loop is over weights in the activations' type (in float32: hardly)."""
    x, weights, chosen, gate_up, down = routed(*MIXTURES[case], stored)
    given = x.to(own), weights, chosen, gate_up, down
    got, wanted = mix(*given), mixture(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge, "supports", lambda x: False)
        plain = experts.moe_loop(*given[:3], gate_up.to(own), down.to(own))
        if own == stored == torch.bfloat16:
            sorted_ = experts.ordered(*given)
            assert (got != sorted_).sum() <= 0.05 * got.numel() + 1, "rounded where torch rounds"
    assert got.dtype == own
    off, allowed = (got - wanted).norm(), (plain - wanted).norm()
    assert off <= (3.0 if own == torch.float32 else 1.05) * allowed + 1e-7 * wanted.norm()
    close = {"rtol": 1e-5, "atol": 2e-6} if own == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(got.double(), wanted, **close)
    if bridge.supports(given[0]):
        held = [HalfFloats(values=each) if each.dtype in HALVES else each for each in (gate_up, down)]
        assert torch.equal(experts.moe_forward(*given[:3], *held), got), "and it is the one that is taken"


def test_experts_without_tokens_are_skipped() -> None:
    given = routed(12, 6, 2, 32, 16, torch.float32)
    counts = torch.bincount(given[2].flatten(), minlength=6)
    assert counts.min() == 0 and counts.max() > 2 * counts.float().mean(), "the case is what it says"
    given[3][counts == 0], given[4][counts == 0] = torch.nan, torch.nan
    torch.testing.assert_close(mix(*given).double(), mixture(*given), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("own", TYPES)
def test_experts_take_an_empty_batch(own: torch.dtype) -> None:
    x, *others = routed(0, 4, 2, 32, 16, own)
    assert mix(x.to(own), *others).shape == (0, 32)


@pytest.mark.parametrize(("own", "stored"), PAIRS)
def test_experts_do_not_depend_on_neighbours_or_threads(own: torch.dtype, stored: torch.dtype) -> None:
    x, weights, chosen, gate_up, down = routed(290, 5, 2, 35, 33, stored)
    x = x.to(own)
    whole = mix(x, weights, chosen, gate_up, down)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(mix(x, weights, chosen, gate_up, down), whole)
    for some in (torch.tensor([7, 3, 250, 9, 11]), torch.arange(100, 231)):
        assert torch.equal(mix(x[some], weights[some], chosen[some], gate_up, down), whole[some])


# ---- attention


def piece(kv: int, keys: int, dim: int, dtype: torch.dtype, seed: int, turned: bool = False) -> Piece:
    """Keys and values as a part of pages; `turned` ones are not dense along their features."""
    both = numbers(2, kv, keys + 7, dim, dtype=dtype, seed=seed)[:, :, 3 : 3 + keys]
    if turned:
        both = both.transpose(2, 3).contiguous().transpose(2, 3)
    return both[0], both[1]


# queries, keys of the pieces, rows of the mask (0: none), heads, key heads, dim
LOOKS = {
    "one query": (1, [70], 0, 4, 2, 16),
    "one query, one key": (1, [1], 0, 1, 1, 3),
    "pieces": (9, [40, 3, 17], 0, 4, 4, 20),
    "a row of mask for all": (9, [40, 20], 1, 4, 2, 16),
    "a row of mask each": (30, [40, 20], 30, 6, 1, 24),
    "empty pieces": (7, [0, 33, 0, 18, 0], 7, 4, 2, 16),
    "long keys": (5, [1500, 37], 5, 4, 1, 40),
    "large heads": (14, [50], 0, 2, 1, 300),
    "many queries": (300, [20, 300], 300, 3, 3, 8),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", LOOKS)
def test_attention_equals_the_reference(case: str, dtype: torch.dtype, turned: bool) -> None:
    queries, pieces, masked, heads, kv, dim = LOOKS[case]
    keys = sum(pieces)
    mask = numbers(masked, keys, seed=5) > 0 if masked else None
    seen = tuple(piece(kv, count, dim, dtype, place, turned) for place, count in enumerate(pieces))
    before = AttentionSpan(start=0, stop=2, kv=(piece(kv, 4, dim, dtype, 9),))
    query = numbers(heads, 2 + queries, dim, dtype=dtype, seed=7) * 2 * dim**-0.5
    if turned:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    span = AttentionSpan(start=2, stop=2 + queries, kv=seen, mask=mask)
    spans = [span, before] if turned else [before, span]
    got = in_cpp_attention.attend(query, spans)[:, 2:]
    key, value = (torch.cat(part, dim=1)[None] for part in zip(*seen, strict=True))
    visible = None if mask is None else mask.expand(queries, -1)[None]
    wanted = attention.plain(query[None, :, 2:].double(), key.double(), value.double(), visible)[0]
    plain = attention.plain(query[None, :, 2:], key, value, visible)[0]
    off, allowed = (got - wanted).norm(), (plain - wanted).norm()
    assert got.dtype == dtype
    assert off <= (3.0 if dtype == torch.float32 else 1.1) * allowed + 1e-7 * wanted.norm()
    for count in (2, 3):
        with threads(count):
            assert torch.equal(in_cpp_attention.attend(query, spans)[:, 2:], got)


def test_a_query_without_keys_gives_zeros() -> None:
    span = AttentionSpan(start=0, stop=5, kv=(piece(2, 0, 16, torch.float32, 0),))
    in_cpp_attention.attend(
        numbers(4, 5, 16), [AttentionSpan(start=0, stop=5, kv=(piece(2, 9, 16, torch.float32, 0),))]
    )
    assert not in_cpp_attention.attend(numbers(4, 5, 16), [span]).any(), "not what was there before"


@pytest.mark.parametrize("dtype", TYPES)
def test_attention_keeps_nan_in_its_query(dtype: torch.dtype) -> None:
    query = numbers(4, 9, 16, dtype=dtype)
    query[1, 4] = torch.nan
    got = in_cpp_attention.attend(query, [AttentionSpan(start=0, stop=9, kv=(piece(2, 40, 16, dtype, 0),))])
    bad = torch.zeros(4, 9, dtype=torch.bool)
    bad[1, 4] = True
    assert torch.equal(got.isnan().all(-1), bad) and torch.equal(got.isnan().any(-1), bad)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_keep_nan_in_its_row_and_column(rows: int, dtype: torch.dtype) -> None:
    x, weight = numbers(rows, 30, dtype=dtype), numbers(40, 30, dtype=dtype)
    x[0, 7], weight[21, 3] = torch.nan, torch.inf
    got, wanted = linear(x, weight), x.double() @ weight.double().T
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
