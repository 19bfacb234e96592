"""The step rule against plain lists, with the built-in rules and with rules of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.config import Sampling
from blockpress.diffusion import Accept, DenoiserOutput, EntropyBound, Settle, StableAndConfident, step_rules, update
from blockpress.errors import RequestError

LENGTH = 4
rows = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.tuples(
            *[st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH)] * 3,
            st.lists(st.integers(-1, 3), min_size=LENGTH, max_size=LENGTH),
            st.lists(st.integers(0, 64).map(lambda n: n / 256), min_size=LENGTH, max_size=LENGTH),
            st.integers(0, 3),
        ),
        min_size=count,
        max_size=count,
    )
)


def sure(entropy: Tensor) -> Tensor:
    return entropy < 0.1


def long_the_same(unchanged: Tensor, entropy: Tensor) -> Tensor:
    return unchanged > 2


def reading_of(given: list[Any]) -> DenoiserOutput:
    argmax, sample, _, _, entropy, _ = zip(*given, strict=True)
    signal = torch.zeros(len(given), LENGTH, 2)
    return DenoiserOutput(torch.tensor(argmax), torch.tensor(sample), torch.tensor(entropy), signal)


@given(rows, st.booleans())
def test_a_step_equals_a_plain_version_in_lists(given: list[Any], own: bool):
    accept: Accept = sure if own else EntropyBound(0.1)
    settle: Settle = long_the_same if own else StableAndConfident(1, 0.1)
    _, _, noise, previous, _, unchanged = zip(*given, strict=True)
    done = update(
        reading_of(given), torch.tensor(noise), torch.tensor(previous), torch.tensor(unchanged), accept, settle
    )
    for row, (argmax, sample, fresh, before, entropy, count) in enumerate(given):
        order, kept, spent = sorted(range(LENGTH), key=entropy.__getitem__), set(), 0.0
        for place in order:
            if entropy[place] < 0.1 if own else spent <= 0.1:
                kept.add(place)
            spent += entropy[place]
        changed = [a != b for a, b in zip(argmax, before, strict=True)]
        count = 0 if any(changed) else count + 1
        assert done.accepted[row].tolist() == [place in kept for place in range(LENGTH)]
        assert done.canvas[row].tolist() == [sample[i] if i in kept else fresh[i] for i in range(LENGTH)]
        assert done.changed[row].tolist() == changed and done.unchanged[row] == count
        assert bool(done.settled[row]) == (count > 2 if own else count >= 1 and spent / LENGTH < 0.1)


def test_custom_rules_replace_the_defaults():
    sampling = Sampling(entropy_bound=0.3, stability=2, confidence=0.01)
    assert step_rules(sampling) == (EntropyBound(0.3), StableAndConfident(2, 0.01))
    assert step_rules(sampling.with_(accept=sure)) == (sure, StableAndConfident(2, 0.01))
    assert step_rules(sampling.with_(settle=long_the_same)) == (EntropyBound(0.3), long_the_same)


ONE = [([1] * LENGTH, [2] * LENGTH, [3] * LENGTH, [1] * LENGTH, [0.0] * LENGTH, 0)]


@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("accept", lambda entropy: entropy, r"accept gave torch.float32 \[1, 4\] where torch.bool \[1, 4\]"),
        ("accept", lambda entropy: entropy[:, 0] < 1, r"accept gave torch.bool \[1\]"),
        ("accept", lambda entropy: True, "accept gave bool"),
        ("settle", lambda unchanged, entropy: entropy < 1, r"settle gave torch.bool \[1, 4\] where torch.bool \[1\]"),
        ("settle", lambda unchanged, entropy: None, "settle gave NoneType"),
    ],
)
def test_a_rule_with_a_wrong_result_is_refused_by_name(name: str, rule: Callable[..., Any], said: str):
    accept, settle = step_rules(Sampling().with_(**{name: rule}))
    with pytest.raises(RequestError, match=said):
        update(reading_of(ONE), torch.tensor([ONE[0][2]]), torch.tensor([ONE[0][3]]), torch.tensor([0]), accept, settle)
