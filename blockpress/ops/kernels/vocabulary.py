"""What a step needs from the vocabulary, on a GPU: argmax, sample, entropy and the next signal, from hidden states.

    hidden --head.multiply--> product, records --head.choose--> argmax, sample, entropy
                              product --belief--> signal

Why: of 256 rows and 262,144 tokens the reference writes and reads 256 bytes a logit; this writes 2 and reads 2, and 4
more for the exact signal (in bfloat16). It is what `ops.vocabulary.see` is on a CPU.

    signal "exact"    rounded where the reference rounds: logits, then probabilities, to the weight's type
           "sparse"   tokens of some probability alone; what is left out is below 2^-9 of a row's mass, and not shared
                      out among the rest; rows that are not so sure are exact

Rows are taken in blocks, so that the product never takes more than BLOCK bytes. Nothing waits for the host: a call can
be captured in a graph. The weight is a float tensor; a packed one takes the way of `ops.vocabulary`.

Invariant: a row's answer does not depend on the rows beside it but by the order of float32 sums.
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
    """Read the vocabulary at every row.

    Args:
        cap: of the softcap, None without one. temperature: what the capped logits are divided by.
        uniform: in [0, 1), one a row: where in the cumulative distribution the sample lies.
        scale: what the embedding is multiplied by, a scalar of the weight's type.
    """
    assert hidden.dtype == weight.dtype and hidden.is_contiguous() and weight.is_contiguous()
    n, vocab = hidden.shape[0], weight.shape[0]
    found = SampleStats(
        argmax=hidden.new_empty(n, dtype=torch.long),
        sample=hidden.new_empty(n, dtype=torch.long),
        entropy=hidden.new_empty(n, dtype=torch.float32),
        signal=None if signal is None else torch.empty_like(hidden),
    )
    tile_banned = None if banned is None or not len(banned[0]) else _by_tile(banned, vocab)
    step = max(1, BLOCK // (vocab * weight.element_size()))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        read = _read(hidden[rows], weight, cap, temperature[rows], rows, tile_banned, signal)
        _choose(read, uniform[rows], found.argmax[rows], found.sample[rows], found.entropy[rows])
        if found.signal is not None:
            believe = _sparse if signal == "sparse" else _dense
            believe(read, weight, scale, found.signal[rows])
    return found


TileBans = tuple[Int[Tensor, " ids"], Int[Tensor, " edges"], Bool[Tensor, "_all ids"]]


def _by_tile(banned: BannedTokens, vocab: int) -> TileBans:
    """The ids in order, where those of each tile begin and end, and the rows' denials in that order."""
    ids, order = banned[0].sort()
    starts = torch.arange(cdiv(vocab, head.TILE) + 1, device=ids.device) * head.TILE
    return ids.int(), torch.searchsorted(ids, starts.to(ids.dtype)).int(), banned[1][:, order]


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What the head left of a block of rows; `head.py` says what the records are."""

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
        """The cap as every kernel takes it."""
        return {"cap": self.cap or 1.0, "CAPPED": self.cap is not None}


def _read(
    hidden: Tensor,
    weight: Tensor,
    cap: float | None,
    temperature: Tensor,
    rows: slice,
    banned: TileBans | None,
    signal: SignalKind,
) -> _Read:
    """The product and its records."""
    n, (vocab, width) = len(hidden), weight.shape
    tiles = cdiv(vocab, head.TILE)
    records = weight.new_empty(4, n, tiles, dtype=torch.float32)
    sums = weight.new_empty(3, n, dtype=torch.float32)
    product = weight.new_empty(n, vocab)
    read = _Read(
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
    ids, edges, no = (
        (None, None, None) if banned is None else (*banned[:2], banned[2][rows].contiguous().view(torch.int8))
    )
    shape = head.launch_shape(n, weight.dtype)
    head.multiply[(cdiv(n, shape["ROWS"]), tiles)](
        hidden,
        weight,
        product,
        read.peak,
        read.best,
        read.rest,
        read.moment,
        read.coarse,
        read.temperature,
        ids,
        no,
        edges,
        n,
        vocab,
        width,
        0 if ids is None else len(ids),
        BANNED=ids is not None,
        COARSE=read.rounded,
        EVEN=width % shape["INNER"] == 0,
        TILE=head.TILE,
        **read.capped,
        **shape,
    )
    return read


def _choose(read: _Read, uniform: Tensor, argmax: Tensor, sample: Tensor, entropy: Tensor) -> None:
    """The rows' tokens and entropies, and the sums that the signal needs."""
    n, tiles = read.peak.shape
    head.sample_kernel[(n,)](
        read.product,
        read.peak,
        read.best,
        read.rest,
        read.moment,
        read.coarse,
        read.temperature,
        uniform.contiguous(),
        argmax,
        sample,
        entropy,
        read.highest,
        read.mass,
        read.rough,
        read.product.shape[1],
        tiles,
        COARSE=read.rounded,
        TILE=head.TILE,
        TILES=power(tiles),
        **read.capped,
        num_warps=8,
    )


def _dense(read: _Read, weight: Tensor, scale: Tensor, signal: Tensor) -> None:
    """The signal of all rows from all tokens."""
    n = len(signal)
    every = torch.arange(n, dtype=torch.int32, device=signal.device)
    _dense_rows(read, weight, scale, signal, every, torch.full((1,), n, dtype=torch.int32, device=signal.device))


def _dense_rows(read: _Read, weight: Tensor, scale: Tensor, signal: Tensor, order: Tensor, amount: Tensor) -> None:
    """The signal of the first `amount` rows of `order` from all tokens."""
    n, (vocab, width) = len(signal), weight.shape
    probabilities.softmax_weights[(n, cdiv(vocab, probabilities.SPAN))](
        read.product,
        order,
        amount,
        read.highest,
        read.rough,
        read.temperature,
        vocab,
        **read.capped,
        SPAN=probabilities.SPAN,
    )
    shape = probabilities.launch_shape(n, weight.dtype)
    blocks, columns = cdiv(n, shape["ROWS"]), cdiv(width, shape["COLUMNS"])
    stretches = probabilities.split_k(blocks * columns, _processors(weight.device))
    parts = weight.new_empty(stretches, n, width, dtype=torch.float32)
    even = vocab % shape["INNER"] == 0
    probabilities.multiply[(blocks, columns, stretches)](
        read.product, weight, parts, order, amount, n, vocab, width, EVEN=even, **shape
    )
    probabilities.reduce_split_k[(n, cdiv(width, probabilities.COLUMNS))](
        parts,
        signal,
        order,
        amount,
        scale,
        n,
        width,
        stretches,
        COLUMNS=probabilities.COLUMNS,
    )


def _sparse(read: _Read, weight: Tensor, scale: Tensor, signal: Tensor) -> None:
    """The signal from the likely tokens; of rows that have too many, from all."""
    n, (vocab, width) = len(signal), weight.shape
    chosen = signal.new_empty(n, probabilities.KEPT, dtype=torch.int32)
    share = signal.new_empty(n, probabilities.KEPT, dtype=torch.float32)
    kept = signal.new_empty(n, dtype=torch.int32)
    probabilities.select_top[(n,)](
        read.product,
        read.peak,
        read.rest,
        read.highest,
        read.mass,
        read.temperature,
        chosen,
        share,
        kept,
        vocab,
        read.peak.shape[1],
        least=probabilities.LEAST,
        dropped=probabilities.DROPPED,
        TILE=head.TILE,
        GROUP=probabilities.GROUP,
        KEPT=probabilities.KEPT,
        **read.capped,
        num_warps=8,
    )
    probabilities.weighted_sum[(n, cdiv(width, probabilities.COLUMNS))](
        chosen,
        share,
        kept,
        weight,
        signal,
        scale,
        width,
        KEPT=probabilities.KEPT,
        COLUMNS=probabilities.COLUMNS,
        AT_ONCE=16,
    )
    crowded = kept == 0
    order = crowded.int().argsort(descending=True, stable=True).int()
    _dense_rows(read, weight, scale, signal, order, crowded.sum(dtype=torch.int32)[None])


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where there is none, few, so that sums in several stretches are tested."""
    return multiprocessors(device) if device.type == "cuda" else 3
