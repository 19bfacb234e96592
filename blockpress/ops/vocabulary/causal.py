"""Logprobs of given tokens, and greedy tokens, from hidden states: of the causal pass, or of a canvas's places.

    products of a block --softcap--> log of the sum of exp --> logprobs of the given tokens and of the likeliest
                        --banned ones removed-->     greedy

Invariant: the logprobs of a row are log_softmax of `Network.logits` in float32; only a block of products exists at a
time.
Run it:  python -m pytest tests/ops/test_vocabulary_causal.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from blockpress.ops.vocabulary.blocks import block_stats, products
from blockpress.ops.vocabulary.changes import LogitChanges
from blockpress.ops.vocabulary.passes import scaled_logits
from blockpress.ops.vocabulary.types import BannedTokens
from blockpress.ops.weight import Packed


@dataclass(frozen=True)
class Logprobs:
    """Logprobs of n positions: of the given tokens, of the greedy ones, and of the `top` likeliest."""

    target: Float32[Tensor, " n"]
    greedy: Float32[Tensor, " n"]
    top_ids: Int[Tensor, "n top"]
    top: Float32[Tensor, "n top"]


@dataclass(frozen=True)
class TargetScores:
    """Per position the likeliest token that is not banned, and the logprobs where they were requested."""

    greedy: Int[Tensor, " n"]
    logprobs: Logprobs | None


@torch.no_grad()
def score_targets(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    *,
    cap: float | None,
    tokens: Int[Tensor, " n"],
    top: int | None,
    wide: bool,
    banned: BannedTokens | None = None,
    forbid: Callable[[slice, Float[Tensor, "rows vocab"]], None] | None = None,
    native: bool = True,
) -> TargetScores:
    """Greedy tokens of n >= 0 positions, and logprobs at temperature 1 of these, of `tokens` and of the likeliest.

    Args:
        hidden: after the final norm; row i is the state that predicts tokens[i].
        cap: the softcap of the logits; None: no cap.
        top: how many of the likeliest tokens to return, best first; None: no logprobs at all, which costs less.
        wide: whether the cap is computed in float32 (DiffusionGemma) or in the weight's dtype (Gemma 4).
        banned: ids, and for each position which of them cannot be its greedy token. Logprobs ignore it.
        forbid: sets the products of some positions to -inf where a token has probability 0, in logprobs too.
        native: whether the C++ version may be used where there is one.
    """
    n = len(hidden)
    greedy = tokens.new_empty(n)
    logprobs = None
    if top is not None:
        target, best_logprobs = hidden.new_empty(2, n, dtype=torch.float32)
        logprobs = Logprobs(
            target, best_logprobs, tokens.new_empty(n, top), hidden.new_empty(n, top, dtype=torch.float32)
        )
    for rows, product in products(hidden, weight):
        if forbid is not None:
            forbid(rows, product)
        if cap is not None and not wide:
            product.div_(cap).tanh_().mul_(cap)
        late_cap = cap if wide else None
        if logprobs is not None:
            temperature = torch.ones(len(product), dtype=torch.float32, device=hidden.device)
            total = block_stats(product, late_cap, temperature, native=native).total[:, None]
            values, logprobs.top_ids[rows] = _best(product, logprobs.top_ids.shape[1])
            logprobs.top[rows] = scaled_logits(values, late_cap, temperature) - total
            logprobs.target[rows] = (
                scaled_logits(product.gather(-1, tokens[rows, None]), late_cap, temperature) - total
            )[:, 0]
        if banned is not None:
            ids, where = banned
            product[:, ids] = product[:, ids].masked_fill(where[rows], float("-inf"))
        largest = product.max(-1, keepdim=True)
        greedy[rows] = largest.indices[:, 0]
        if logprobs is not None:
            logprobs.greedy[rows] = (scaled_logits(largest.values, late_cap, temperature) - total)[:, 0]
    return TargetScores(greedy, logprobs)


@dataclass(frozen=True)
class EditedScores:
    """Of n positions, where a row's logits are edited: the likeliest token after the edits with its logprob before
    them, and the logprobs of the given tokens after the edits."""

    greedy: Int[Tensor, " n"]
    greedy_logprobs: Float32[Tensor, " n"]
    target: Float32[Tensor, " n"]


@torch.no_grad()
def score_edited(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    changes: LogitChanges,
    *,
    cap: float | None,
    tokens: Int[Tensor, " n"],
    wide: bool,
    banned: BannedTokens | None = None,
    forbid: Callable[[slice, Float[Tensor, "rows vocab"]], None] | None = None,
) -> EditedScores:
    """What `score_targets` gives of positions whose logits are edited; its arguments. The edits follow `banned`."""
    parts = []
    for rows, product in products(hidden, weight):
        if forbid is not None:
            forbid(rows, product)
        if cap is not None and not wide:
            product.div_(cap).tanh_().mul_(cap)
        temperature = torch.ones(len(product), dtype=torch.float32, device=hidden.device)
        logits = scaled_logits(product, cap if wide else None, temperature)
        total, edited = logits.logsumexp(-1), logits
        if banned is not None:
            ids, where = banned
            edited = logits.clone()
            edited[:, ids] = edited[:, ids].masked_fill(where[rows], float("-inf"))
        edited = changes.rows(rows).added(edited, temperature)
        greedy = edited.argmax(-1)
        own, target = (x.gather(-1, at[:, None])[:, 0] for x, at in ((logits, greedy), (edited, tokens[rows])))
        parts.append((greedy, own - total, target - edited.logsumexp(-1)))
    return EditedScores(*(torch.cat(each) for each in zip(*parts, strict=True)))


@torch.no_grad()
def score_ids(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    ids: Int[Tensor, "n some"],
    *,
    cap: float | None,
    native: bool = True,
) -> Float32[Tensor, "n some"]:
    """Logprobs at temperature 1 of several tokens at each of n >= 0 positions of a canvas.

    Args:
        hidden: after the final norm.
        ids: the tokens of each position; they may repeat.
        cap: the softcap of the logits, in float32; None: no cap.
        native: whether the C++ version may be used where there is one.
    """
    scores = hidden.new_empty(ids.shape, dtype=torch.float32)
    for rows, product in products(hidden, weight):
        temperature = torch.ones(len(product), dtype=torch.float32, device=hidden.device)
        total = block_stats(product, cap, temperature, native=native).total
        scores[rows] = scaled_logits(product.gather(-1, ids[rows]), cap, temperature) - total[:, None]
    return scores


def _best(product: Float[Tensor, "rows vocab"], top: int) -> tuple[Float[Tensor, "rows top"], Int[Tensor, "rows top"]]:
    """The `top` largest products of each row, best first; ties in the order of their tokens.

    `topk` keeps any of the tokens that tie for the last place, other ones for another `top`.
    """
    best, ids = product.topk(top, dim=-1)
    if not top:
        return best, ids
    least = best[:, -1:]
    above, tied = product > least, product == least
    tied &= tied.cumsum(-1) <= top - above.sum(-1, keepdim=True)
    vocab = product.shape[-1]
    ids = torch.where(above | tied, torch.arange(vocab, device=product.device), vocab)
    ids = ids.topk(top, dim=-1, largest=False).values.sort(dim=-1).values.clamp(max=vocab - 1)  # NaN: none is above
    best, by_size = product.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(-1, by_size)
