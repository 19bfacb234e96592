"""An automaton over bytes, lifted to a vocabulary: which tokens lead from which state to which.

    bytes     state 0 --"t"--> 1 --"r"--> 2 --"ue"--> ...        tokens     0 --" t", "t"--> 1   0 --"true"--> 4

Tokens that move every state alike are one class; a vocabulary of 262,144 has a few hundred of them for a usual schema.
Only classes are ever looked at afterwards.

Invariant: an edge exists exactly for the tokens whose bytes lead from its source to its target; states from which these
tokens reach no accepting state have none.
Run it:  python -m pytest tests/constrain/test_tokens.py
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32

from blockpress.constrain.automaton import DEAD, Automaton
from blockpress.errors import RequestError
from blockpress.ops.chain import ChainGraph, Groups
from blockpress.ops.vocabulary import TokenClasses

Ints = Int[np.ndarray, " _"]
MAX_WALKS = 4_000_000
"""How many (state, beginning of a token) pairs are walked at once: some 100 MB."""
MAX_EDGES = 64_000_000
"""Most (state, tokens of the same columns) pairs that lead somewhere: 24 bytes each, twice while they are joined."""
FIRST_LETTER = 0xF8
"""UTF-8 has no bytes from here on: in an automaton they are letters that stand for control tokens (`turns`)."""


class TokenBytes:
    """The bytes of every token. None: a token that writes no text, such as a control token.

    letters: the bytes from `FIRST_LETTER` on that stand for control tokens; no other token writes these.
    """

    def __init__(self, pieces: Sequence[bytes | None], letters: Mapping[int, int] | None = None) -> None:
        self.size = len(pieces)
        taken = [piece or b"" for piece in pieces]
        lengths = np.fromiter(map(len, taken), np.int64, len(taken))
        flat = np.frombuffer(b"".join(taken), np.uint8)
        through = np.append(0, np.cumsum(flat >= FIRST_LETTER))[np.append(0, np.cumsum(lengths))]
        lengths[np.diff(through) > 0] = 0
        for token, letter in (letters or {}).items():
            taken[token], lengths[token] = bytes([letter]), 1
        self.tokens = np.nonzero(lengths)[0]
        self.lengths = lengths[self.tokens]
        """Of the tokens that write text, and how many bytes each has."""
        self.bytes = np.zeros((len(self.tokens), int(self.lengths.max(initial=0))), np.uint8)
        filled = np.arange(self.bytes.shape[1]) < self.lengths[:, None]
        self.bytes[filled] = np.frombuffer(b"".join([taken[token] for token in self.tokens.tolist()]), np.uint8)

    def without(self, tokens: Collection[int]) -> TokenBytes:
        """Without the text of some tokens."""
        left = ~np.isin(self.tokens, list(tokens))
        if left.all():
            return self
        other = copy(self)
        other.tokens, other.lengths, other.bytes = self.tokens[left], self.lengths[left], self.bytes[left]
        return other


@dataclass(frozen=True)
class TrieLevel:
    """Beginnings of tokens of one length. column: the last column of each. The children of node n of the level before
    are first_child[n] to first_child[n + 1]. group: the number of the tokens that are the node itself, or DEAD."""

    column: Ints
    first_child: Ints
    group: Ints


def _trie(
    vocabulary: TokenBytes, columns: Int32[np.ndarray, "states columns"], column_of: Ints
) -> tuple[list[TrieLevel], Ints]:
    """The levels of a trie of the tokens, bytes replaced by their column, and the group of every row of the vocabulary.

    Tokens of the same columns are one group: no state tells them apart. Those of which a byte leads nowhere have none.
    """
    count, lives, width = len(vocabulary.tokens), (columns != DEAD).any(0), columns.shape[1]
    rows, node, group = np.arange(count), np.zeros(count, np.int64), np.full(count, DEAD)
    levels, parents, groups = [], 1, 0
    for depth in range(vocabulary.bytes.shape[1]):
        column = column_of[vocabulary.bytes[rows, depth]]
        alive = lives[column]
        rows = rows[alive]
        if not len(rows):
            break
        unique, node = _distinct(node[alive] * width + column[alive], parents * width)
        ends = vocabulary.lengths[rows] == depth + 1
        number = np.full(len(unique), DEAD)
        ending, _ = _distinct(node[ends], len(unique))
        number[ending] = groups + np.arange(len(ending))
        groups += len(ending)
        group[rows[ends]] = number[node[ends]]
        levels.append(TrieLevel(unique % width, np.searchsorted(unique // width, np.arange(parents + 1)), number))
        rows, node, parents = rows[~ends], node[~ends], len(unique)
    return levels, group


def _distinct(keys: Ints, below: int) -> tuple[Ints, Ints]:
    """The distinct keys in ascending order, 0 <= key < below, and of each key its place among them.

    Marked in a table where that is small, which takes a tenth of the time that sorting takes.
    """
    if below > max(1 << 24, 64 * len(keys)):
        unique, place = np.unique(keys, return_inverse=True)
        return unique, place
    marked = np.zeros(below, bool)
    marked[keys] = True
    return np.nonzero(marked)[0], (np.cumsum(marked, dtype=np.int64) - 1)[keys]


@dataclass(frozen=True, eq=False)
class Moves:
    """The edges of an automaton, those from one state to another joined to one move.

    graph: its labels are the sets of classes that some two states are joined by, most often far fewer than the edges.
    Many sets that differ in few classes are cut into blocks, which they share, and a move into one for each block.
    label, member: each set of classes, as (label, class) pairs; by_label and by_class: these in groups.
    """

    graph: ChainGraph
    label: Ints
    member: Ints
    by_label: Groups
    by_class: Groups

    @classmethod
    def of(cls, source: Ints, label: Ints, target: Ints, states: int, classes: int, block: int = 1 << 30) -> Moves:
        order = np.lexsort((label, target, source))
        source, label, target = (each[order].astype(np.int32) for each in (source, label, target))
        first = np.ones(len(source), bool)
        first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
        first[1:] |= np.diff(label // block) != 0
        starts = np.append(np.nonzero(first)[0], len(source))
        sets: dict[bytes, int] = {}
        of_move = [
            sets.setdefault(label[start:stop].tobytes(), len(sets))
            for start, stop in itertools.pairwise(starts.tolist())
        ]
        members = [np.frombuffer(each, np.int32) for each in sets]
        flat = np.concatenate([np.empty(0, np.int32), *members])
        owner = np.repeat(np.arange(len(sets)), [len(each) for each in members])
        graph = ChainGraph(source[first], np.array(of_move, np.int32), target[first], states, len(sets))
        return cls(graph, owner, flat, Groups.of(owner, len(sets)), Groups.of(flat, classes))


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Edges (source, class, target) between states; state 0 is the start.

    class_of: of each token, DEAD for those that no edge takes. accepting: where the text may end. distance: the fewest
    tokens from a state to an accepting one, `FAR` if there is no way. free: states in which any text may stand.
    """

    class_of: Int32[np.ndarray, " vocab"]
    source: Ints
    label: Ints
    target: Ints
    accepting: Bool[np.ndarray, " states"]
    distance: Ints
    free: Bool[np.ndarray, " states"]

    @property
    def num_classes(self) -> int:
        return int(self.class_of.max(initial=-1)) + 1

    @cached_property
    def _placed(self) -> dict[torch.device, TokenClasses]:
        host = torch.device("cpu")
        return {host: TokenClasses.of(torch.from_numpy(self.class_of))}

    def classes(self, device: torch.device) -> TokenClasses:
        """The classes of tokens, on a device."""
        if device not in self._placed:
            self._placed[device] = self._placed[torch.device("cpu")].to(device)
        return self._placed[device]

    def with_stops(self, stop_ids: Collection[int]) -> TokenAutomaton:
        """With a last state, in which stop ids end the text and after which only more of them come.

        A network is trained on answers that are padded with its stop id, so that every position after the end is
        evidence for it.
        """
        last, label = len(self.accepting), self.num_classes
        class_of = self.class_of.copy()
        class_of[sorted(stop_ids)] = label
        ends = np.append(np.nonzero(self.accepting)[0], last)
        source = np.concatenate((self.source, ends))
        labels = np.concatenate((self.label, np.full(len(ends), label)))
        target = np.concatenate((self.target, np.full(len(ends), last)))
        order = np.lexsort((labels, source))
        return TokenAutomaton(
            class_of,
            source[order],
            labels[order],
            target[order],
            np.append(self.accepting, True),
            np.append(self.distance, 0),
            np.append(self.free, False),
        )

    @cached_property
    def moves(self) -> Moves:
        edges = self.source, self.label, self.target, len(self.accepting), self.num_classes
        whole = Moves.of(*edges)
        if len(whole.member) <= 2 * len(whole.graph.source):
            return whole
        return min(whole, Moves.of(*edges, block=8), key=lambda each: 5 * len(each.member) + len(each.graph.source))

    @cached_property
    def entries(self) -> tuple[Ints, Ints]:
        """The labels that lead from free text to what is not free, and the one state that each leads to."""
        leads = self.free[self.source] & ~self.free[self.target]
        labels, first = np.unique(self.label[leads], return_index=True)
        targets = self.target[leads][first]
        others = np.isin(self.label, labels)
        place = np.searchsorted(labels, self.label[others])
        assert (targets[place] == self.target[others]).all(), "what leads out of free text leads to one state"
        return labels, targets

    @cached_property
    def _next(self) -> dict[tuple[int, int], int]:
        return dict(zip(zip(self.source.tolist(), self.label.tolist(), strict=True), self.target.tolist(), strict=True))

    def step(self, state: int, token: int) -> int:
        """The state after a token, or DEAD."""
        return self._next.get((state, int(self.class_of[token])), DEAD)


FAR = 1 << 40


def lift(automaton: Automaton, vocabulary: TokenBytes) -> TokenAutomaton:
    """The automaton over the vocabulary's tokens. If `distance[0]` is FAR, these cannot write any allowed text.

    Raises:
        RequestError: it has too many edges.
    """
    columns, column_of = np.unique(automaton.table, axis=1, return_inverse=True)
    levels, group_of = _trie(vocabulary, columns, column_of.ravel())
    parts, count = [], 0
    for part in _edges(columns, levels):
        parts.append(part)
        count += len(part[0])
        if count > MAX_EDGES:
            raise RequestError(
                f"the shape needs more than {MAX_EDGES} edges over tokens",
                hint="let texts, names and blanks stand at fewer places",
            )
    source, group, target = (np.concatenate([part[i] for part in parts]) for i in range(3))
    distance = _distances(source, target, automaton.accepting)
    alive = (distance[source] < FAR) & (distance[target] < FAR)
    source, group, target = source[alive], group[alive], target[alive]
    class_of_group, representative = _classes(source, group, target, int(group_of.max(initial=-1)) + 1, len(automaton))
    chosen = representative[class_of_group[group]] == group
    source, label, target = source[chosen], class_of_group[group[chosen]].astype(np.int64), target[chosen]
    order = np.lexsort((label, source))
    class_of = np.full(vocabulary.size, DEAD, np.int32)
    held = group_of != DEAD
    class_of[vocabulary.tokens[held]] = class_of_group[group_of[held]]
    free = (automaton.table[:, :FIRST_LETTER] == np.arange(len(automaton))[:, None]).all(1)
    return TokenAutomaton(class_of, source[order], label[order], target[order], automaton.accepting, distance, free)


def _edges(
    columns: Int32[np.ndarray, "states columns"], levels: Sequence[TrieLevel]
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """All (source, group, target), some states at a time."""
    yield (np.empty(0, np.int64),) * 3
    if not levels:
        return
    cost = ((columns[:, levels[0].column] != DEAD) * _sizes(levels)).sum(1) + 1
    through, start = np.cumsum(cost), 0
    while start < len(columns):
        walked = through[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(through, walked + MAX_WALKS)))
        yield from _walk(columns, levels, np.arange(start, min(stop, len(columns))))
        start = stop


def _sizes(levels: Sequence[TrieLevel]) -> Ints:
    """The number of nodes of the trie from each node of the first level on."""
    size = np.ones(len(levels[-1].column), np.int64)
    for level in reversed(levels[1:]):
        through = np.append(0, np.cumsum(size))
        size = 1 + through[level.first_child[1:]] - through[level.first_child[:-1]]
    return size


def _walk(
    columns: Int32[np.ndarray, "states columns"], levels: Sequence[TrieLevel], states: Ints
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """From these states down the trie, all living pairs of a level at once."""
    source, current, node = states, states, np.zeros(len(states), np.int64)
    for level in levels:
        pair, node = _expand(level.first_child, node)
        current = columns[current[pair], level.column[node]].astype(np.int64)
        alive = current != DEAD
        source, current, node = source[pair][alive], current[alive], node[alive]
        ends = level.group[node] != DEAD
        yield source[ends], level.group[node[ends]], current[ends]


def _expand(first: Ints, node: Ints) -> tuple[Ints, Ints]:
    """For every entry of `node` its range in a table of ranges: (index of the entry, place) pairs."""
    counts = first[node + 1] - first[node]
    index = np.repeat(np.arange(len(node)), counts)
    offset = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return index, first[node][index] + offset


def _classes(source: Ints, group: Ints, target: Ints, groups: int, states: int) -> tuple[Int32[np.ndarray, " _"], Ints]:
    """The class of every group, and of every class its first group. Groups with the same edges share one."""
    random = np.random.default_rng(0)
    words = random.integers(1, 2**63, (2, states), dtype=np.uint64)
    mixed = words[0][source] * (words[1][target] | np.uint64(1))
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    signature = np.zeros(groups, np.uint64)
    np.add.at(signature, group, mixed)  # a sum of well-mixed words stands for the set of edges
    used = np.zeros(groups, bool)
    used[group] = True
    class_of = np.full(groups, DEAD, np.int32)
    _, first, inverse = np.unique(signature[used], return_index=True, return_inverse=True)
    class_of[used] = inverse
    return class_of, np.nonzero(used)[0][first]


def _distances(source: Ints, target: Ints, accepting: Bool[np.ndarray, " states"]) -> Ints:
    """The fewest edges from each state to an accepting one."""
    states = len(accepting)
    pairs, _ = _distinct(source * states + target, states * states)
    source, target = np.divmod(pairs, states)
    distance = np.where(accepting, 0, FAR)
    while True:
        shorter = distance.copy()
        np.minimum.at(shorter, source, distance[target] + 1)
        if (shorter == distance).all():
            return distance
        distance = shorter
