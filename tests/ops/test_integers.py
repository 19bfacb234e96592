"""Products of integers: C++ gives the truth's bits, sums are those of int32, and the error is what the arithmetic says.

With s and t the scales of a row of x and of the weight, q and c the codes: a product of n terms is off by at most
s t (sum |q| + sum |c| + n / 2) / 2. In float32 come the codes' own rounding (a step of 2^-22 more for each of x's and the
weight's codes: x * (127 / largest) is rounded three times) and the three roundings of the result.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import experts, integers, linear
from blockpress.ops.blocks import LAYOUTS, Blocks
from blockpress.ops.cpu import bridge, products
from blockpress.ops.cpu import experts as in_cpp_experts
from blockpress.ops.integers import IntegerWeight, matmul, quantize_rows, quantized
from blockpress.ops.packed import Codes
from tests.conftest import num_examples
from tests.ops import layouts
from tests.ops.draws import numbers, threads

pytestmark = pytest.mark.usefixtures("no_gradients")
needs_cpp = pytest.mark.skipif(bridge.library() is None, reason="no C++ compiler")


def codes(*shape: int, seed: int = 0) -> IntegerWeight:
    """Every code from -128 to 127, so that two neighbours may be as large as they get."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randint(-128, 128, shape, dtype=torch.int8, generator=draw)
    return IntegerWeight(codes=made, scale=torch.rand(shape[:-1], generator=draw) + 0.5)


def in_cpp(x: Tensor, weight: IntegerWeight, out: Tensor | None = None) -> Tensor:
    readable = bridge.matrix(weight)
    assert readable is not None and readable.kind == bridge.INT8_ROWS
    return products.linear(x, readable, out=out)


# ---- the same bits


@needs_cpp
@settings(max_examples=num_examples(60))
@given(rows=st.integers(1, 30), depth=st.integers(1, 150), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_int8_linear_follows_the_definition(rows: int, depth: int, columns: int, seed: int) -> None:
    x, weight = numbers(rows, depth, seed=seed), codes(columns, depth, seed=seed)
    got = in_cpp(x, weight)
    assert torch.equal(got, matmul(x, weight)) and torch.equal(got, linear.linear(x, weight))


LARGE = {
    "several depths of a panel": (7, 1601, 70),
    "more rows than a task": (251, 33, 65),
    "a last task of one row": (289, 40, 40),
    "more rows than are packed at a time": (973, 5, 17),
    "few rows, many columns": (3, 700, 129),
    "few rows, whole vectors": (4, 512, 64),
}


@needs_cpp
@pytest.mark.parametrize("case", LARGE)
def test_int8_linear_larger_than_a_block_follows_the_definition(case: str) -> None:
    rows, depth, columns = LARGE[case]
    x, weight = numbers(rows, depth), codes(columns, depth)
    assert torch.equal(in_cpp(x, weight), matmul(x, weight))


@needs_cpp
@pytest.mark.parametrize("rows", [1, 3, 5, 23])
def test_sums_equal_numpy_int32(rows: int) -> None:
    """Scales of 1, so that the result is the sum; below 2^24, where float32 holds every integer."""
    draw = np.random.default_rng(rows)
    x = draw.integers(-127, 128, (rows, 900)).astype(np.int32)
    x[:, 0] = 127  # what is coded with a scale of 1
    weight = draw.integers(-128, 128, (50, 900)).astype(np.int32)
    held = IntegerWeight(codes=torch.from_numpy(weight.astype(np.int8)), scale=torch.ones(50))
    wanted = x @ weight.T
    assert wanted.dtype == np.int32 and np.abs(wanted).max() < 1 << 24
    assert np.array_equal(in_cpp(torch.from_numpy(x).float(), held).numpy(), wanted)


@needs_cpp
@pytest.mark.parametrize("rows", [1, 4, 5, 13])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_codes_do_not_saturate(rows: int, signs: tuple[int, int]) -> None:
    """Pairs of such products do not fit 16 bits; as many as there may be fill 32."""
    own, other = signs
    largest = 127 if other > 0 else -128
    for depth in (2, 700, integers.MOST_COLUMNS):
        x = torch.full((rows, depth), 3.0 * own)
        weight = IntegerWeight(codes=torch.full((33, depth), largest, dtype=torch.int8), scale=torch.ones(33))
        got = in_cpp(x, weight)
        assert torch.equal(got, matmul(x, weight))
        wanted = torch.tensor(own * 127 * largest * depth).float() * (torch.tensor(3.0) / 127)
        assert bool((got == wanted).all())


@needs_cpp
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 23])
def test_strided_operands_give_the_same(rows: int) -> None:
    """Rows of x and of the result some way apart; nothing is written between them."""
    x, weight = numbers(rows, 53)[:, 3:40], codes(45, 37)
    whole = torch.full((rows, 60), 7.0)
    assert torch.equal(in_cpp(x, weight, out=whole[:, 5:50]), matmul(x, weight))
    assert bool((whole[:, :5] == 7).all()) and bool((whole[:, 50:] == 7).all())
    batch = numbers(2, rows, 37)
    assert torch.equal(in_cpp(batch, weight), matmul(batch, weight))
    assert in_cpp(numbers(0, 37), weight).shape == (0, 45)


@needs_cpp
def test_bfloat16_is_rounded_once() -> None:
    x, weight = numbers(9, 70).bfloat16(), codes(40, 70)
    assert torch.equal(in_cpp(x, weight), matmul(x.float(), weight).bfloat16())


@needs_cpp
@given(chosen=st.lists(st.integers(0, 39), min_size=1, max_size=30))
@settings(max_examples=20)
def test_results_do_not_depend_on_neighbours_or_threads(chosen: list[int]) -> None:
    """Not even where there are few: sums are exact."""
    x, weight, some = numbers(40, 403), codes(170, 403), torch.tensor(chosen)
    whole = in_cpp(x, weight)
    assert torch.equal(in_cpp(x[some], weight), whole[some])
    with threads(2):
        assert torch.equal(in_cpp(x, weight), whole)
        assert torch.equal(in_cpp(x[some], weight), whole[some])


@pytest.mark.parametrize("op", [matmul, pytest.param(in_cpp, marks=needs_cpp)])
@pytest.mark.parametrize("rows", [4, 9])
def test_rows_that_cannot_be_rounded_give_zero_or_nan(op: object, rows: int) -> None:
    """Zeros and what is nearly 0 give 0, what is not finite gives NaN, and no row shows in another."""
    x, weight = numbers(rows, 50), codes(20, 50)
    x[0], x[1] = 0, 1e-31 * x[1]
    x[2, 7], x[3, 49] = torch.inf, torch.nan
    got = op(x, weight)  # type: ignore[operator]
    assert bool((got[:2] == 0).all()) and bool(got[2:4].isnan().all())
    assert torch.equal(got[4:], matmul(x[4:], weight))


# ---- how far off


def limit(x: Tensor, weight: IntegerWeight, own_codes: bool) -> Tensor:
    """The largest error: of the module's docstring. own_codes: the weight was stored as these codes."""
    q, s = quantize_rows(x)
    step = 0.5 + 2.0**-15  # 127 * 2^-22: where float32 rounds a code to the other side
    e, f = step, 0.0 if own_codes else step
    sums = f * q.double().abs().sum(-1)[:, None] + e * weight.codes.double().abs().sum(-1) + x.shape[-1] * e * f
    exact = (q.double() @ weight.codes.double().T).abs()
    return s.double()[:, None] * weight.scale.double() * (sums + 2.0**-21 * exact)


@settings(max_examples=num_examples(60))
@given(
    rows=st.integers(1, 9), depth=st.integers(1, 300), spread=st.sampled_from([0.0, 1.0, 3.0]), seed=st.integers(0, 99)
)
def test_the_error_of_a_product_is_bounded(rows: int, depth: int, spread: float, seed: int) -> None:
    """Of values of very different sizes, too."""
    x = numbers(rows, depth, seed=seed) * torch.exp(spread * numbers(rows, depth, seed=seed + 1))
    floats = numbers(40, depth, seed=seed + 2) * torch.exp(spread * numbers(40, depth, seed=seed + 3))
    for weight, values in ((quantized(floats), floats.double()), (codes(40, depth), None)):
        exact = weight.codes.double() * weight.scale.double()[:, None] if values is None else values
        off = (linear.linear(x, weight).double() - x.double() @ exact.T).abs()
        assert bool((off <= limit(x, weight, values is None)).all())


def test_the_usual_error_is_small() -> None:
    """Of normal values: each rounding has a variance of a twelfth of its step's square."""
    x, floats = numbers(64, 512), numbers(256, 512, seed=1)
    weight, exact = quantized(floats), x.double() @ floats.double().T
    off = float((linear.linear(x, weight).double() - exact).norm() / exact.norm())
    predicted = float(((quantize_rows(x)[1] ** 2).mean() / 12 + (weight.scale**2).mean() / 12) ** 0.5)
    assert off == pytest.approx(predicted, rel=0.05) and 0.008 < off < 0.011


# ---- weights


def test_int8_codes_with_row_scales_are_used_unchanged() -> None:
    stored = layouts.int8((3, 40, 24), 0)
    made = quantized(stored)
    assert made.codes.data_ptr() == stored.codes.data_ptr() and torch.equal(made.scale, stored.scale[..., 0])
    assert torch.equal(made.unpack(torch.float32), stored.unpack(torch.float32))


STORED = {
    "float32": lambda: numbers(3, 40, 32),
    "bfloat16": lambda: numbers(3, 40, 32).bfloat16(),
    "float16": lambda: numbers(40, 32).half(),
    "fp8": lambda: layouts.fp8((3, 40, 32), 0),
    "int8 in groups": lambda: layouts.int8((3, 40, 32), 0, group=16),
    "int8 with zero points": lambda: layouts.int8((40, 32), 0, asymmetric=True),
    "int4": lambda: layouts.int4((3, 40, 32), 0, group=16),
    "nvfp4": lambda: layouts.nvfp4((3, 40, 32), 0),
    "GGUF's Q8_0": lambda: Blocks(layouts.byte(layouts.generator(0), 40, 34, high=60), LAYOUTS["Q8_0"]),
}


@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
@pytest.mark.parametrize("kind", STORED)
def test_a_weight_in_any_layout_is_rounded_to_int8(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a step at most, a tile at a time or all at once."""
    monkeypatch.setattr(integers, "TILE", tile)
    stored = STORED[kind]()
    values = stored.float() if isinstance(stored, Tensor) else stored.unpack(torch.float32)
    made = quantized(stored)
    assert made.shape == tuple(values.shape) and made.nbytes == values.numel() + 4 * values[..., 0].numel()
    off = (made.unpack(torch.float32) - values).abs()
    assert bool((off <= made.scale[..., None] * 0.50002).all())
    assert bool((made.codes.int().abs().amax(-1) == 127).all())
    alone = [quantized(part) for part in stored] if isinstance(stored, Tensor) and stored.ndim == 3 else []
    assert all(torch.equal(one.codes, made[i].codes) for i, one in enumerate(alone))


def test_a_row_of_zeros_has_codes_of_zero() -> None:
    made = quantized(torch.zeros(2, 5))
    assert not made.codes.any() and not linear.linear(numbers(3, 5), made).any()


def test_unpack_and_factors_give_the_values() -> None:
    weight = codes(9, 20)
    exact = weight.codes.float() * weight.scale[:, None]
    assert torch.equal(weight.unpack(torch.float32), exact) and torch.equal(
        weight[2:5].unpack(torch.float32), exact[2:5]
    )
    assert torch.equal(weight.unpack(torch.bfloat16), exact.bfloat16())
    matrix, scale = weight.factors(torch.float32)
    assert scale is not None and torch.equal(matrix * scale[:, None], exact)
    assert weight.factors(torch.float16)[1] is None


def test_other_eight_bit_codes_are_not_used_as_int8() -> None:
    """A scale a row is not enough: fp8 has it, too."""
    stored = layouts.fp8((40, 32), 0)
    assert isinstance(stored, Codes) and stored.codes.dtype != torch.int8
    assert quantized(stored).codes.data_ptr() != stored.codes.data_ptr()


# ---- experts


@needs_cpp
@pytest.mark.parametrize("tokens", [1, 4, 5, 70, 300])
def test_int8_experts_follow_the_definition(tokens: int) -> None:
    count, k, hidden, size = 6, 2, 50, 37
    gate_up, down = codes(count, 2 * size, hidden), codes(count, hidden, size, seed=1)
    gate_up = IntegerWeight(codes=gate_up.codes, scale=gate_up.scale / 600)
    down = IntegerWeight(codes=down.codes, scale=down.scale / 600)
    x, scores = numbers(tokens, hidden), numbers(tokens, count) - torch.arange(count) * 0.5
    weights, chosen = experts.route(scores, k, torch.ones(count))
    stacks = in_cpp_experts.stacked(gate_up, down)
    assert stacks is not None
    got = in_cpp_experts.moe_forward(x, weights, chosen, stacks)
    for plain in (experts.moe_loop, experts.ordered):
        wanted = plain(x, weights, chosen, gate_up, down)
        # GeGLU differs in the last bits, which now and then makes another code of what lies between the products.
        assert float((got - wanted).norm() / wanted.norm()) < 2e-3
        assert float((got - wanted).abs().median()) < 1e-6 * float(wanted.abs().max())
