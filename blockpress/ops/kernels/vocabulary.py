"""`ops.vocabulary.sample_from_hidden` on a GPU: argmax, sample, entropy and next self-conditioning embedding of a step.

    hidden --head.multiply--> product, records --head.sample_kernel--> argmax, sample, entropy
                              product --probabilities--> signal

Why: for 256 rows and 262,144 tokens the reference moves 256 bytes per logit; this writes 2 and reads 2, and 4 more for
the exact embedding (in bfloat16).

    signal "exact"    rounded where the reference rounds: logits, then probabilities, to the weight's type
           "sparse"   likely tokens alone; what is left out is below 2^-9 of a row's mass and is not renormalised; rows
                      that need too many tokens are exact

Rows are taken in blocks, so that the product never takes more than BLOCK bytes. Nothing waits for the host: a call can
be captured in a graph. The weight is a float tensor; packed ones go through the torch path of `ops.vocabulary`.

Invariant: a row's result does not depend on other rows, except through the order of float32 sums.
Run it:  TRITON_INTERPRET=1 python -m pytest tests/ops/kernels/test_vocabulary.py; make bench-gpu PART=vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from blockpress.hardware import multiprocessors
from blockpress.ops.kernels import head, probabilities
from blockpress.ops.kernels.jit import cdiv, power
from blockpress.ops.vocabulary.types import BannedTokens, SampleStats, SignalKind

BLOCK = 1 << 29
"""Most bytes of the product: 1,024 rows of 262,144 tokens in bfloat16."""


def sample_from_hidden(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    *,
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"],
    banned: BannedTokens | None = None,
    signal: SignalKind = "exact",
    scale: Tensor,
) -> SampleStats:
    """Sample every row; entropies are in nats. See `ops.vocabulary.sample_from_hidden`.

    Args:
        cap: the softcap, None without one. temperature: the divisor of the capped logits.
        uniform: in [0, 1), one per row: the sample's position in the cumulative distribution.
        scale: the factor of the embedding, a scalar of the weight's type.
    """
    assert hidden.dtype == weight.dtype and hidden.is_contiguous() and weight.is_contiguous()
    n, vocab = hidden.shape[0], weight.shape[0]
    result = SampleStats(
        argmax=hidden.new_empty(n, dtype=torch.long),
        sample=hidden.new_empty(n, dtype=torch.long),
        entropy=hidden.new_empty(n, dtype=torch.float32),
        signal=None if signal is None else torch.empty_like(hidden),
    )
    tile_banned = None if banned is None or not len(banned[0]) else _by_tile(banned, vocab)
    step = max(1, BLOCK // (vocab * weight.element_size()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block = _read(hidden[rows], weight, cap, temperature[rows], rows, tile_banned, signal)
        _choose(block, uniform[rows], result.argmax[rows], result.sample[rows], result.entropy[rows])
        if result.signal is not None:
            embed = _sparse if signal == "sparse" else _dense
            embed(block, weight, scale, result.signal[rows])
    return result


TileBans = tuple[Int[Tensor, " ids"], Int[Tensor, " edges"], Bool[Tensor, "_all ids"]]


def _by_tile(banned: BannedTokens, vocab: int) -> TileBans:
    """The ids sorted, the range of each tile's ids, and each row's bans in that order."""
    ids, order = banned[0].sort()
    starts = torch.arange(cdiv(vocab, head.TILE) + 1, device=ids.device) * head.TILE
    return ids.int(), torch.searchsorted(ids, starts.to(ids.dtype)).int(), banned[1][:, order]


@dataclass(frozen=True, kw_only=True)
class _HeadOutput:
    """The head's output for a block of rows; `head.py` describes the records."""

    product: Float[Tensor, "rows vocab"]
    peak: Float32[Tensor, "rows tiles"]
    best: Int[Tensor, "rows tiles"]
    rest: Float32[Tensor, "rows tiles"]
    moment: Float32[Tensor, "rows tiles"]
    coarse: Float32[Tensor, "rows tiles"]
    highest: Float32[Tensor, " rows"]
    mass: Float32[Tensor, " rows"]
    rough: Float32[Tensor, " rows"]
    temperature: Float32[Tensor, " rows"]
    cap: float | None
    rounded: bool

    @property
    def capped(self) -> dict[str, object]:
        """The cap as kernel arguments."""
        return {"cap": self.cap or 1.0, "CAPPED": self.cap is not None}


def _read(
    hidden: Tensor,
    weight: Tensor,
    cap: float | None,
    temperature: Tensor,
    rows: slice,
    banned: TileBans | None,
    signal: SignalKind,
) -> _HeadOutput:
    """The product and its records."""
    n, (vocab, width) = len(hidden), weight.shape
    tiles = cdiv(vocab, head.TILE)
    records = weight.new_empty(4, n, tiles, dtype=torch.float32)
    sums = weight.new_empty(3, n, dtype=torch.float32)
    product = weight.new_empty(n, vocab)
    block = _HeadOutput(
        product=product,
        peak=records[0],
        best=weight.new_empty(n, tiles, dtype=torch.int32),
        rest=records[1],
        moment=records[2],
        coarse=records[3],
        highest=sums[0],
        mass=sums[1],
        rough=sums[2],
        temperature=temperature.contiguous(),
        cap=cap,
        rounded=signal is not None,
    )
    ids, edges, bans = (
        (None, None, None) if banned is None else (*banned[:2], banned[2][rows].contiguous().view(torch.int8))
    )
    shape = head.launch_shape(n, weight.dtype)
    head.multiply[(cdiv(n, shape["ROWS"]), tiles)](
        hidden,
        weight,
        product,
        block.peak,
        block.best,
        block.rest,
        block.moment,
        block.coarse,
        block.temperature,
        ids,
        bans,
        edges,
        n,
        vocab,
        width,
        0 if ids is None else len(ids),
        BANNED=ids is not None,
        COARSE=block.rounded,
        EVEN=width % shape["INNER"] == 0,
        TILE=head.TILE,
        **block.capped,
        **shape,
    )
    return block


def _choose(block: _HeadOutput, uniform: Tensor, argmax: Tensor, sample: Tensor, entropy: Tensor) -> None:
    """The rows' tokens and entropies, and the sums that the soft embedding needs."""
    n, tiles = block.peak.shape
    head.sample_kernel[(n,)](
        block.product,
        block.peak,
        block.best,
        block.rest,
        block.moment,
        block.coarse,
        block.temperature,
        uniform.contiguous(),
        argmax,
        sample,
        entropy,
        block.highest,
        block.mass,
        block.rough,
        block.product.shape[1],
        tiles,
        COARSE=block.rounded,
        TILE=head.TILE,
        TILES=power(tiles),
        **block.capped,
        num_warps=8,
    )


def _dense(block: _HeadOutput, weight: Tensor, scale: Tensor, signal: Tensor) -> None:
    """The soft embedding of all rows, from all tokens."""
    n = len(signal)
    all_rows = torch.arange(n, dtype=torch.int32, device=signal.device)
    _dense_rows(block, weight, scale, signal, all_rows, torch.full((1,), n, dtype=torch.int32, device=signal.device))


def _dense_rows(
    block: _HeadOutput, weight: Tensor, scale: Tensor, signal: Tensor, order: Tensor, amount: Tensor
) -> None:
    """The soft embedding of the first `amount` rows of `order`, from all tokens."""
    n, (vocab, width) = len(signal), weight.shape
    probabilities.softmax_weights[(n, cdiv(vocab, probabilities.SPAN))](
        block.product,
        order,
        amount,
        block.highest,
        block.rough,
        block.temperature,
        vocab,
        **block.capped,
        SPAN=probabilities.SPAN,
    )
    shape = probabilities.launch_shape(n, weight.dtype)
    blocks, columns = cdiv(n, shape["ROWS"]), cdiv(width, shape["COLUMNS"])
    splits = probabilities.split_k(blocks * columns, _processors(weight.device))
    parts = weight.new_empty(splits, n, width, dtype=torch.float32)
    even = vocab % shape["INNER"] == 0
    probabilities.multiply[(blocks, columns, splits)](
        block.product, weight, parts, order, amount, n, vocab, width, EVEN=even, **shape
    )
    probabilities.reduce_split_k[(n, cdiv(width, probabilities.COLUMNS))](
        parts,
        signal,
        order,
        amount,
        scale,
        n,
        width,
        splits,
        COLUMNS=probabilities.COLUMNS,
    )


def _sparse(block: _HeadOutput, weight: Tensor, scale: Tensor, signal: Tensor) -> None:
    """The soft embedding from the likely tokens; for rows with too many of them, from all tokens."""
    n, (vocab, width) = len(signal), weight.shape
    chosen = signal.new_empty(n, probabilities.KEPT, dtype=torch.int32)
    share = signal.new_empty(n, probabilities.KEPT, dtype=torch.float32)
    counts = signal.new_empty(n, dtype=torch.int32)
    probabilities.select_top[(n,)](
        block.product,
        block.peak,
        block.rest,
        block.highest,
        block.mass,
        block.temperature,
        chosen,
        share,
        counts,
        vocab,
        block.peak.shape[1],
        least=probabilities.LEAST,
        dropped=probabilities.DROPPED,
        TILE=head.TILE,
        GROUP=probabilities.GROUP,
        KEPT=probabilities.KEPT,
        **block.capped,
        num_warps=8,
    )
    probabilities.weighted_sum[(n, cdiv(width, probabilities.COLUMNS))](
        chosen,
        share,
        counts,
        weight,
        signal,
        scale,
        width,
        KEPT=probabilities.KEPT,
        COLUMNS=probabilities.COLUMNS,
        AT_ONCE=16,
    )
    crowded = counts == 0
    order = crowded.int().argsort(descending=True, stable=True).int()
    _dense_rows(block, weight, scale, signal, order, crowded.sum(dtype=torch.int32)[None])


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that sums over several splits are tested."""
    return multiprocessors(device) if device.type == "cuda" else 3
