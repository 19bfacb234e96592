"""Everything that a denoising step needs from the vocabulary, from hidden states.

    hidden [n, hidden] --head, a block of rows--> products [block, vocab] in the weight's dtype
                       --cap, temperature, banned--> argmax, sample, entropy --softmax--> signal

Invariant: a row's results are those of the reference: full logits through `plain.sample`, `plain.entropy` and
`Network.soft_embedding`, rounded where they round; only a block of products exists at a time.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from blockpress.ops import kernels
from blockpress.ops.linear import combine
from blockpress.ops.nucleus import Truncation
from blockpress.ops.vocabulary import blocks, fused
from blockpress.ops.vocabulary.blocks import block_stats, combine_sparse, draw, products
from blockpress.ops.vocabulary.changes import LogitChanges
from blockpress.ops.vocabulary.passes import BlockStats, Probabilities
from blockpress.ops.vocabulary.types import BannedTokens, SampleStats, SignalKind
from blockpress.ops.weight import Packed


@torch.no_grad()
def sample_from_hidden(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    *,
    cap: float | None,
    temperature: Float32[Tensor, " n"],
    uniform: Float64[Tensor, " n"],
    scale: Float[Tensor, ""],
    signal: SignalKind = "exact",
    banned: BannedTokens | None = None,
    changes: LogitChanges | None = None,
    truncation: Truncation | None = None,
    native: bool = True,
) -> SampleStats:
    """Argmax, sample, entropy (nats) and next self-conditioning embedding of n >= 0 positions, of any requests.

    Args:
        hidden: after the final norm.
        weight: the head, which is also the embedding matrix.
        cap: the softcap of the logits, in float32; None: no cap.
        temperature: of each position.
        uniform: 0 <= u < 1 for each position; the sample is the inverse CDF at u.
        scale: sqrt(hidden) in the weight's dtype, the factor of the embedding (`Network.embed_scale`).
        signal: the self-conditioning embedding: "exact", rounded as `Network.soft_embedding` rounds it; "sparse", from
            the likeliest tokens alone, which hold all but at most 2^-9 of the probability (it is not renormalised);
            None: not computed.
        banned: ids, and for each position which of them are banned.
        changes: edits of the logits of these positions, after `banned`; None: none.
        truncation: what the sample is cut down to; everything else is of all tokens. None: nothing is cut.
        native: whether the C++ version, or on a GPU the Triton version, may be used where there is one.
    """
    plain = changes is None and truncation is None
    if native and plain and hidden.is_cuda and isinstance(weight, Tensor) and len(hidden) and kernels.available():
        from blockpress.ops.kernels import vocabulary as in_triton

        return in_triton.sample_from_hidden(
            hidden, weight, cap=cap, temperature=temperature, uniform=uniform, scale=scale, signal=signal, banned=banned
        )
    if native and plain and signal != "sparse" and (readable := fused.readable(hidden, weight)) is not None:
        found = fused.sample_from_hidden(
            hidden, readable, cap=cap, temperature=temperature, uniform=uniform, mean=signal is not None, banned=banned
        )
        return found if found.signal is None else replace(found, signal=found.signal.mul_(scale))
    n = len(hidden)
    argmax, sample = torch.empty(2, n, dtype=torch.int64, device=hidden.device)
    entropy = torch.empty(n, dtype=torch.float32, device=hidden.device)
    embedded = None if signal is None else torch.empty_like(hidden)
    probabilities: Probabilities = "whole" if signal == "exact" else signal
    for rows, product in products(hidden, weight):
        if banned is not None:
            ids, where = banned
            product[:, ids] = product[:, ids].masked_fill(where[rows], float("-inf"))
        heat, draws = temperature[rows], uniform[rows]
        bias = None if changes is None else changes.rows(rows).of_products(product, cap, heat)
        drawn = None if truncation is None else draw(product, cap, heat, draws, bias, truncation, native=native)
        stats = block_stats(product, cap, heat, draws, probabilities, bias, native=native)
        assert stats.sample is not None
        argmax[rows], sample[rows], entropy[rows] = stats.argmax, stats.sample, stats.entropy
        if drawn is not None:
            sample[rows] = drawn
        if embedded is not None:
            embedded[rows] = soft_embedding(stats, weight, native=native) * scale
    return SampleStats(argmax, sample, entropy, embedded)


def soft_embedding(
    stats: BlockStats, weight: Float[Tensor, "vocab hidden"] | Packed, *, native: bool
) -> Float[Tensor, "rows hidden"]:
    """The expected embedding under each row's probabilities, in their dtype; may move their rows."""
    assert stats.probabilities is not None
    if stats.sparse is None:
        return _combined(stats.probabilities, weight)
    mean = combine_sparse(stats.sparse, weight, stats.probabilities.dtype, native=native)
    whole = (stats.sparse.counts < 0).nonzero()[:, 0]
    if len(whole):
        for place, row in enumerate(whole.tolist()):
            if place != row:  # closed up where they lie: a copy of all of them may be as large as the block
                stats.probabilities[place] = stats.probabilities[row]
        mean[whole] = _combined(stats.probabilities[: len(whole)], weight)
    return mean


def _combined(
    probabilities: Float[Tensor, "rows vocab"], weight: Float[Tensor, "vocab hidden"] | Packed
) -> Float[Tensor, "rows hidden"]:
    """`combine`, of as many rows at a time as a block of products has: more of them would not fit the caches."""
    step = max(1, blocks.BUFFER // (probabilities.shape[1] * probabilities.element_size()))
    return torch.cat([combine(part, weight) for part in probabilities.split(step)])
