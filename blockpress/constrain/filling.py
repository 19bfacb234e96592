"""The automaton of a canvas that holds a hole: what stands before it, the hole and its seams, and what stands after it.

    tokens    b b b | h ... h w w | a a a a | E E E        b, a: given tokens, one state each
    region            literal, hole, literal               bytes: a token may lie across a seam
    end                                      stop          only stop ids follow: the text ends here
                                             cut           the canvas ends inside of what stands after
                                             free          anything may follow: there are more holes
                                             open          the canvas ends inside of the hole

A hole may be of any length, so the posterior sums over all places that the text after it may take. Stop ids at the end
make the length of a hole unambiguous; before what is cut or free, a hole ends where the text after it first stands.

Invariant: deterministic; its texts are those of the region between the given tokens, in any cut into tokens.
Run it:  python -m pytest tests/constrain/test_filling.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Int, Int32

from blockpress.constrain.automaton import ANY_CHAR, DEAD, Bytes, Concat, Expression, Repeat
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.tokens import FAR, TokenAutomaton, TokenBytes, _distances, lift

Ints = Int[np.ndarray, " _"]
End = Literal["stop", "cut", "free", "open"]
ANY_TEXT = Repeat(ANY_CHAR, 0, None)


def region(before: bytes, hole: Expression, after: bytes, vocabulary: TokenBytes) -> TokenAutomaton:
    """Over tokens: these bytes, a text of the hole, those bytes. Raises as `compile_expression`."""
    parts = (_bytes(before), hole, _bytes(after))
    return lift(compile_expression(Concat(parts)), vocabulary)


def _bytes(text: bytes) -> Expression:
    return Concat(tuple(Bytes(byte, byte) for byte in text))


@final
@dataclass(frozen=True, eq=False)
class Filling:
    """The automaton of one canvas, which begins in the state `start`. first, stop: its states in the region."""

    automaton: TokenAutomaton
    start: int
    first: int
    stop: int

    def split(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of the region, and the state of the region before each of them and after the last."""
        states = [self.start]
        for token in tokens:
            states.append(self.automaton.step(states[-1], token))
        within = [i for i, each in enumerate(states) if self.first <= each < self.stop]
        return list(tokens[within[0] : within[-1]]), [states[i] - self.first for i in within]


def filling(
    middle: TokenAutomaton,
    start: int,
    before: Sequence[int],
    after: Sequence[int],
    end: End,
    stop_ids: Collection[int],
    least: int = 0,
) -> Filling:
    """The automaton of a canvas.

    Args:
        middle: of the region. start: its state before this canvas.
        least: how many tokens of `after` a canvas must hold that ends inside of it; for a canvas that ends inside of
            the hole, how many more the region may need then.
    """
    class_of, source, label, target = _with_own_classes(middle, [*before, *after, *stop_ids], end == "free")
    first = len(before)
    source, target = source + first, target + first
    stop = first + len(middle.accepting)
    last = stop + len(after)  # the state after the last given token, or the first that follows the region
    accepting = np.zeros(last + 1, bool)
    ends = np.nonzero(middle.accepting)[0] + first
    edges: list[tuple[int, int, int]] = []
    for place, token in enumerate(before):
        edges.append((place, int(class_of[token]), place + 1 if place + 1 < first else first + start))
    labels = np.unique(class_of[class_of != DEAD]).tolist()
    if after:
        leads = [int(class_of[after[0]])]
        edges += [(state, leads[0], stop) for state in ends.tolist()]
        edges += [(stop + i, int(class_of[token]), stop + i + 1) for i, token in enumerate(after[1:])]
        done = [last - 1]
    else:
        leads, done = labels if end == "free" else [], ends.tolist()
    taken = np.isin(source, ends) & np.isin(label, leads)
    source, label, target = source[~taken], label[~taken], target[~taken]
    if end == "stop":
        stops = {int(class_of[token]) for token in stop_ids}
        edges += [(state, each, last) for state in [*done, last] for each in stops]
        accepting[[*done, last]] = True
    elif end == "free":
        edges += [(state, each, last) for state in [*done, last] for each in labels]
        accepting[[*done, last]] = True
    elif end == "open":
        accepting[first:stop] = middle.distance <= least
    else:
        accepting[stop + least - 1 : last] = True
    extra = np.array(edges, np.int64).reshape(-1, 3)
    source, label, target = (np.concatenate(pair) for pair in zip((source, label, target), extra.T, strict=True))
    distance = _distances(source, target, accepting)
    alive = (distance[source] < FAR) & (distance[target] < FAR)
    order = np.lexsort((label[alive], source[alive]))
    source, label, target = source[alive][order], label[alive][order], target[alive][order]
    free = np.zeros(len(accepting), bool)
    automaton = TokenAutomaton(class_of, source, label, target, accepting, distance, free)
    return Filling(automaton, 0 if before else start, first, stop)


def _with_own_classes(
    middle: TokenAutomaton, tokens: Sequence[int], every: bool
) -> tuple[Int32[np.ndarray, " vocab"], Ints, Ints, Ints]:
    """Classes and edges of the region once each of `tokens` has its own class. every: other tokens have one, too."""
    given, count = sorted(set(tokens)), middle.num_classes
    class_of = middle.class_of.astype(np.int64)
    old = class_of[given]
    class_of[given] = count + np.arange(len(given))
    if every:
        class_of[class_of == DEAD] = count + len(given)
    used = np.unique(class_of[class_of != DEAD])
    keep = np.isin(middle.label, used)
    parts = [(middle.source[keep], middle.label[keep], middle.target[keep])]
    for number, label in enumerate(old.tolist()):
        same = middle.label == label if label != DEAD else np.zeros(len(middle.label), bool)
        parts.append((middle.source[same], np.full(same.sum(), count + number), middle.target[same]))
    source, label, target = (np.concatenate([part[i] for part in parts]) for i in range(3))
    known = class_of != DEAD
    class_of[known] = np.searchsorted(used, class_of[known])
    return class_of.astype(np.int32), source, np.searchsorted(used, label), target
