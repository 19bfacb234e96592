"""`score_targets` and `score_ids` against log_softmax of full logits, as both families round them."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch import Tensor

from blockpress.ops import compiled, vocabulary
from blockpress.ops.linear import linear
from blockpress.ops.vocabulary import blocks, native
from tests.forks import python

HIDDEN = 24


@pytest.fixture(params=["torch", "native", "tables"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "torch" and compiled.library("vocabulary") is None:
        pytest.skip("no C++ compiler")
    if request.param == "tables":
        monkeypatch.setattr(native, "TABLED", 0)
    return request.param


def logits(hidden: Tensor, weight: Tensor, cap: float | None, wide: bool) -> Tensor:
    """As `Network.logits`."""
    product = linear(hidden, weight)
    product = product.float() if wide else product
    return (product if cap is None else torch.tanh(product / cap) * cap).float()


@pytest.mark.parametrize("vocab", [3, 17, 300, vocabulary.TILE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cap", "wide"), [(30.0, True), (30.0, False), (None, True), (None, False)])
def test_logprobs_equal_log_softmax_of_full_logits(
    version: str, vocab: int, dtype: torch.dtype, cap: float | None, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(vocab)
    hidden = (torch.randn(9, HIDDEN, generator=draw) * 6).to(dtype)
    weight = (torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
    tokens = torch.randint(vocab, (9,), generator=draw)
    top = min(vocab, 5)
    monkeypatch.setattr(blocks, "BUFFER", 4 * vocab * 4)  # several blocks
    got = vocabulary.score_targets(
        hidden, weight, cap=cap, tokens=tokens, top=top, wide=wide, native=version != "torch"
    )
    full = logits(hidden, weight, cap, wide)
    want = full.double().log_softmax(-1)
    assert got.logprobs is not None
    torch.testing.assert_close(
        got.logprobs.target.double(), want.gather(-1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(full.gather(-1, got.greedy[:, None])[:, 0], full.amax(-1))
    torch.testing.assert_close(got.logprobs.top.double(), want.topk(top, dim=-1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logprobs.top.double(), want.gather(-1, got.logprobs.top_ids), rtol=1e-5, atol=1e-5)
    assert all(len(set(ids)) == top for ids in got.logprobs.top_ids.tolist())


@pytest.mark.parametrize("vocab", [3, vocabulary.TILE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, None])
def test_logprobs_of_several_tokens_equal_log_softmax_of_full_logits(
    version: str, vocab: int, dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(vocab)
    hidden = (torch.randn(9, HIDDEN, generator=draw) * 6).to(dtype)
    weight = (torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
    ids = torch.randint(vocab, (9, 4), generator=draw)
    monkeypatch.setattr(blocks, "BUFFER", 4 * vocab * 4)  # several blocks
    got = vocabulary.score_ids(hidden, weight, ids, cap=cap, native=version != "torch")
    want = logits(hidden, weight, cap, wide=True).double().log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert vocabulary.score_ids(hidden[:0], weight, ids[:0], cap=cap, native=version != "torch").shape == (0, 4)


def test_equal_logprobs_come_in_token_order(version: str) -> None:
    hidden, weight = torch.ones(1, 4), torch.ones(6, 4)
    weight[[1, 4]] = 2.0
    got = vocabulary.score_targets(
        hidden, weight, cap=30.0, tokens=torch.tensor([1]), top=2, wide=True, native=version != "torch"
    )
    assert got.logprobs is not None
    assert got.greedy.tolist() == [1] and got.logprobs.top_ids.tolist() == [[1, 4]]


def test_no_rows_give_no_logprobs(version: str) -> None:
    none = torch.empty(0, dtype=torch.long)
    got = vocabulary.score_targets(
        torch.empty(0, 4), torch.ones(6, 4), cap=None, tokens=none, top=3, wide=True, native=version != "torch"
    )
    told = got.logprobs
    assert told is not None and told.target.shape == told.greedy.shape == got.greedy.shape == (0,)
    assert told.top_ids.shape == told.top.shape == (0, 3)


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banned_tokens_are_never_greedy_and_keep_their_logprob(
    version: str, dtype: torch.dtype, top: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(5)
    hidden = (torch.randn(9, HIDDEN, generator=draw) * 6).to(dtype)
    weight = (torch.randn(700, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
    monkeypatch.setattr(blocks, "BUFFER", 4 * 700 * 4)  # several blocks
    given = {"cap": 30.0, "tokens": torch.zeros(9, dtype=torch.long), "wide": True, "native": version != "torch"}
    free = vocabulary.score_targets(hidden, weight, top=2, **given)
    ids = free.greedy.unique()
    where = (ids == free.greedy[:, None]) & (torch.arange(9) % 2 == 0)[:, None]
    got = vocabulary.score_targets(hidden, weight, top=top, banned=(ids, where), **given)
    full = logits(hidden, weight, 30.0, True)
    full[:, ids] = full[:, ids].masked_fill(where, float("-inf"))
    assert torch.equal(got.greedy, full.argmax(-1))
    assert torch.equal(got.greedy == free.greedy, torch.arange(9) % 2 == 1)
    if got.logprobs is None:
        assert top is None
        return
    assert free.logprobs is not None and torch.equal(got.logprobs.target, free.logprobs.target)
    assert torch.equal(got.logprobs.top_ids, free.logprobs.top_ids) and torch.equal(got.logprobs.top, free.logprobs.top)
    want = logits(hidden, weight, 30.0, True).double().log_softmax(-1).gather(-1, got.greedy[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.greedy.double(), want, rtol=1e-5, atol=1e-5)


MEMORY = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
from blockpress.ops import vocabulary
from blockpress.ops.vocabulary import blocks
torch.set_num_threads(1)
native, blocks.BUFFER = sys.argv[1] == "native", 1 << 22
for rows in (16, 128):
    vocabulary.score_targets(
        torch.zeros(rows, 8), torch.zeros(131_072, 8), cap=30.0, tokens=torch.zeros(rows, dtype=torch.long), top=5,
        wide=True, banned=(torch.tensor([3]), torch.ones(rows, 1, dtype=torch.bool)), native=native,
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_memory_does_not_grow_with_the_tokens(kind: str) -> None:
    done = subprocess.run([*python(), "-c", MEMORY, kind], capture_output=True, text=True, check=True)
    one_block, eight = map(int, done.stdout.split())  # MiB; the products of 112 rows are 56
    assert eight - one_block < 10
