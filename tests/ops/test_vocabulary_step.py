"""`see` against full logits: the version in torch, the one in C++ and its tables, in every dtype, around every edge."""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import compiled, vocabulary
from blockpress.ops.linear import combine, linear
from blockpress.ops.packed import Codes
from blockpress.ops.vocabulary import blocks, fused, native, passes, plain
from tests.conftest import num_examples
from tests.forks import python

TILE = vocabulary.TILE
SIZES = [1, 2, 15, 16, 17, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]
HIDDEN = 24
VERSIONS = ["torch", "native", "tables", "fused"]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which version `see(native=version != "torch")` runs; the versions for large vocabularies have none too small."""
    if request.param != "torch" and compiled.library("vocabulary") is None:
        pytest.skip("no C++ compiler")
    if request.param == "tables":
        monkeypatch.setattr(native, "TABLED", 0)
    if request.param == "fused":
        monkeypatch.setattr(fused, "FUSED", 0)
    return request.param


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    cap: float | None
    temperature: Tensor
    uniform: Tensor
    scale: Tensor
    banned: tuple[Tensor, Tensor] | None = None

    def see(
        self, version: str = "torch", signal: vocabulary.SignalKind = "exact", **other: object
    ) -> vocabulary.SampleStats:
        arguments = {**vars(self), **other}
        return vocabulary.sample_from_hidden(
            arguments.pop("hidden"), arguments.pop("weight"), signal=signal, native=version != "torch", **arguments
        )


def case(
    vocab: int,
    rows: int = 5,
    dtype: torch.dtype = torch.float32,
    cap: float | None = 30.0,
    spread: float = 3.0,
    seed: int = 0,
) -> Case:
    draw = torch.Generator().manual_seed(seed + 1000 * vocab)
    weight = torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5
    return Case(
        hidden=(torch.randn(rows, HIDDEN, generator=draw) * spread).to(dtype),
        weight=weight.to(dtype),
        cap=cap,
        temperature=torch.rand(rows, generator=draw) * 0.6 + 0.4,
        uniform=torch.rand(rows, generator=draw, dtype=torch.float64),
        scale=torch.tensor(HIDDEN**0.5, dtype=dtype),
    )


def full(c: Case) -> Tensor:
    """The scaled logits as `Network.logits`, the temperature and `TokenMask` make them."""
    product = linear(c.hidden, c.weight).float()
    scaled = (product if c.cap is None else torch.tanh(product / c.cap) * c.cap) / c.temperature[:, None]
    if c.banned is not None:
        scaled[:, c.banned[0]] = scaled[:, c.banned[0]].masked_fill(c.banned[1], -math.inf)
    return scaled


def truth(c: Case) -> vocabulary.SampleStats:
    scaled, dtype = full(c), c.hidden.dtype
    belief = torch.softmax(scaled.to(dtype), dim=-1, dtype=torch.float32).to(dtype)
    return vocabulary.SampleStats(
        argmax=scaled.argmax(-1),
        sample=plain.sample(scaled[None], c.uniform[None])[0],
        entropy=plain.entropy(scaled[None])[0],
        signal=combine(belief, c.weight) * c.scale,
    )


def margin(scaled: Tensor, u: float) -> float:
    """How far u is from the nearest end of a token's stretch."""
    sums = torch.softmax(scaled.double(), -1).cumsum(-1)
    return float((sums - u).abs().min())


def same(c: Case, got: vocabulary.SampleStats, want: vocabulary.SampleStats, near: float = 1e-6) -> None:
    scaled = full(c)
    for row, logits in enumerate(scaled):
        assert logits[got.argmax[row]] >= logits.max() - 1e-6 * (1 + abs(logits.max()))
        assert got.sample[row] == want.sample[row] or margin(logits, float(c.uniform[row])) < near
    if c.hidden.dtype != torch.float32:
        assert torch.equal(got.argmax, want.argmax)
    log_p = torch.log_softmax(scaled.double(), -1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-5, atol=near)
    assert got.signal is not None and want.signal is not None
    assert got.signal.dtype == c.hidden.dtype
    tolerance = {torch.float32: max(1e-5, near), torch.bfloat16: 1e-2, torch.float16: 2e-3}[c.hidden.dtype]
    torch.testing.assert_close(got.signal, want.signal, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [30.0, None])
def test_statistics_equal_those_of_full_logits(version: str, vocab: int, dtype: torch.dtype, cap: float | None) -> None:
    for spread in (0.0, 0.5, 3.0, 60.0):
        c = case(vocab, dtype=dtype, cap=cap, spread=spread)
        same(c, c.see(version), truth(c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_rounded_as_the_reference_rounds_them(version: str, dtype: torch.dtype) -> None:
    c = case(3 * TILE + 7, rows=8, dtype=dtype, spread=4.0)
    product = linear(c.hidden, c.weight)
    want = torch.softmax(full(c).to(dtype), dim=-1, dtype=torch.float32).to(dtype)
    got = blocks.block_stats(product, c.cap, c.temperature, c.uniform, "whole", native=version != "torch").probabilities
    assert got is not None
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    apart = (got.view(bits).long() - want.view(bits).long()).abs()[want > 1e-30]
    if dtype == torch.bfloat16:
        assert apart.max() <= 1 and (apart > 0).double().mean() < 1e-4
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_lowest_of_equal_tokens_is_the_argmax(version: str) -> None:
    for vocab, first in ((7, 2), (TILE + 40, 33), (2 * TILE, TILE + 5)):
        c = case(vocab, rows=2, dtype=torch.bfloat16, spread=0.01)
        rows = torch.tensor([first, vocab - 1])
        c.weight[rows] = c.hidden[0] * 100
        assert c.see(version).argmax[0] == first


def test_banned_tokens_have_no_probability(version: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for cap in (30.0, None):
            c = case(TILE + 50, rows=4, dtype=dtype, cap=cap)
            ids = torch.cat((full(c).argmax(-1).unique(), torch.tensor([TILE + 49])))
            where = torch.tensor([[True], [True], [False], [True]]).expand(4, len(ids))
            c = Case(**{**vars(c), "banned": (ids, where)})
            got = c.see(version)
            same(c, got, truth(c))
            banned = got.argmax[:, None] == ids
            assert not (banned & where).any() and banned[2].any()


def test_nan_stays_in_its_row(version: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        c = case(500, rows=4, dtype=dtype)
        c.hidden[1] = math.nan
        everything = torch.arange(500)
        where = torch.zeros(4, 500, dtype=torch.bool)
        where[2] = True
        for signal in ("exact", "sparse"):
            got = c.see(version, signal, banned=(everything, where))
            assert got.signal is not None
            assert got.entropy.isnan().tolist() == [False, True, True, False]
            assert got.signal.isnan().all(-1).tolist() == [False, True, True, False]
            assert got.signal.isnan().any(-1).tolist() == [False, True, True, False]
            assert got.argmax.tolist()[1:3] == [0, 0] and int(got.sample.min()) >= 0 and int(got.sample.max()) < 500


def test_a_small_entropy_is_exact(version: str) -> None:
    for gap in (6.0, 9.0, 12.0, 15.0, 20.0):
        c = case(300, rows=1)
        c.hidden.zero_()
        c.hidden[0, 0] = 1.0
        c.weight.zero_()
        c.weight[7, 0] = gap
        got = c.see(version, cap=None, temperature=torch.ones(1)).entropy.double()
        log_p = torch.log_softmax((c.hidden @ c.weight.T).double(), -1)
        want = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-12)


def test_low_temperatures_do_not_overflow(version: str) -> None:
    c = case(TILE + 3, rows=6, dtype=torch.bfloat16, spread=40.0)
    c = Case(**{**vars(c), "temperature": torch.tensor([0.05, 0.1, 0.1, 0.2, 1.0, 5.0])})
    same(c, c.see(version), truth(c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_uniform_number_draws_a_possible_token(version: str, dtype: torch.dtype) -> None:
    for vocab, seed in ((40, 1), (40, 2), (TILE + 60, 3), (2 * TILE, 4), (2 * TILE + 1, 5)):
        c = case(vocab, rows=8, dtype=dtype, seed=seed)
        impossible = torch.arange(vocab // 2, vocab)
        where = torch.ones(8, len(impossible), dtype=torch.bool)
        uniform = torch.full((8,), 1 - 2.0**-53, dtype=torch.float64)
        drawn = c.see(version, uniform=uniform, banned=(impossible, where)).sample
        assert bool((drawn < vocab // 2).all()) and bool((drawn > vocab // 4).all())


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows_works(version: str, rows: int) -> None:
    for vocab in (16, TILE + 3):
        c = case(vocab, rows=max(rows, 1))
        c = Case(**{**vars(c), **{name: getattr(c, name)[:rows] for name in ("hidden", "temperature", "uniform")}})
        for signal in ("exact", "sparse", None):
            got = c.see(version, signal)
            assert got.argmax.shape == got.sample.shape == got.entropy.shape == (rows,)
            assert (got.signal is None) == (signal is None)
            assert got.signal is None or got.signal.shape == (rows, HIDDEN)


def test_rows_are_independent_of_their_block(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(TILE + 9, rows=13)
    whole = c.see(version)
    monkeypatch.setattr(blocks, "BUFFER", 4 * (TILE + 9) * 4)  # blocks of 4 rows
    monkeypatch.setattr(passes, "AT_ONCE", {"cpu": 2 * (TILE + 9)})
    assert [len(product) for _, product in blocks.products(c.hidden, c.weight)] == [4, 4, 4, 1]
    parts = c.see(version)
    same(c, parts, whole)
    assert torch.equal(parts.argmax, whole.argmax) and torch.equal(parts.sample, whole.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_equal_their_floats(version: str, dtype: torch.dtype) -> None:
    c = case(700, dtype=dtype)
    codes = torch.randint(-127, 128, (700, HIDDEN), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    packed = Codes(codes=codes, scale=torch.full((700, 1), 2.0**-8, dtype=dtype), zero_point=None, group=HIDDEN)
    for signal in ("exact", "sparse"):
        got, want = (c.see(version, signal, weight=weight) for weight in (packed, packed.unpack(dtype)))
        assert torch.equal(got.argmax, want.argmax) and torch.equal(got.sample, want.sample)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.signal, want.signal, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, None])
def test_sparse_probabilities_drop_no_more_than_allowed(version: str, dtype: torch.dtype, cap: float | None) -> None:
    kinds = set()
    for seed, spread in enumerate((0.0, 1.0, 2.0, 5.0, 12.0, 30.0)):
        c = case(TILE + 77, rows=6, dtype=dtype, cap=cap, spread=spread, seed=seed)
        product = linear(c.hidden, c.weight)
        seen = blocks.block_stats(product, c.cap, c.temperature, c.uniform, "sparse", native=version != "torch")
        belief = torch.softmax(full(c).to(dtype).double(), dim=-1)
        assert seen.sparse is not None and seen.probabilities is not None
        for row, count in enumerate(seen.sparse.counts.tolist()):
            kinds.add(count > 0)
            if count < 0:
                torch.testing.assert_close(seen.probabilities[row].double(), belief[row], rtol=2e-2, atol=1e-6)
                continue
            ids = seen.sparse.ids[row, :count]
            assert len(ids.unique()) == count and belief[row, ids].sum() > 1 - 2.0**-9
            torch.testing.assert_close(seen.sparse.shares[row, :count].double(), belief[row, ids], rtol=1e-2, atol=0)
        got, want = c.see(version, "sparse").signal, truth(c).signal
        bound = 2.0**-9 * c.weight.float().norm(dim=-1).max() * float(c.scale)
        error = (got.float() - want.float()).norm(dim=-1)  # type: ignore[union-attr]
        assert bool((error <= bound + 2e-2 * want.float().norm(dim=-1) + 1e-3).all())  # type: ignore[union-attr]
    assert kinds == {True, False}


@settings(max_examples=num_examples(40))
@given(
    st.integers(1, 3000),
    st.integers(1, 6),
    st.just(0.0) | st.floats(1e-20, 40),  # some kernels of torch take products below 1e-38 for 0
    st.floats(0.05, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_version_draws_the_same(
    vocab: int, rows: int, spread: float, temperature: float, narrow: bool, seed: int
) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    c = case(vocab, rows, dtype, spread=spread, seed=seed)
    c = Case(**{**vars(c), "temperature": torch.full((rows,), temperature)})
    # Two versions of tanh are an ulp or two apart, which a low temperature makes an absolute error of the logit.
    largest = float(full(c).abs().max())
    same(c, c.see("native"), truth(c), near=1e-6 if largest < 75 else largest * 2.0**-22)


MEMORY = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
from blockpress.ops import vocabulary
from blockpress.ops.vocabulary import blocks
torch.set_num_threads(1)
signal, native, blocks.BUFFER = sys.argv[1], sys.argv[2] == "native", 1 << 22
for rows in (16, 128):
    seen = vocabulary.sample_from_hidden(
        torch.zeros(rows, 8, dtype=torch.bfloat16), torch.zeros(131_072, 8, dtype=torch.bfloat16), cap=30.0,
        temperature=torch.ones(rows), uniform=torch.zeros(rows, dtype=torch.float64),
        scale=torch.ones((), dtype=torch.bfloat16), signal=signal, native=native,
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "signal"), [("native", "exact"), ("native", "sparse"), ("torch", "exact")])
def test_memory_does_not_grow_with_the_rows(kind: str, signal: str) -> None:
    done = subprocess.run([*python(), "-c", MEMORY, signal, kind], capture_output=True, text=True, check=True)
    one_block, eight = map(int, done.stdout.split())  # MiB; the products of 112 rows are 28 as bfloat16, 56 as float32
    assert eight - one_block < 10
