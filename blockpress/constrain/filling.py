"""The automaton of a canvas that holds a hole: what stands before it, the hole and its seams, and what stands after it.

    tokens    b b b | h ... h w w | a a a a | E E E        b, a: given tokens
    region            literal, hole, literal               bytes: a token may lie across a seam
    end                                      stop          only stop ids follow: the text ends here
                                             free          anything may follow: there are more holes

A hole may be of any length, so the posterior sums over all places that the text after it may take; and it may hold what
that text begins with, so a state is that of the region, if the hole goes on, with every place in the text after it that
has been reached, if the hole has ended. The text says which these are, so there are about as many as tokens:

    after = x y x z      text h x y x        the hole goes on, or ended before "x y x", or before the last "x"

Where a canvas is split: stop ids tell the end of `after`; what ends inside of `after` ends with the longest beginning
of it; before what is free, a hole ends where `after` first stands; a canvas that may be inside of its hole is.

Invariant: deterministic; its texts are those of the region between the given tokens, in any cut into tokens.
Run it:  python -m pytest tests/constrain/test_filling.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from jaxtyping import Bool, Int, Int32

from blockpress.constrain.automaton import ANY_CHAR, DEAD, Bytes, Concat, Expression, Repeat
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.tokens import FAR, TokenAutomaton, TokenBytes, _distances, _expand, lift

Ints = Int[np.ndarray, " _"]
Edges = tuple[Ints, Ints, Ints]
End = Literal["stop", "free"]
ANY_TEXT = Repeat(ANY_CHAR, 0, None)
MOST = 200_000
"""Most edges and places of the states in which a hole may have ended and go on; beyond them it ends where it may."""


def region(before: bytes, hole: Expression, after: bytes, vocabulary: TokenBytes) -> TokenAutomaton:
    """Over tokens: these bytes, a text of the hole, those bytes. Raises as `compile_expression`."""
    parts = (_bytes(before), hole, _bytes(after))
    return lift(compile_expression(Concat(parts)), vocabulary)


def _bytes(text: bytes) -> Expression:
    return Concat(tuple(Bytes(byte, byte) for byte in text))


@final
@dataclass(frozen=True, eq=False)
class Filling:
    """The automaton of one canvas, which begins in the state `start`; its region begins after `before` tokens.

    home: of each state, that of the region, or DEAD. places: how many tokens of `after`, `count` at most, have been
    read if the hole ends before them; of several numbers the largest, DEAD if it cannot have ended.
    """

    automaton: TokenAutomaton
    start: int
    before: int
    home: Ints
    places: Ints
    count: int
    end: End
    inside: bool

    def split(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of the region, and the state of the region before each of them and after the last."""
        states = [self.start]
        for token in tokens:
            states.append(self.automaton.step(states[-1], token))
        places, stop = self.places[states].tolist(), len(tokens)
        if not self.inside or self.home[states[-1]] == DEAD:
            ends = [i for i, place in enumerate(places) if place != DEAD]
            whole = [i for i in ends if self.end == "free" and places[i] == self.count]
            stop = (whole or ends[-1:] or [stop])[0]
            stop -= max(0, places[stop])
        return list(tokens[self.before : stop]), self.home[states[self.before : stop + 1]].tolist()


def filling(
    middle: TokenAutomaton,
    start: int,
    before: Sequence[int],
    after: Sequence[int],
    end: End,
    stop_ids: Collection[int],
    least: int | None = None,
    more: int | None = None,
) -> Filling:
    """The automaton of a canvas.

    Args:
        middle: of the region. start: its state before this canvas.
        end: what follows `after`. stop_ids: they end the text, so the hole has none of them.
        least: how many tokens of `after` a canvas must hold that ends inside of it; None: it holds all of them.
        more: how many tokens the region may need after a canvas that ends inside of it; None: no canvas does.
    """
    class_of, edges = _with_own_classes(middle, [*before, *after], stop_ids, end == "free")
    given = [int(class_of[token]) for token in after]
    states, ways = _readings(middle.accepting, edges, given, end == "free")
    last = len(states)  # the text has ended, or anything may follow; then the states before the tokens of `before`
    home, places = np.full((2, last + 1 + len(before)), DEAD)
    home[:last] = [each for each, _ in states]
    places[:last] = [max(each, default=DEAD) for _, each in states]
    labels = np.unique(class_of[[*stop_ids]] if end == "stop" else class_of[class_of != DEAD]).tolist()
    ways |= {(state, each): last for state in [*np.nonzero(places == len(after))[0].tolist(), last] for each in labels}
    accepting = places >= (len(after) if least is None else least)
    accepting[last] = True
    if more is not None:
        accepting |= (home != DEAD) & (middle.distance[home] <= more)
    for place, token in enumerate(before, last + 1):
        ways[place, int(class_of[token])] = place + 1 if place + 1 < len(home) else start
    source, label, target = _with_ways(edges, home, len(middle.accepting), ways)
    distance = _distances(source, target, accepting)
    alive = (distance[source] < FAR) & (distance[target] < FAR)
    edges, free = (source[alive], label[alive], target[alive]), np.zeros(len(home), bool)
    automaton = TokenAutomaton(class_of, *edges, accepting, distance, free)
    return Filling(
        automaton, last + 1 if before else start, len(before), home, places, len(after), end, more is not None
    )


def _readings(
    accepting: Bool[np.ndarray, " states"], edges: Edges, given: Sequence[int], free: bool, once: bool = False
) -> tuple[list[tuple[int, tuple[int, ...]]], dict[tuple[int, int], int]]:
    """The states of a text of which it is open whether the hole has ended, and the ways (state, class) to the next one.

    A state is that of the region, DEAD if the hole must have ended, and how many classes of `given` have been read
    after each place where the hole may have ended. Those of the region alone come first. free: all is said where
    `given` has been read. once: a hole ends where `given` may begin.
    """
    source, label, target = edges
    of_given = np.isin(label, given)
    keys = zip(source[of_given].tolist(), label[of_given].tolist(), strict=True)
    known = dict(zip(keys, target[of_given].tolist(), strict=True))
    here = [*((0,) if each else () for each in accepting.tolist()), ()]  # the last of DEAD
    sizes, size = np.bincount(source, minlength=len(here)).tolist(), 0
    states: list[tuple[int, tuple[int, ...]]] = list(enumerate(here[:-1]))
    numbers, ways = dict[tuple[int, tuple[int, ...]], int](), dict[tuple[int, int], int]()
    for number, (home, places) in enumerate(states):  # which grows
        reached = dict[int, list[int]]()
        for place in places:
            if place < len(given):
                reached.setdefault(given[place], []).append(place + 1)
        for each, ahead in reached.items():
            whole = free and ahead[0] == len(given)
            goes_on = DEAD if whole or once else known.get((home, each), DEAD)
            state = goes_on, (len(given),) if whole else (*ahead, *here[goes_on])
            if state not in numbers:
                size += sizes[goes_on] + len(ahead)
                if size > MOST and not once:
                    return _readings(accepting, edges, given, free, once=True)
                numbers[state] = len(states)
                states.append(state)
            ways[number, each] = numbers[state]
    return states, ways


def _with_ways(edges: Edges, home: Ints, regions: int, ways: dict[tuple[int, int], int]) -> Edges:
    """In order: the edges of each state's `home`, if any, but where `ways` (state, class) lead elsewhere."""
    source, label, target = edges
    starts = np.searchsorted(source, np.arange(regions + 2))
    state, edge = _expand(starts, np.where(home == DEAD, regions, home))
    extra = np.array([(*way, to) for way, to in ways.items()], np.int64).reshape(-1, 3).T
    classes = int(max(label.max(initial=0), extra[1].max(initial=0))) + 1
    kept = ~np.isin(state * classes + label[edge], extra[0] * classes + extra[1])
    own = state[kept], label[edge[kept]], target[edge[kept]]
    source, label, target = (np.concatenate(pair) for pair in zip(own, extra, strict=True))
    order = np.lexsort((label, source))
    return source[order], label[order], target[order]


def _with_own_classes(
    middle: TokenAutomaton, given: Collection[int], stop_ids: Collection[int], every: bool
) -> tuple[Int32[np.ndarray, " vocab"], Edges]:
    """Classes and edges of the region, in order, once each of these tokens has its own class; stop ids have no edge.

    every: tokens that the region has not have a class, too.
    """
    own, count = sorted({*given, *stop_ids}), middle.num_classes
    class_of = middle.class_of.astype(np.int64)
    old = class_of[own]
    class_of[own] = count + np.arange(len(own))
    if every:
        class_of[class_of == DEAD] = count + len(own)
    used = np.unique(class_of[class_of != DEAD])
    keep = np.isin(middle.label, used)
    parts = [(middle.source[keep], middle.label[keep], middle.target[keep])]
    for number, (token, label) in enumerate(zip(own, old.tolist(), strict=True)):
        same = (middle.label == label) & (label != DEAD and token not in stop_ids)
        parts.append((middle.source[same], np.full(same.sum(), count + number), middle.target[same]))
    source, label, target = (np.concatenate([part[i] for part in parts]) for i in range(3))
    label, known = np.searchsorted(used, label), class_of != DEAD
    class_of[known] = np.searchsorted(used, class_of[known])
    order = np.lexsort((label, source))
    return class_of.astype(np.int32), (source[order], label[order], target[order])
