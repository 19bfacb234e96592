"""A step's pass over the vocabulary for a canvas whose positions depend on each other: what a constraint needs.

    hidden [n, hidden] --head--> products [n, vocab] --class_stats--> mass and best token of each class and position
                       --condition--> bias of each class, path --products plus bias--> sample, entropy, signal

The condition needs every position before any can be finished, so the products of one canvas are held, in the weight's
dtype; its probabilities overwrite them, and the next step's products those (`Room`). Where the classes hold few tokens,
only the products of these are computed.

Invariant: results are those of full logits through `condition`; a canvas's bits do not depend on others.
Run it:  python -m pytest tests/ops/test_vocabulary_conditioned.py
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from blockpress.ops.linear import lookup
from blockpress.ops.nucleus import Truncation
from blockpress.ops.vocabulary.blocks import Room, all_products, block_stats, class_stats, draw
from blockpress.ops.vocabulary.changes import Condition, LogitChanges
from blockpress.ops.vocabulary.passes import Probabilities
from blockpress.ops.vocabulary.step import soft_embedding
from blockpress.ops.vocabulary.types import BannedTokens, ClassBias, SampleStats, SignalKind, TokenClasses
from blockpress.ops.weight import Packed


@torch.no_grad()
def sample_conditioned(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"] | Packed,
    *,
    classes: TokenClasses,
    condition: Condition,
    cap: float | None,
    temperature: Float32[Tensor, " n"],
    uniform: Float64[Tensor, " n"],
    scale: Float[Tensor, ""],
    signal: SignalKind = "exact",
    banned: BannedTokens | None = None,
    changes: LogitChanges | None = None,
    truncation: Truncation | None = None,
    native: bool = True,
    room: Room | None = None,
) -> SampleStats:
    """`sample_from_hidden` for the n > 0 positions of one canvas, of probabilities that `condition` biases.

    Args:
        classes: by which the condition tells tokens apart; those in none have probability 0.
        condition: what the positions are held to. The argmax is the best token of the class that it chooses.
        signal, banned, changes, truncation: as in `sample_from_hidden`. "exact" leaves out what is less than 2^-22 of a
            position's probability where the rest is held by few tokens. The condition is told of edited logits.
        room: memory that is kept for the next call; None: none is kept.
    """
    if classes.tokens is not None:
        weight = lookup(classes.tokens, weight, hidden.dtype)
        banned = banned and _among(classes.tokens, banned)
    product = all_products(hidden, weight, room or Room())
    if banned is not None:
        ids, where = banned
        product[:, ids] = product[:, ids].masked_fill(where, float("-inf"))
    parted = None if changes is None else changes.parted(classes)
    held = classes if parted is None else parted.parts
    stats = class_stats(product, cap, temperature, held, native=native)
    if parted is None:
        values, path = condition(stats)
        argmax = stats.token.gather(1, path[:, None])[:, 0]
    else:
        values, argmax = parted.condition(stats, parted.change(product, cap, temperature), condition)
    probabilities: Probabilities = "few" if signal == "exact" else signal
    bias = ClassBias(held, values)
    drawn = None if truncation is None else draw(product, cap, temperature, uniform, bias, truncation, native=native)
    seen = block_stats(product, cap, temperature, uniform, probabilities, bias, native=native)
    assert seen.sample is not None
    embedded = None if signal is None else soft_embedding(seen, weight, native=native) * scale
    sample = seen.sample if drawn is None else drawn
    if classes.tokens is not None:
        argmax, sample = classes.tokens[argmax], classes.tokens[sample]
    return SampleStats(argmax, sample, seen.entropy, embedded)


def _among(tokens: Int[Tensor, " held"], banned: BannedTokens) -> tuple[Int[Tensor, " left"], Bool[Tensor, "n left"]]:
    """Banned ids by their places among ascending tokens; those that are not among them are dropped."""
    ids, where = banned
    place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
    held = tokens[place] == ids
    return place[held], where[:, held]
