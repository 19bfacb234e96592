"""Edited logits in a step's pass over the vocabulary equal edits of full logits, alone and under a condition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import nucleus, vocabulary
from blockpress.ops.linear import combine, linear
from blockpress.ops.nucleus import Truncation
from blockpress.ops.vocabulary import (
    ClassStats,
    LogitChanges,
    Penalties,
    SampleStats,
    TokenClasses,
    blocks,
    passes,
    plain,
)
from tests.conftest import num_examples

from .test_vocabulary_conditioned import HIDDEN, classes_of, version  # noqa: F401  (a fixture)

ROWS = 9
CUTS = [None, Truncation(top_k=3), Truncation(top_p=0.6), Truncation(min_p=0.3), Truncation(top_k=9, top_p=0.9)]


class Case:
    """A head, hidden states and edits of some of the tokens, each fifth of which is banned."""

    def __init__(self, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, cap: float | None = 30.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = (torch.randn(ROWS, HIDDEN, generator=draw) * 3).to(dtype)
        self.weight = (torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
        self.temperature, self.cap = torch.rand(ROWS, generator=draw) * 0.6 + 0.4, cap
        self.uniform = torch.rand(ROWS, generator=draw, dtype=torch.float64)
        self.scale = torch.tensor(HIDDEN**0.5, dtype=dtype)
        order = torch.randperm(vocab, generator=draw)
        self.banned, ids = order[: vocab // 5], order[vocab // 5 : vocab // 2].sort().values
        label = torch.zeros(vocab, dtype=torch.int32)
        label[self.banned], label[ids] = 1, torch.arange(2, 2 + len(ids), dtype=torch.int32)
        counts = torch.randint(0, 3, (ROWS, len(ids)), generator=draw).float()
        seen = (counts > 0) | (torch.rand(len(ids), generator=draw) < 0.2)
        lost = Penalties(counts=counts, seen=seen, presence=0.7, frequency=-0.4, repetition=1.3)
        bias = torch.randn(len(ids), generator=draw) * 4
        self.changes = LogitChanges(label=label, ids=ids, bias=bias, penalties=lost)

    def truth(self) -> Tensor:
        """Scaled logits, edited one by one."""
        scaled = passes.scaled_logits(linear(self.hidden, self.weight).float(), self.cap, self.temperature)
        logits = (scaled * self.temperature[:, None]).double()
        logits[:, self.banned] -= 1e6
        lost = self.changes.penalties
        assert lost is not None
        for column, token in enumerate(self.changes.ids.tolist()):
            for row in range(ROWS):
                value = float(logits[row, token]) + float(self.changes.bias[column])
                if lost.seen[row, column]:
                    value = value * 1.3 if value < 0 else value / 1.3
                count = float(lost.counts[row, column])
                logits[row, token] = value - 0.7 * (count > 0) + 0.4 * count
        return (logits / self.temperature[:, None]).float()

    def given(self, **more: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("cap", "temperature", "uniform", "scale", "changes")} | more


@cache
def case_with_truth(vocab: int, dtype: torch.dtype, cap: float | None) -> tuple[Case, Tensor]:
    case = Case(vocab, dtype, cap=cap)
    return case, case.truth()


def check(case: Case, got: SampleStats, scaled: Tensor, cut: Truncation | None, tolerance: float) -> None:
    drawn = (scaled if cut is None else cut(scaled[None])[0]).double().softmax(-1)
    through = drawn.cumsum(-1)
    for row, token in enumerate(got.sample.tolist()):
        below = float(through[row, token] - drawn[row, token])
        assert below - tolerance <= case.uniform[row] <= float(through[row, token]) + tolerance
        assert scaled[row, token] > -1e5
    assert bool((scaled.gather(1, got.argmax[:, None])[:, 0] >= scaled.amax(-1) - tolerance).all())
    torch.testing.assert_close(got.entropy, plain.entropy(scaled[None])[0], rtol=tolerance, atol=tolerance)
    belief = torch.softmax(scaled.to(case.weight.dtype), dim=-1, dtype=torch.float32).to(case.weight.dtype)
    assert got.signal is not None
    spare = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[case.weight.dtype]
    torch.testing.assert_close(got.signal, combine(belief, case.weight) * case.scale, rtol=spare, atol=spare)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_of_edited_logits_equals_one_of_full_logits(version: str, dtype: torch.dtype, cut: Any) -> None:  # noqa: F811
    for vocab, cap in ((5, None), (300, 30.0), (vocabulary.TILE + 7, 30.0)):
        case, truth = case_with_truth(vocab, dtype, cap)
        native = version != "torch"
        got = vocabulary.sample_from_hidden(case.hidden, case.weight, **case.given(truncation=cut, native=native))
        check(case, got, truth, cut, 1e-4)


@pytest.mark.parametrize("cut", CUTS[:3])
@pytest.mark.parametrize("unclassed", [0.1, 0.9])
def test_a_condition_is_told_of_edited_logits(version: str, unclassed: float, cut: Truncation | None) -> None:  # noqa: F811
    """Masses and best tokens of its classes, and its biases are added to the edits; also where it holds few tokens."""
    for seed, vocab in enumerate((18, 900)):
        case, native = Case(vocab, seed=seed), version != "torch"
        class_of = classes_of(vocab, 4, unclassed, seed, large=0.4)
        scaled = case.truth()
        told: list[ClassStats] = []
        bias = torch.cat((torch.randn(ROWS, 4) * 2, torch.full((ROWS, 1), -math.inf)), 1)
        path = torch.randint(0, 4, (ROWS,))

        def condition(stats: ClassStats, told: Any = told, given: Any = (bias, path)) -> tuple[Tensor, Tensor]:
            told.append(stats)
            return given

        more = {"classes": TokenClasses.of(class_of), "condition": condition, "truncation": cut, "native": native}
        got = vocabulary.sample_conditioned(case.hidden, case.weight, **case.given(**more))
        for label in range(4):
            own = scaled[:, class_of == label].double()
            torch.testing.assert_close(told[0].mass[:, label], own.logsumexp(-1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(told[0].best[:, label].double(), own.amax(-1), rtol=1e-4, atol=1e-4)
        best = scaled.masked_fill(class_of != path[:, None], -math.inf)
        assert bool((best.gather(1, got.argmax[:, None])[:, 0] >= best.amax(-1) - 1e-4).all())
        biased = scaled + bias[:, class_of]
        check(case, replace(got, argmax=biased.argmax(-1)), biased, cut, 1e-4)  # its argmax is the path's


def test_what_is_banned_with_all_others_is_chosen_by_its_logits() -> None:
    case = Case(40)
    case.changes = LogitChanges(
        label=torch.ones(40, dtype=torch.int32), ids=torch.empty(0).long(), bias=torch.empty(0), penalties=None
    )
    got = vocabulary.sample_from_hidden(case.hidden, case.weight, **case.given())
    assert got.argmax.tolist() == linear(case.hidden, case.weight).argmax(-1).tolist()
    assert bool(got.entropy.isfinite().all())


@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_a_ban_holds_at_every_temperature(temperature: float) -> None:
    case = Case(40)
    case.temperature = torch.full((ROWS,), temperature)
    got = vocabulary.sample_from_hidden(case.hidden, case.weight, **case.given())
    assert not {*got.argmax.tolist(), *got.sample.tolist()} & set(case.changes.label.eq(1).nonzero()[:, 0].tolist())


@settings(max_examples=num_examples(40))
@given(
    st.integers(1, 3000),
    st.sampled_from([None, 1, 3, 40, 1500]),
    st.floats(1e-3, 1) | st.just(5e-324),
    st.floats(0, 1),
    st.floats(0.01, 8),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_draw_among_the_likeliest_is_one_of_the_whole_row(
    vocab: int, k: int | None, p: float, share: float, spread: float, narrow: bool, seed: int
) -> None:
    """Also of rows that need more than the few that are looked at first, of ties, and of the products' own dtype."""
    generator = torch.Generator().manual_seed(seed)
    product = (torch.randn(6, vocab, generator=generator) * spread).to(torch.bfloat16 if narrow else torch.float32)
    product[::2] = product[::2].round()
    temperature, uniform = torch.rand(6, generator=generator) + 0.3, torch.rand(6, generator=generator).double()
    cut, before = Truncation(top_k=k, top_p=p, min_p=share), product.clone()
    scaled = passes.scaled_logits(product, 30.0, temperature)
    left = cut(scaled[None])[0]  # by sorting
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "FEW", 16)
        patch.setattr(nucleus, "MANY", 200)
        drawn = blocks.draw(product, 30.0, temperature, uniform, None, cut)
    assert torch.equal(product, before)
    through = left.double().softmax(-1).cumsum(-1)
    wanted = plain.sample(left[None], uniform[None])[0]
    for row, token in enumerate(drawn.tolist()):
        near = float((through[row] - uniform[row]).abs().min()) < 1e-6
        edge = (scaled[row, token] - left[row].masked_fill(left[row].isneginf(), math.inf).min()).abs() < 1e-5
        assert token == wanted[row] or near or edge or _near_the_edge(scaled[row], k, p)


@pytest.mark.parametrize("cut", [Truncation(top_p=5e-324), Truncation(top_k=7, top_p=1e-46), Truncation(min_p=1.0)])
@pytest.mark.parametrize("vocab", [16, 5000])
def test_the_likeliest_token_may_be_drawn_however_little_is_left(cut: Truncation, vocab: int) -> None:
    """Shares that are 0 in float32 cut down to one token, not to none."""
    product = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    uniform = torch.linspace(0, 0.999, 6, dtype=torch.float64)
    drawn = blocks.draw(product, 30.0, torch.ones(6), uniform, None, cut)
    assert drawn.tolist() == product.argmax(-1).tolist() == cut(product[None])[0].argmax(-1).tolist()
    assert (~cut(product[None]).isneginf()).sum(-1).tolist() == [[1] * 6]


def _near_the_edge(scaled: Tensor, k: int | None, p: float) -> bool:
    """Whether sums of float32 may keep one token more or less."""
    falling = scaled.double().sort(descending=True).values
    falling = falling if k is None else falling[falling >= falling[min(k, len(falling)) - 1]]
    return bool((falling.softmax(-1).cumsum(-1) - p).abs().min() < 1e-5)
