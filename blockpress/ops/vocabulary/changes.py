"""Logits that are edited, token by token, before anything is computed from them: biases, bans and penalties.

    label     0 0 1 0 2 0 3 0 0       of each token: 0 unchanged, 1 banned, 2 + j the token ids[j]
    values    0  BANNED  d0  d1       at each position, what is added to the scaled logits of each label

What is added to ids[j] follows from its own logit, so positions and blocks of them are independent; the rest of the
step reads it as the bias of a class of tokens (`ClassBias`). What a constraint adds to its own classes is added to
these: classes that an edit parts are read as several, and joined for the constraint.

Invariant: a banned token has probability 0 beside any other one. It is not -inf: where all that may stand at a
position is banned, the likeliest of it does.
Run it:  python -m pytest tests/ops/test_vocabulary_changes.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from blockpress.ops.vocabulary.passes import scaled_logits
from blockpress.ops.vocabulary.types import ClassBias, ClassStats, TokenClasses

BANNED = -1e6
"""What is added to the logit of a banned token, or to its scaled logit if that is less."""

Condition = Callable[[ClassStats], tuple[Float32[Tensor, "n classes_and_one"], Int[Tensor, " n"]]]
"""From the classes' statistics at every position: the bias of each class, -inf last, and the class of the argmax."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalties:
    """What tokens lose for having been written. counts: how often each id stands in the answer before each position.
    seen: whether it stands there or in the prompt. presence, frequency, repetition: `config.LogitEdits`."""

    counts: Float32[Tensor, "n ids"]
    seen: Bool[Tensor, "n ids"]
    presence: float
    frequency: float
    repetition: float

    def __call__(self, own: Float32[Tensor, "n ids"], temperature: Float32[Tensor, "n 1"]) -> Float32[Tensor, "n ids"]:
        """The scaled logits of the ids after the penalties."""
        divided = torch.where(own < 0, own * self.repetition, own / self.repetition)
        lost = self.presence * (self.counts > 0) + self.frequency * self.counts
        return torch.where(self.seen, divided, own) - lost / temperature


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitChanges:
    """See above. bias: what is added to the logits of the ids, before the penalties. n: positions."""

    label: Int32[Tensor, " vocab"]
    ids: Int[Tensor, " ids"]
    bias: Float32[Tensor, " ids"]
    penalties: Penalties | None

    def rows(self, chosen: slice) -> LogitChanges:
        """Those of some of the positions."""
        lost = self.penalties
        if lost is None:
            return self
        return replace(self, penalties=replace(lost, counts=lost.counts[chosen], seen=lost.seen[chosen]))

    def values(
        self, own: Float32[Tensor, "n ids"], temperature: Float32[Tensor, " n"]
    ) -> Float32[Tensor, "n labels_and_one"]:
        """What is added to the scaled logits of each label, and -inf last, given those of the ids."""
        heat = temperature[:, None]
        edited = own + self.bias / heat
        if self.penalties is not None:
            edited = self.penalties(edited, heat)
        change = (edited - own).masked_fill(own.isneginf(), 0.0)
        banned = (BANNED / heat).clamp(max=BANNED)
        return torch.cat((torch.zeros_like(heat), banned, change, torch.full_like(heat, -torch.inf)), dim=1)

    def added(
        self, scaled: Float32[Tensor, "n vocab"], temperature: Float32[Tensor, " n"]
    ) -> Float32[Tensor, "n vocab"]:
        """Scaled logits after the edits: the plain version."""
        return scaled + self.values(scaled[:, self.ids], temperature)[:, self.label]

    def of_products(
        self, product: Float[Tensor, "n vocab"], cap: float | None, temperature: Float32[Tensor, " n"]
    ) -> ClassBias:
        """The same as a bias, given the products of the head."""
        own = scaled_logits(product[:, self.ids], cap, temperature)
        none = self.ids.new_empty(0)
        labels = TokenClasses(None, self.label, none.int(), torch.zeros(len(self.ids) + 3, dtype=torch.int64))
        return ClassBias(labels, self.values(own, temperature))

    def parted(self, classes: TokenClasses) -> PartedClasses:
        """A constraint's classes, each parted by these labels."""
        count, labels = len(classes), len(self.ids) + 2
        class_of = classes.class_of.long()
        if classes.tokens is not None:
            class_of = torch.full_like(self.label, count).long().index_copy_(0, classes.tokens, class_of)
        pair = (class_of * labels + self.label).masked_fill(class_of == count, -1)
        used, part_of = pair.unique(return_inverse=True)
        spare = int(used[0] < 0)  # of the tokens that are in no class
        parts = TokenClasses.of((part_of - spare).cpu()).to(pair.device)
        used = used[spare:]
        return PartedClasses(self, parts, used // labels, used % labels, count)


@dataclass(frozen=True, eq=False)
class PartedClasses:
    """Classes of tokens that are alike for a constraint and for an edit. owner, label: the constraint's class of each,
    and the edit's label; count: how many classes the constraint has."""

    changes: LogitChanges
    parts: TokenClasses
    owner: Int[Tensor, " parts"]
    label: Int[Tensor, " parts"]
    count: int

    def change(
        self, product: Float[Tensor, "n held"], cap: float | None, temperature: Float32[Tensor, " n"]
    ) -> Float32[Tensor, "n parts"]:
        """What the edit adds to the scaled logits of each part, given the products of its tokens."""
        ids = self.changes.ids
        if self.parts.tokens is not None:  # an id that is not held has no part
            ids = torch.searchsorted(self.parts.tokens, ids).clamp(max=len(self.parts.tokens) - 1)
        own = scaled_logits(product[:, ids], cap, temperature)
        return self.changes.values(own, temperature)[:, self.label]

    def condition(
        self, stats: ClassStats, change: Float32[Tensor, "n parts"], condition: Condition
    ) -> tuple[Float32[Tensor, "n parts_and_one"], Int[Tensor, " n"]]:
        """The bias of each part, edit and constraint together, and the likeliest tokens, by places among the held.

        stats: of the parts, before the edit. condition: the constraint, told of its own classes after the edit.
        """
        shape = (len(change), self.count)
        owner = self.owner.expand(len(change), -1)
        mass, best = stats.mass + change, stats.best + change
        most = mass.new_full(shape, -torch.inf).scatter_reduce(1, owner, mass, "amax")
        finite = most.masked_fill(most.isneginf(), 0)
        sums = torch.zeros_like(most).scatter_add(1, owner, (mass - finite.gather(1, owner)).exp())
        highest = best.new_full(shape, -torch.inf).scatter_reduce(1, owner, best, "amax")
        values, path = condition(ClassStats(sums.log() + finite, highest, self.owner.new_zeros(shape)))
        place = best.masked_fill(owner != path[:, None], -torch.inf).argmax(1, keepdim=True)
        bias = torch.cat((values[:, self.owner] + change, values[:, -1:]), dim=1)
        return bias, stats.token.gather(1, place)[:, 0]
