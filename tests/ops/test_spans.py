"""Spans of a flat batch against plain attention over each one's joined pieces, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blockpress.ops import attention, spans
from blockpress.ops.attention import AttentionSpan, Piece
from blockpress.ops.cpu import bridge
from blockpress.ops.spans import varlen_attention

DIM = 16


def piece(draw: torch.Generator, kv: int, keys: int, dtype: torch.dtype = torch.float32, pages: bool = False) -> Piece:
    """Keys and values; as `pages` they are a part of larger storage, as the engine's are."""
    both = torch.randn(2, kv, keys + 7, DIM, generator=draw).to(dtype)
    key, value = both[:, :, 3 : 3 + keys].unbind() if pages else both[:, :, :keys].contiguous().unbind()
    return key, value


def build(shape: list[tuple[int, list[int], bool]], kv: int, dtype: torch.dtype, seed: int) -> list[AttentionSpan]:
    """Spans of (queries, keys of each piece, masked)."""
    draw, start, made = torch.Generator().manual_seed(seed), 0, []
    for queries, pieces, masked in shape:
        mask = None
        if masked:
            mask = torch.rand(queries, sum(pieces), generator=draw) < 0.5
            mask[:, 0] = True
        seen = tuple(piece(draw, kv, keys, dtype, pages=place == 0) for place, keys in enumerate(pieces))
        made.append(AttentionSpan(start=start, stop=start + queries, kv=seen, mask=mask))
        start += queries
    return made


def truth(query: Tensor, made: list[AttentionSpan]) -> Tensor:
    parts = []
    for span in made:
        key, value = (torch.cat(halves, dim=1)[None] for halves in zip(*span.kv, strict=True))
        mask = None if span.mask is None else span.mask[None]
        parts.append(attention.plain(query[None, :, span.start : span.stop], key, value, mask)[0])
    return torch.cat(parts, dim=1)


VERSIONS = ["C++", "torch"]


@contextmanager
def only(version: str) -> Iterator[None]:
    """C++ where it can be had; or the groups of spans in torch."""
    if version == "C++":
        yield
    else:
        with mock.patch.object(spans, "_in_cpp", return_value=False):
            yield


def check(made: list[AttentionSpan], heads: int, dtype: torch.dtype = torch.float32, version: str = "C++") -> None:
    draw = torch.Generator().manual_seed(len(made))
    query = torch.randn(heads, made[-1].stop, DIM, generator=draw).to(dtype)
    with torch.inference_mode(), only(version):
        got, wanted = varlen_attention(query, made), truth(query, made)
    assert got.transpose(0, 1).is_contiguous(), "heads of a row lie side by side"
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(got, wanted, **close)


shapes = st.lists(
    st.tuples(st.sampled_from([1, 1, 2, 5, 12]), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.booleans()),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("version", VERSIONS)
@given(shape=shapes, sizes=st.sampled_from([(1, 1), (4, 2), (6, 1)]), seed=st.integers(0, 99))
def test_any_spans_equal_the_reference(
    version: str, shape: list[tuple[int, list[int], bool]], sizes: tuple[int, int], seed: int
) -> None:
    heads, kv = sizes
    check(build(shape, kv, torch.float32, seed), heads, version=version)


CASES = {
    "single tokens": [(1, [keys], False) for keys in range(40, 72)],
    "canvases": [(24, [keys, 24], False) for keys in (64, 70, 64, 200)],
    "canvases of one length": [(24, [64, 24], False)] * 4,
    "mixed": [(24, [64, 24], False), (40, [100], True), (1, [60], False), (24, [66, 24], True), (1, [64], False)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [*VERSIONS, "torch alone"])
@pytest.mark.parametrize("case", CASES)
def test_engine_like_spans_equal_the_reference(
    case: str, version: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version == "torch alone":
        monkeypatch.setattr("blockpress.ops.rows.supports", lambda *_: False)
    check(build(CASES[case], 2, dtype, 1), 4, dtype, version)


@pytest.mark.skipif(bridge.library() is None, reason="no C++ compiler")
def test_cpp_is_used_where_supported() -> None:
    made = build(CASES["mixed"], 2, torch.float32, 1)
    query = torch.randn(4, made[-1].stop, DIM, generator=torch.Generator().manual_seed(0))
    with mock.patch.object(spans, "_attend_group") as in_torch:
        with torch.inference_mode():
            varlen_attention(query, made)
        assert not in_torch.called
        varlen_attention(query, made)
        assert in_torch.called, "gradients are torch's"


def test_results_do_not_depend_on_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SCORES", 4 * 3 * 130)
    made = build([(40, [100, 30], True), (40, [90, 40], False), (1, [50], False)], 2, torch.float32, 5)
    check(made, 4, version="torch")


def test_single_tokens_run_as_one_product_on_a_gpu() -> None:
    assert len([*spans.group_spans(build(CASES["single tokens"], 2, torch.float32, 2), 4)]) <= 2


def test_spans_run_alone_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of several would depend on how many they are."""
    groups, attend = [], spans._attend_group
    monkeypatch.setattr(spans, "_attend_group", lambda *given: groups.append(given[1]) or attend(*given))
    made = build(CASES["single tokens"], 2, torch.float32, 2)
    check(made, 4, version="torch")
    assert [len(group) for group in groups] == [1] * len(made)


@pytest.mark.parametrize("version", VERSIONS)
def test_masked_keys_and_padding_have_no_influence(version: str) -> None:
    made = build([(3, [8], True), (3, [20], False)], 2, torch.float32, 3)
    query = torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), only(version):
        before = varlen_attention(query, made)[:, :3].clone()
        made[0].mask[:, 5:], made[1].kv[0][1][:] = False, 1e6  # type: ignore[index]
        hidden = varlen_attention(query, made)[:, :3].clone()
        made[0].kv[0][0][:, 5:], made[0].kv[0][1][:, 5:] = 50.0, -1e6
        assert torch.equal(varlen_attention(query, made)[:, :3], hidden)
    assert not torch.equal(before, hidden), "the mask counts"
