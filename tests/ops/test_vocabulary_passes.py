"""The pass over a block in C++, computed and through tables, against float64: a row of every kind, at every size.

The limits: a logit is wrong by half an ulp for each of at most eight roundings, 2^-21 of it; a weight by the logit's
error and the maximum's, and a sum of 256 values in lanes of at least four by 2^-18.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blockpress.ops import compiled
from blockpress.ops.vocabulary import native, passes
from blockpress.ops.vocabulary.passes import Probabilities
from blockpress.ops.vocabulary.plain import TILE

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 256, 257, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]
TEMPERATURE = 0.8
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]

pytestmark = pytest.mark.skipif(compiled.library("vocabulary") is None, reason="no C++ compiler")


def block(vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of products: of any size; tokens banned; what tanh and exp part by; equal ones; and three broken ones."""
    draw = torch.Generator().manual_seed(seed + vocab)
    some = torch.randn(4, vocab, generator=draw) * torch.tensor([[1.0], [6.0], [20.0], [60.0]])
    banned = some[1:3].masked_fill(torch.rand(2, vocab, generator=draw) < 0.4, -math.inf)
    banned[:, int(torch.randint(vocab, (1,), generator=draw))] = 3.0
    edges = torch.tensor([18.7499, 18.75, -18.75, 276.0, -276.0, 1e-40, -0.0, 1e30, -1e30, 3e38, -3e38, -70.0, 4.0])
    edge = edges[torch.randint(len(edges), (1, vocab), generator=draw)]
    last = some[1:2].sort().values
    equal = torch.full((1, vocab), 0.3)
    broken = some[:3].clone()
    broken[0, vocab // 2] = math.nan
    broken[1, -1] = math.inf
    broken[2] = -math.inf
    return torch.cat((some, banned, edge, last, equal, broken)).to(dtype)


def logits(product: Tensor, cap: float | None) -> Tensor:
    wide = product.double()
    scaled = (wide if cap is None else torch.tanh(wide / cap) * cap) / float(torch.tensor(TEMPERATURE))
    return scaled.masked_fill(product.isneginf(), -math.inf)


def read(
    product: Tensor, cap: float | None, belief: Probabilities, tables: bool, uniform: Tensor | None = None
) -> passes.BlockStats:
    temperature = torch.full((len(product),), TEMPERATURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "TABLED", 0 if tables else 1 << 60)
        return native.block_stats(product, cap, temperature, uniform, belief)


def limits(scaled: Tensor) -> Tensor:
    """How far the logarithm of a probability of each row may be from the truth's."""
    return 2.0**-18 + 2.0**-20 * scaled.masked_fill(scaled.isinf(), 0).abs().amax(-1)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("cap", [30.0, None])
@pytest.mark.parametrize("belief", [None, "whole", "sparse"])
@pytest.mark.parametrize(("dtype", "tables"), KINDS)
def test_one_pass_equals_float64(
    vocab: int, cap: float | None, belief: Probabilities, dtype: torch.dtype, tables: bool
) -> None:
    product = block(vocab, dtype)
    if cap is None:
        product = product.clamp(max=1e30)  # by the temperature: still a float
    good = product.isnan().any(-1).logical_or(product.amax(-1).isinf()).logical_not()
    uniform = torch.rand(len(product), dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    before, scaled = product.clone(), logits(product, cap)
    got = read(product, cap, belief, tables, uniform)

    assert got.entropy.isnan().tolist() == got.total.isnan().tolist() == (~good).tolist()
    assert got.sample is not None and bool(((got.sample >= 0) & (got.sample < vocab)).all())
    if belief is None:
        assert torch.equal(product.view(torch.uint8), before.view(torch.uint8))
    else:
        assert got.probabilities is not None and got.probabilities[~good].isnan().all()
    for row in good.nonzero()[:, 0].tolist():
        one, limit = scaled[row], float(limits(scaled)[row])
        log_p = one.log_softmax(-1)
        p = log_p.exp()
        assert one[got.argmax[row]] >= one.max() - limit
        assert float(got.total[row]) == pytest.approx(float(one.logsumexp(-1)), rel=limit, abs=limit)
        want = -(p * log_p.clamp(min=-1e30)).sum()
        # Of a sum of p log p: each log p by the limit, and each p by its share.
        spare = limit * float((p * (1 + log_p.clamp(min=-1e30).abs())).sum()) + 2.0**-23 * float(want)
        assert float(got.entropy[row]) == pytest.approx(float(want), abs=spare)
        through = p.cumsum(-1)
        token = int(got.sample[row])
        assert float(through[token]) >= float(uniform[row]) - 2 * limit
        assert float(through[token] - p[token]) <= float(uniform[row]) + 2 * limit
        assert p[token] > 0
        if dtype == torch.float32 and belief is not None:
            check(got, row, p, limit)


def check(got: passes.BlockStats, row: int, p: Tensor, limit: float) -> None:
    """A belief in float32; what is far below the smallest float may be 0."""
    assert got.probabilities is not None
    if got.sparse is None or got.sparse.counts[row] < 0:
        torch.testing.assert_close(got.probabilities[row].double(), p, rtol=limit * 1.01, atol=1e-36)
        assert bool((got.probabilities[row][p == 0] == 0).all())
        return
    count = int(got.sparse.counts[row])
    ids, shares = got.sparse.ids[row, :count], got.sparse.shares[row, :count]
    assert bool((ids[1:] > ids[:-1]).all()) and float(p[ids].sum()) >= 1 - passes.DROPPED
    torch.testing.assert_close(shares.double(), p[ids], rtol=limit * 1.01, atol=0)


@pytest.mark.parametrize("belief", [None, "whole", "sparse"])
@pytest.mark.parametrize(("dtype", "tables"), KINDS)
def test_equal_logits_are_counted_and_drawn_exactly(belief: Probabilities, dtype: torch.dtype, tables: bool) -> None:
    for vocab in (1, 9, 300, TILE, 3 * TILE + 11):
        for cap in (30.0, None):
            for step in (1, 2):  # 2: every second token is banned, and never drawn
                product = torch.full((64, vocab), -math.inf, dtype=dtype)
                product[:, step // 2 :: step] = 0.7
                open_ = int((product[0] > 0).sum())
                if not open_:
                    continue
                place = torch.randint(open_, (64,), generator=torch.Generator().manual_seed(vocab))
                place[:2] = torch.tensor([0, open_ - 1])
                got = read(product, cap, belief, tables, (place.double() + 0.5) / open_)
                assert got.sample is not None
                assert got.sample.tolist() == (place * step + step // 2).tolist()
                assert got.argmax.tolist() == [step // 2] * 64
                torch.testing.assert_close(got.entropy, torch.full((64,), math.log(open_)), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("belief", [None, "whole", "sparse"])
@pytest.mark.parametrize(("dtype", "tables"), KINDS)
def test_argmax_is_the_first_of_equals(belief: Probabilities, dtype: torch.dtype, tables: bool) -> None:
    for vocab, places in ((5, [4]), (300, [255, 256]), (300, [270, 299]), (2 * TILE + 5, [TILE, 2 * TILE + 4])):
        product = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
        product[0, places] = 9.0
        for cap in (30.0, None):
            got = read(product.clone(), cap, belief, tables)
            assert got.argmax.tolist() == places[:1] and got.sample is None


@pytest.mark.parametrize("belief", [None, "whole", "sparse"])
def test_argmax_compares_logits_not_rounded_weights(belief: Probabilities) -> None:
    most = torch.tensor(0.01)
    product = torch.full((1, 600), -50.0)
    product[0, 300], product[0, 500] = torch.nextafter(most, -most), most  # exp(-1e-9) is 1 in float32
    assert read(product, None, belief, tables=False).argmax.tolist() == [500]


@pytest.mark.parametrize("cap", [30.0, None])
@pytest.mark.parametrize("gap", [3.0, 9.0, 15.0, 20.0, 60.0])
def test_small_entropies_keep_their_digits(cap: float | None, gap: float) -> None:
    product = torch.full((1, TILE + 3), 10.0 - gap)
    product[0, 2000] = 10.0
    one = logits(product, cap)[0]
    d = one - one.max()
    rest = d[0].exp() * (TILE + 2)
    want = torch.log1p(rest) - rest * d[0] / (1 + rest)
    for belief in (None, "whole", "sparse"):
        got = read(product.clone(), cap, belief, tables=False)
        assert float(got.entropy) == pytest.approx(float(want), rel=2 * float(limits(one[None])))
