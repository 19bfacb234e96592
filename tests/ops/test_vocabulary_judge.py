"""`judge` against log_softmax of full logits, as both families round them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockpress.ops import vocabulary
from blockpress.ops.linear import linear
from blockpress.ops.vocabulary import blocks, native

HIDDEN = 24


@pytest.fixture(params=["torch", "native", "tables"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "torch" and native._library() is None:
        pytest.skip("no C++ compiler")
    if request.param == "tables":
        monkeypatch.setattr(native, "FEW", 0)
    return request.param


def logits(hidden: Tensor, weight: Tensor, cap: float | None, wide: bool) -> Tensor:
    """As `Network.logits`."""
    product = linear(hidden, weight)
    product = product.float() if wide else product
    return (product if cap is None else torch.tanh(product / cap) * cap).float()


@pytest.mark.parametrize("vocab", [3, 17, 300, vocabulary.TILE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cap", "wide"), [(30.0, True), (30.0, False), (None, True), (None, False)])
def test_it_gives_the_log_softmax_of_full_logits(
    version: str, vocab: int, dtype: torch.dtype, cap: float | None, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(vocab)
    hidden = (torch.randn(9, HIDDEN, generator=draw) * 6).to(dtype)
    weight = (torch.randn(vocab, HIDDEN, generator=draw) * HIDDEN**-0.5).to(dtype)
    tokens = torch.randint(vocab, (9,), generator=draw)
    top = min(vocab, 5)
    monkeypatch.setattr(blocks, "BUFFER", 4 * vocab * 4)  # several blocks
    got = vocabulary.judge(hidden, weight, cap=cap, tokens=tokens, top=top, wide=wide, native=version != "torch")
    full = logits(hidden, weight, cap, wide)
    want = full.double().log_softmax(-1)
    torch.testing.assert_close(got.logprob.double(), want.gather(-1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(full.gather(-1, got.argmax[:, None])[:, 0], full.amax(-1))
    torch.testing.assert_close(got.top_logprobs.double(), want.topk(top, dim=-1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.top_logprobs.double(), want.gather(-1, got.top_ids), rtol=1e-5, atol=1e-5)
    assert all(len(set(ids)) == top for ids in got.top_ids.tolist())


def test_equal_tokens_come_in_their_order(version: str) -> None:
    hidden, weight = torch.ones(1, 4), torch.ones(6, 4)
    weight[[1, 4]] = 2.0
    got = vocabulary.judge(
        hidden, weight, cap=30.0, tokens=torch.tensor([1]), top=2, wide=True, native=version != "torch"
    )
    assert got.argmax.tolist() == [1] and got.top_ids.tolist() == [[1, 4]]


def test_nothing_to_judge(version: str) -> None:
    none = torch.empty(0, dtype=torch.long)
    got = vocabulary.judge(
        torch.empty(0, 4), torch.ones(6, 4), cap=None, tokens=none, top=3, wide=True, native=version != "torch"
    )
    assert got.logprob.shape == got.argmax.shape == (0,) and got.top_ids.shape == got.top_logprobs.shape == (0, 3)
