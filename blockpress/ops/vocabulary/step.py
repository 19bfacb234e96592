"""Everything that a denoising step wants to know about the vocabulary, from hidden states.

    hidden [n, hidden] --head, a block of rows--> products [block, vocab] in the weight's dtype
                       --cap, temperature, banned--> argmax, sample, entropy --softmax--> signal

Invariant: what `see` gives for a row is what the truth gives: full logits through `plain.sample`, `plain.entropy` and
`Network.soft_embedding`, rounded where they round; only a block of products exists at a time.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from blockpress.ops import kernels
from blockpress.ops.linear import combine
from blockpress.ops.vocabulary.blocks import block_stats, combine_sparse, products
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
    native: bool = True,
) -> SampleStats:
    """Argmax, sample, entropy (nats) and the next signal of n positions, n >= 0, rows of any requests.

    Args:
        hidden: after the final norm.
        weight: the head, which is also the embedding that the signal is made of.
        cap: the softcap of the logits, in float32; None: none.
        temperature: of each position.
        uniform: 0 <= u < 1 for each position; the sample is the inverse CDF at it.
        scale: sqrt(hidden) in the weight's dtype, which the signal is multiplied by (`Network.embed_scale`).
        signal: "exact", as `Network.soft_embedding` rounds it; "sparse", of the likeliest tokens alone, which hold all
            but at most 2^-9 of the probability (it is not shared out among them); None: not wanted.
        banned: ids, and for each position which of them it must not take.
        native: whether the version in C++, or on a GPU that in Triton, may be used where there is one.
    """
    if native and hidden.is_cuda and isinstance(weight, Tensor) and len(hidden) and kernels.available():
        from blockpress.ops.kernels import vocabulary as in_triton

        return in_triton.sample_from_hidden(
            hidden, weight, cap=cap, temperature=temperature, uniform=uniform, scale=scale, signal=signal, banned=banned
        )
    n = len(hidden)
    argmax, sample = torch.empty(2, n, dtype=torch.int64, device=hidden.device)
    entropy = torch.empty(n, dtype=torch.float32, device=hidden.device)
    embedded = None if signal is None else torch.empty_like(hidden)
    belief: Probabilities = "whole" if signal == "exact" else signal
    for rows, product in products(hidden, weight):
        if banned is not None:
            ids, where = banned
            product[:, ids] = product[:, ids].masked_fill(where[rows], float("-inf"))
        seen = block_stats(product, cap, temperature[rows], uniform[rows], belief, native=native)
        assert seen.sample is not None
        argmax[rows], sample[rows], entropy[rows] = seen.argmax, seen.sample, seen.entropy
        if embedded is not None:
            embedded[rows] = soft_embedding(seen, weight, native=native) * scale
    return SampleStats(argmax, sample, entropy, embedded)


def soft_embedding(
    seen: BlockStats, weight: Float[Tensor, "vocab hidden"] | Packed, *, native: bool
) -> Float[Tensor, "rows hidden"]:
    """The mean row of the embedding under each row's belief, in the belief's dtype."""
    assert seen.probabilities is not None
    if seen.sparse is None:
        return combine(seen.probabilities, weight)
    mean = combine_sparse(seen.sparse, weight, seen.probabilities.dtype, native=native)
    whole = seen.sparse.counts < 0
    if bool(whole.all()):
        return combine(seen.probabilities, weight)
    if bool(whole.any()):
        mean[whole] = combine(seen.probabilities[whole], weight)
    return mean
