"""The products of the head, a block of rows at a time, and which version reads them.

    rows of hidden --head--> products [block, vocab] in one buffer --block_stats--> `BlockStats`

A block has at most BUFFER bytes, whatever the vocabulary, and all blocks of a call share one buffer. Larger blocks read
the head less often; at 256 rows of bfloat16 the product is bound by arithmetic.

Invariant: a row's result does not depend on its block, nor on the other rows in it.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from blockpress.costs import PRODUCTS
from blockpress.ops import linear
from blockpress.ops.cpu import bridge
from blockpress.ops.cpu import products as in_cpp
from blockpress.ops.linear import lookup
from blockpress.ops.nucleus import Truncation
from blockpress.ops.packed import HalfFloats
from blockpress.ops.vocabulary import native as in_native
from blockpress.ops.vocabulary import passes, plain
from blockpress.ops.vocabulary.passes import BlockStats, Probabilities, Sparse, scaled_logits
from blockpress.ops.vocabulary.types import ClassBias, ClassStats, TokenClasses
from blockpress.ops.weight import Packed

BUFFER = PRODUCTS
"""Most bytes of products held at a time: 256 rows of 262,144 bfloat16."""

FEW = 1024
"""How many of a row's likeliest tokens are looked at for a truncated draw, before all are."""

LARGE = 1 << 22
"""Bytes from which a buffer gets large pages; with small ones, page faults take a third of the product's time."""


def products(
    hidden: Float[Tensor, "n hidden"], weight: Float[Tensor, "vocab hidden"] | Packed
) -> Iterator[tuple[slice, Float[Tensor, "rows vocab"]]]:
    """Blocks of `linear(hidden, weight)` of about the same size, with their rows; each overwrites the last one."""
    n, vocab = len(hidden), weight.shape[0]
    if not n:
        return
    most = max(1, BUFFER // (vocab * hidden.element_size()))
    step = math.ceil(n / math.ceil(n / most))
    buffer = _buffer(step, vocab, hidden)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, _multiply(hidden[rows], weight, buffer[: rows.stop - start])


@final
class Room:
    """Memory for the products of a canvas, kept from step to step: the faults of new pages take up to a third of the
    time that a product takes."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def take(self, rows: int, vocab: int, like: Tensor) -> Float[Tensor, "{rows} {vocab}"]:
        held, size = self._held, rows * vocab
        if held is None or held.numel() < size or (held.dtype, held.device) != (like.dtype, like.device):
            self._held = None  # not both at once
            self._held = held = _buffer(rows, vocab, like).view(-1)
        return held[:size].view(rows, vocab)

    def clear(self) -> None:
        self._held = None


def all_products(
    hidden: Float[Tensor, "n hidden"], weight: Float[Tensor, "vocab hidden"] | Packed, room: Room
) -> Float[Tensor, "n vocab"]:
    """`linear(hidden, weight)` of all rows at once: for what needs every position before it can finish one."""
    return _multiply(hidden, weight, room.take(len(hidden), weight.shape[0], hidden))


def _multiply(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    product: Float[Tensor, "rows vocab"],
) -> Float[Tensor, "rows vocab"]:
    readable = bridge.for_product(hidden, weight)
    if readable is not None:
        in_cpp.linear(hidden, readable, out=product)
    elif isinstance(weight, Tensor):
        linear.into(product, hidden, weight)
    else:
        for first, part in linear.products(hidden, weight):
            product[:, first : first + part.shape[1]] = part
    return product


def _buffer(rows: int, vocab: int, like: Tensor) -> Tensor:
    size = rows * vocab * like.element_size()
    if like.device.type != "cpu" or size < LARGE:
        return like.new_empty(rows, vocab)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(like.dtype).view(rows, vocab)  # numpy uses large pages


def block_stats(
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"] | None = None,
    probabilities: Probabilities = None,
    bias: ClassBias | None = None,
    *,
    native: bool = True,
) -> BlockStats:
    """`passes.block_stats`, in C++ where that is allowed and possible."""
    version = in_native.block_stats if native and in_native.supports(product) else passes.block_stats
    return version(product, cap, temperature, uniform, probabilities, bias)


def class_stats(
    product: Float[Tensor, "rows held"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    classes: TokenClasses,
    *,
    native: bool = True,
) -> ClassStats:
    """`passes.class_stats`, in C++ where that is allowed and possible."""
    version = in_native.class_stats if native and in_native.supports(product) else passes.class_stats
    return version(product, cap, temperature, classes)


def draw(
    product: Float[Tensor, "rows vocab"],
    cap: float | None,
    temperature: Float32[Tensor, " rows"],
    uniform: Float64[Tensor, " rows"],
    bias: ClassBias | None,
    truncation: Truncation,
    *,
    native: bool = True,
) -> Int[Tensor, " rows"]:
    """The sample of each row among the tokens that the truncation leaves; arguments as in `block_stats`. The products
    stay as they are.

    A row's FEW likeliest tokens are looked at, and all of them only where these do not hold all that may be drawn.
    """
    rows, vocab = product.shape
    total = None
    if bias is None and truncation.top_p < 1:
        total = block_stats(product, cap, temperature, native=native).total
    step = max(1, passes.AT_ONCE["cpu" if product.device.type == "cpu" else "other"] // vocab)
    drawn = torch.empty(rows, dtype=torch.int64, device=product.device)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        logits, heat, draws = product[chunk], temperature[chunk], uniform[chunk]
        sums = None if total is None else total[chunk]
        if bias is not None:
            logits = bias.rows(chunk).added(scaled_logits(logits, cap, heat))
            sums = logits.logsumexp(-1)
        falling, ids = logits.topk(min(FEW, vocab), dim=-1)
        own = falling if bias is not None else scaled_logits(falling, cap, heat)
        tokens, ready = _draw_of(own, ids, sums, draws, truncation)
        more = (~ready).nonzero()[:, 0]
        if len(more) and vocab > FEW:
            rest = logits[more] if bias is not None else scaled_logits(logits[more], cap, heat[more])
            tokens[more] = plain.sample(truncation(rest[None]), draws[None, more])[0]
        drawn[chunk] = tokens
    return drawn


def _draw_of(
    own: Float32[Tensor, "rows few"],
    ids: Int[Tensor, "rows few"],
    total: Float32[Tensor, " rows"] | None,
    uniform: Float64[Tensor, " rows"],
    truncation: Truncation,
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """The sample of each row among these of its tokens, and whether no other token could have been drawn."""
    ids, order = ids.sort(dim=-1, descending=True)
    falling, back = own.gather(1, order).sort(dim=-1, descending=True, stable=True)
    kept, ready = truncation.kept(falling, total)
    left = falling.masked_fill(~kept, float("-inf"))
    by_id = torch.empty_like(left).scatter_(1, back, left).flip(-1)
    place = plain.sample(by_id[None], uniform[None])[0]
    return ids.flip(-1).gather(1, place[:, None])[:, 0], ready


def combine_sparse(
    sparse: Sparse, weight: Float[Tensor, "vocab hidden"] | Packed, dtype: torch.dtype, *, native: bool = True
) -> Float[Tensor, "rows hidden"]:
    """The sum of embedding rows, weighted by each row's sparse probabilities; 0 for a row of count -1."""
    floats = weight.values if isinstance(weight, HalfFloats) else weight
    if native and isinstance(floats, Tensor) and in_native.supports(floats):
        return in_native.combine_sparse(sparse, floats).to(dtype)
    most, hidden, device = sparse.ids.shape[1], weight.shape[1], sparse.ids.device
    held = torch.arange(most, device=device) < sparse.counts[:, None]
    shares, ids = sparse.shares.masked_fill(~held, 0), sparse.ids.masked_fill(~held, 0)
    step = max(1, passes.AT_ONCE["cpu" if device.type == "cpu" else "other"] // (most * hidden))
    parts = [
        (lookup(ids[at : at + step], weight, dtype).float() * shares[at : at + step, :, None]).sum(1)
        for at in range(0, len(ids), step)
    ]
    return torch.cat(parts).to(dtype)
