"""The pass for canvases under a constraint equals full logits: masses of classes against float64, then the whole step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import compiled, vocabulary
from blockpress.ops.linear import combine, linear
from blockpress.ops.vocabulary import ClassStats, TokenClasses, blocks, native, passes, plain
from tests.conftest import num_examples

HIDDEN = 24
VERSIONS = ["torch", "native", "tables"]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "torch" and compiled.library("vocabulary") is None:
        pytest.skip("no C++ compiler")
    if request.param == "tables":
        monkeypatch.setattr(native, "TABLED", 0)
    return request.param


def classes_of(vocab: int, count: int, unclassed: float, seed: int = 0, large: float = 0.0) -> Tensor:
    """The class of each token, each class of at least one; `large`: the part of tokens in the last class."""
    draw = torch.Generator().manual_seed(seed)
    class_of = torch.randint(0, count, (vocab,), generator=draw)
    class_of[torch.rand(vocab, generator=draw) < large] = count - 1
    class_of[torch.rand(vocab, generator=draw) < unclassed] = -1
    class_of[torch.randperm(vocab, generator=draw)[:count]] = torch.arange(count)
    return class_of


def check_classes(product: Tensor, cap: float | None, temperature: Tensor, class_of: Tensor, version: str) -> None:
    classes = TokenClasses.of(class_of)
    held = product if classes.tokens is None else product[:, classes.tokens].contiguous()
    got = blocks.class_stats(held, cap, temperature, classes, native=version != "torch")
    scaled = passes.scaled_logits(product, cap, temperature)
    for label in range(len(classes)):
        tokens = (class_of == label).nonzero()[:, 0]
        own = scaled[:, tokens].double()
        best, mass = own.max(-1).values, own.logsumexp(-1)
        spare = 2e-6 * (1 + best.abs().masked_fill(best.isinf(), 0))
        assert bool(((got.best[:, label].double() - best).abs() <= spare)[~best.isinf()].all())
        assert torch.equal(got.best[:, label].isneginf(), best.isneginf())
        assert bool(((got.mass[:, label] - mass).abs() <= spare + 2e-6)[~mass.isinf()].all())
        assert torch.equal(got.mass[:, label].isneginf(), mass.isneginf())
        chosen = got.token[:, label] if classes.tokens is None else classes.tokens[got.token[:, label]]
        assert bool((class_of[chosen] == label).all())
        reached = scaled.gather(1, chosen[:, None])[:, 0].double()
        assert bool((reached >= best - spare).all())


@pytest.mark.parametrize(
    ("cap", "dtype"), [(30.0, torch.float32), (None, torch.float32), (30.0, torch.bfloat16), (None, torch.bfloat16)]
)
def test_a_class_has_the_mass_of_its_tokens(version: str, cap: float | None, dtype: torch.dtype) -> None:
    """However far below other classes, and without any: half of a row, and all of another, are -inf."""
    draw = torch.Generator().manual_seed(3)
    for vocab, count, unclassed, large in (
        (1, 1, 0.0, 0.0),
        (19, 3, 0.2, 0.0),
        (700, 40, 0.1, 0.7),
        (5000, 6, 0.9, 0.0),
    ):
        for spread in (1.0, 30.0, 1000.0 if cap is None else 90.0):
            product = torch.randn(7, vocab, generator=draw) * spread
            class_of = classes_of(vocab, count, unclassed, seed=vocab, large=large)
            product[1, class_of == 0] -= 5 * spread
            product[2, torch.rand(vocab, generator=draw) < 0.5] = -math.inf
            product[3, class_of == 0] = -math.inf
            product[4] = -math.inf
            temperature = torch.tensor([1.0, 0.4, 0.7, 1.0, 1.0, 0.05, 3.0])
            check_classes(product.to(dtype), cap, temperature, class_of, version)


@settings(max_examples=num_examples(40))
@given(
    st.integers(1, 2000), st.integers(1, 30), st.floats(0, 300), st.floats(0, 0.95), st.booleans(), st.integers(0, 99)
)
def test_masses_of_classes_equal_float64(
    vocab: int, count: int, spread: float, unclassed: float, narrow: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    product = (torch.randn(3, vocab, generator=draw) * spread).to(torch.bfloat16 if narrow else torch.float32)
    class_of = classes_of(vocab, min(count, vocab), unclassed, seed, large=0.5)
    for name in ("torch", "native"):
        check_classes(product, None, torch.tensor([1.0, 0.3, 2.0]), class_of, name)


def test_the_first_of_equal_tokens_is_a_classs_best(version: str) -> None:
    class_of = torch.tensor([0, 1, 0, -1, 1, 1, 0] * 99)
    classes = TokenClasses.of(class_of)
    for dtype in (torch.float32, torch.bfloat16):
        product = torch.full((2, len(class_of)), 0.5, dtype=dtype)
        product[1, [200, 300]] = 4.0
        stats = blocks.class_stats(product, 30.0, torch.ones(2), classes, native=version != "torch")
        assert stats.token[0].tolist() == [0, 1]
        assert stats.token[1, class_of[200]] == 200


class Case:
    """A head, hidden states, and a condition that gives every class a bias."""

    def __init__(
        self,
        vocab: int,
        dtype: torch.dtype,
        *,
        cap: float | None = 30.0,
        unclassed: float = 0.1,
        seed: int = 0,
        spread: float = 3.0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        rows, count = 9, min(6, vocab)
        self.hidden = (torch.randn(rows, HIDDEN, generator=draw) * spread).to(dtype)
        self.weight = (torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
        self.temperature = torch.rand(rows, generator=draw) * 0.6 + 0.4
        self.uniform = torch.rand(rows, generator=draw, dtype=torch.float64)
        self.class_of = classes_of(vocab, count, unclassed, seed, large=0.5)
        self.cap, self.scale = cap, torch.tensor(HIDDEN**0.5, dtype=dtype)
        self.bias = torch.randn(rows, count, generator=draw) * 5
        self.bias[1, 1:] = -math.inf  # few tokens
        self.bias[2, : count - 1] = -1000.0
        self.bias = torch.cat((self.bias, torch.full((rows, 1), -math.inf)), 1)
        self.path = torch.randint(0, count, (rows,), generator=draw)
        self.path[1] = 0

    def condition(self, stats: ClassStats) -> tuple[Tensor, Tensor]:
        return self.bias, self.path

    def see(self, native: bool, signal: vocabulary.SignalKind = "exact", **other: object) -> vocabulary.SampleStats:
        given = {name: getattr(self, name) for name in ("cap", "temperature", "uniform", "scale", "condition")}
        return vocabulary.sample_conditioned(
            self.hidden,
            self.weight,
            classes=TokenClasses.of(self.class_of),
            signal=signal,
            native=native,
            **given | other,
        )

    def truth(self, banned: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The logits with the bias, and those of the likeliest class alone."""
        product = linear(self.hidden, self.weight).float()
        if banned is not None:
            product[:, banned[0]] = product[:, banned[0]].masked_fill(banned[1], -math.inf)
        scaled = passes.scaled_logits(product, self.cap, self.temperature)
        return scaled + self.bias[:, self.class_of], scaled.masked_fill(self.class_of != self.path[:, None], -math.inf)


def check_step(case: Case, got: vocabulary.SampleStats, banned: tuple[Tensor, Tensor] | None = None) -> None:
    scaled, chosen = case.truth(banned)
    sample = plain.sample(scaled[None], case.uniform[None])[0]
    through = scaled.double().softmax(-1).cumsum(-1)
    for row in range(len(scaled)):
        assert chosen[row, got.argmax[row]] >= chosen[row].max() - 1e-5
        margin = float((through[row] - case.uniform[row]).abs().min())
        assert got.sample[row] == sample[row] or margin < 1e-6
        assert scaled[row, got.sample[row]] > -math.inf
    torch.testing.assert_close(got.entropy, plain.entropy(scaled[None])[0], rtol=1e-4, atol=1e-5)
    dtype = case.hidden.dtype
    belief = torch.softmax(scaled.to(dtype), dim=-1, dtype=torch.float32).to(dtype)
    assert got.signal is not None and got.signal.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got.signal, combine(belief, case.weight) * case.scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unclassed", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("vocab", [1, 18, 3000, vocabulary.TILE + 7])
def test_a_conditioned_step_equals_one_of_full_logits(
    version: str, vocab: int, unclassed: float, dtype: torch.dtype
) -> None:
    """0.95 of the vocabulary in no class: only the products of the rest are computed."""
    for seed, cap, spread in ((0, 30.0, 3.0), (1, None, 3.0), (2, 30.0, 60.0)):
        case = Case(vocab, dtype, cap=cap, unclassed=unclassed, seed=seed, spread=spread)
        if vocab > 100:
            assert (TokenClasses.of(case.class_of).tokens is None) == (unclassed < 0.9)
        check_step(case, case.see(version != "torch"))


@pytest.mark.parametrize("unclassed", [0.1, 0.95])
def test_banned_tokens_stay_banned_under_a_condition(version: str, unclassed: float) -> None:
    case = Case(900, torch.float32, unclassed=unclassed)
    case.bias[:, :-1] = 0.0
    case.bias[:, -1] = -math.inf
    ids = torch.cat(((case.class_of == 0).nonzero()[::2, 0], torch.tensor([0, 1, 899]))).unique()
    where = torch.rand(9, len(ids), generator=torch.Generator().manual_seed(1)) < 0.7
    check_step(case, case.see(version != "torch", banned=(ids, where)), (ids, where))


def test_a_condition_without_mass_and_nan_end_in_nan(version: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for unclassed in (0.1, 0.95):
            case = Case(400, dtype, unclassed=unclassed)
            case.hidden[3] = math.nan
            case.bias[4] = -math.inf
            case.bias[5] = math.nan
            got = case.see(version != "torch")
            assert got.entropy.isnan().tolist() == [i in (3, 4, 5) for i in range(9)]
            assert all(0 <= token < 400 for token in (*got.argmax.tolist(), *got.sample.tolist()))
            assert got.signal is not None and got.signal.isnan().any(-1).tolist() == [i in (3, 4, 5) for i in range(9)]


@pytest.mark.parametrize("signal", ["sparse", None])
def test_the_other_signals_are_offered_too(version: str, signal: vocabulary.SignalKind) -> None:
    case = Case(3000, torch.float32)
    got, want = case.see(version != "torch", signal), case.see(version != "torch")
    assert torch.equal(got.sample, want.sample) and torch.equal(got.argmax, want.argmax)
    assert (got.signal is None) == (signal is None)
    if got.signal is not None and want.signal is not None:
        bound = 2.0**-9 * case.weight.norm(dim=-1).max() * float(case.scale) + 1e-3
        assert bool(((got.signal - want.signal).norm(dim=-1) <= bound).all())


def test_rows_that_need_all_tokens_are_closed_up_between_others(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the few that are listed, in every second row."""
    monkeypatch.setattr(blocks, "BUFFER", 2 * 6000 * 4)
    case = Case(6000, torch.float32, spread=0.1)
    case.bias[::2, :-1] = 0.0
    case.bias[1::2] = -math.inf
    case.bias[1::2, 0], case.path[1::2] = 0.0, 0
    case.class_of[(case.class_of == 0).nonzero()[50:, 0]] = 1
    check_step(case, case.see(version != "torch"))
