"""Log-probabilities of tokens from the hidden states of a causal pass.

Invariant: what `judge` gives for a row is log_softmax of `Network.logits` in float32; only a block of products exists
at a time.
Run it:  python -m pytest tests/ops/test_vocabulary_judge.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from blockpress.ops.vocabulary.blocks import pass_over, products
from blockpress.ops.vocabulary.passes import scaled_logits
from blockpress.ops.weight import Packed


@dataclass(frozen=True)
class Judged:
    """Of n positions: the log-probability of each one's token, its likeliest token, and the `top` likeliest ones."""

    logprob: Float32[Tensor, " n"]
    argmax: Int[Tensor, " n"]
    top_ids: Int[Tensor, "n top"]
    top_logprobs: Float32[Tensor, "n top"]


@torch.no_grad()
def judge(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    *,
    cap: float | None,
    tokens: Int[Tensor, " n"],
    top: int = 0,
    wide: bool,
    native: bool = True,
) -> Judged:
    """log p(token) at temperature 1 for one token a position, n >= 0, and the `top` best alternatives, best first.

    Args:
        hidden: after the final norm; row i is the state that predicts tokens[i].
        cap: the softcap of the logits; None: none.
        wide: whether the cap is computed in float32 (DiffusionGemma) or in the weight's dtype (Gemma 4).
        native: whether the version in C++ may be used where there is one.
    """
    n = len(hidden)
    logprob, argmax = hidden.new_empty(n, dtype=torch.float32), tokens.new_empty(n)
    top_ids, top_logprobs = tokens.new_empty(n, top), hidden.new_empty(n, top, dtype=torch.float32)
    for rows, product in products(hidden, weight):
        if cap is not None and not wide:
            product.div_(cap).tanh_().mul_(cap)
        late, one = cap if wide else None, torch.ones(len(product), device=hidden.device)
        seen = pass_over(product, late, one, native=native)
        total = seen.total[:, None]
        best, ids = _best(product, top)
        argmax[rows], top_ids[rows] = seen.argmax, ids
        top_logprobs[rows] = scaled_logits(best, late, one) - total
        logprob[rows] = (scaled_logits(product.gather(-1, tokens[rows, None]), late, one) - total)[:, 0]
    return Judged(logprob, argmax, top_ids, top_logprobs)


def _best(product: Float[Tensor, "rows vocab"], top: int) -> tuple[Float[Tensor, "rows top"], Int[Tensor, "rows top"]]:
    """The `top` largest products of each row, best first, and of equal ones the lowest token first."""
    best, ids = product.topk(top, dim=-1)
    ids, order = ids.sort(dim=-1)
    best, by_size = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(-1, by_size)
