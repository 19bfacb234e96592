"""Arguments and results of a step's pass over the vocabulary, on a processor and on a GPU alike.

They are a module of their own so that all versions, `step.py`, `conditioned.py` and `ops/kernels/vocabulary.py`, can
import them.

Invariant: no operation on logits here, and no import of another module of `ops`.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64
from torch import Tensor

from blockpress.ops.transfer import to_device

SignalKind = Literal["exact", "sparse"] | None
"""How the next self-conditioning embedding is computed: from all tokens, from the likeliest alone, or not at all."""

BannedTokens = tuple[Int[Tensor, " ids"], Bool[Tensor, "n ids"]]
"""Ids, and for each position which of them are banned."""


@dataclass(frozen=True)
class SampleStats:
    """A step's results for n positions: entropies in nats, and in `signal` the self-conditioning embedding in the
    hidden states' dtype, or None."""

    argmax: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    entropy: Float32[Tensor, " n"]
    signal: Float[Tensor, "n hidden"] | None

    @classmethod
    def joined(cls, parts: Sequence[SampleStats], order: Int[Tensor, " n"]) -> SampleStats:
        """Those of several passes, one after another and then in this order."""
        argmax, sample = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("argmax", "sample"))
        signals = [part.signal for part in parts if part.signal is not None]
        assert len(signals) in (0, len(parts)), "all have signals, or none has"
        entropy = torch.cat([part.entropy for part in parts])[order]
        return cls(argmax, sample, entropy, torch.cat(signals)[order] if signals else None)


COMPACT = 4
"""Where classes hold at most this part of the vocabulary, the logits of their tokens alone are computed."""


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Disjoint classes of tokens, none of which is empty.

    tokens: the tokens of all classes in ascending order, where they are few; None: the whole vocabulary. class_of: the
    class of each of them; the number of classes for those in none. members: the same class by class, each in ascending
    order, by their places in `tokens`; starts: where each class begins among them.
    """

    tokens: Int[Tensor, " held"] | None
    class_of: Int32[Tensor, " held"]
    members: Int32[Tensor, " members"]
    starts: Int64[Tensor, " classes_and_one"]

    @classmethod
    def of(cls, class_of: Int[Tensor, " vocab"]) -> TokenClasses:
        """From the class of every token, -1 for those in none.

        >>> classes = TokenClasses.of(torch.tensor([1, -1, 0, 1]))
        >>> classes.class_of.tolist(), classes.members.tolist(), classes.starts.tolist()
        ([1, 2, 0, 1], [2, 0, 3], [0, 1, 3])
        """
        tokens = (class_of >= 0).nonzero()[:, 0]
        few = len(tokens) * COMPACT <= len(class_of)
        held = class_of[tokens] if few else class_of
        count = int(class_of.max()) + 1 if len(tokens) else 0
        order = held.argsort(stable=True)[-len(tokens) :] if len(tokens) else tokens
        starts = torch.searchsorted(held[order].contiguous(), torch.arange(count + 1))
        return cls(
            tokens if few else None, held.masked_fill(held < 0, count).int().contiguous(), order.int(), starts.long()
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> TokenClasses:
        moved = (to_device(x, device) for x in (self.class_of, self.members, self.starts))
        return TokenClasses(None if self.tokens is None else to_device(self.tokens, device), *moved)


@dataclass(frozen=True)
class ClassStats:
    """Of each position and class of tokens: the log of the sum of exp of their scaled logits, the largest of these, and
    the first token that has it."""

    mass: Float64[Tensor, "n classes"]
    best: Float32[Tensor, "n classes"]
    token: Int[Tensor, "n classes"]


@dataclass(frozen=True, eq=False)
class ClassBias:
    """What is added to the scaled logits at each position, by the class of the token; -inf for tokens of no class."""

    classes: TokenClasses
    values: Float32[Tensor, "n classes_and_one"]

    def rows(self, chosen: slice) -> ClassBias:
        return ClassBias(self.classes, self.values[chosen])

    def added(self, scaled: Float32[Tensor, "n held"]) -> Float32[Tensor, "n held"]:
        return scaled + self.values[:, self.classes.class_of]
