"""Sums over all ways through a chain, and the best one: forward-backward and Viterbi over a graph.

    state s --label l, weight[i, l]--> state t         one move at each position, from `start` to an allowed end

    forward   f[i, s]      log mass of all ways from the start to s with the first i moves
    backward  b[i, s]      log mass of all ways from s to an allowed end with the moves from i on
    bias      bias[i, l]   log of the sum of exp(f[i, s] + b[i + 1, t]) over the moves of label l
    path                   the labels of the way of the largest sum of `best`

Invariant: the version in C++ (`ops/native/chain.cpp`) gives the same path, and the same bias but for rounding.
Run it:  python -m pytest tests/ops/test_chain.py
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Float64, Int, Int32

from blockpress.ops import compiled

Ints = Int[np.ndarray, " _"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Numbered things grouped by a key. order: group by group; starts: where each of the `len(starts) - 1` begins."""

    order: Ints
    starts: Ints

    @classmethod
    def of(cls, keys: Ints, count: int) -> Groups:
        """From the key of each thing, 0 <= key < count."""
        order = np.argsort(keys, kind="stable")
        return cls(order.astype(np.int32), np.searchsorted(keys[order], np.arange(count + 1)).astype(np.int32))

    @cached_property
    def _used(self) -> Ints:
        return np.nonzero(np.diff(self.starts))[0]

    @cached_property
    def _index(self) -> Ints:
        return np.repeat(np.arange(len(self._used)), np.diff(self.starts)[self._used])

    def highest(self, values: Float64[np.ndarray, " things *columns"]) -> Float64[np.ndarray, " groups *columns"]:
        """The largest value of each group, of values in `order`; -inf of an empty one."""
        result = np.full((len(self.starts) - 1, *values.shape[1:]), -np.inf)
        if len(self._used):
            result[self._used] = np.maximum.reduceat(values, self.starts[self._used])
        return result

    def log_sum(self, values: Float64[np.ndarray, " things *columns"]) -> Float64[np.ndarray, " groups *columns"]:
        """log of the sum of exp over each group, of values in `order`; -inf where all are."""
        result = self.highest(values)
        if len(self._used):
            finite = np.where(np.isneginf(result), 0.0, result)[self._used]
            sums = np.add.reduceat(np.exp(values - finite[self._index]), self.starts[self._used])
            with np.errstate(divide="ignore"):
                result[self._used] = np.log(sums) + finite
        return result


@dataclass(frozen=True, eq=False)
class ChainGraph:
    """Moves (source, label, target) between states; labels are below `labels`, states below `states`."""

    source: Int32[np.ndarray, " moves"]
    label: Int32[np.ndarray, " moves"]
    target: Int32[np.ndarray, " moves"]
    states: int
    labels: int

    @cached_property
    def groups(self) -> tuple[Groups, Groups, Groups]:
        """The moves by target, by source and by label."""
        states, labels = self.states, self.labels
        return Groups.of(self.target, states), Groups.of(self.source, states), Groups.of(self.label, labels)


@dataclass(frozen=True, eq=False)
class ChainResult:
    """See above. through: the states of the best way, before each move and after the last.

    If no way has any mass, the biases are -inf, and the path may be -1.
    """

    bias: Float64[np.ndarray, "positions labels"]
    path: Int[np.ndarray, " positions"]
    through: Int[np.ndarray, " positions_and_one"]


def chain(
    graph: ChainGraph,
    start: int,
    end: Float64[np.ndarray, " states"],
    weight: Float64[np.ndarray, "positions labels"],
    best: Float64[np.ndarray, "positions labels"],
    *,
    native: bool = True,
) -> ChainResult:
    """The sums of a chain of as many moves as `weight` has rows, and its best way; of equal ways the first.

    Args:
        start: the state before the first move.
        end: log weight of each state after the last.
        weight: log weight of a move by its label, for the sums.
        best: the same for the best way.
        native: whether the C++ version may be used where there is one.
    """
    version = _in_cpp if native and _library() is not None else _in_numpy
    return version(graph, start, end, weight, best)


def _in_numpy(
    graph: ChainGraph,
    start: int,
    end: Float64[np.ndarray, " states"],
    weight: Float64[np.ndarray, "positions labels"],
    best: Float64[np.ndarray, "positions labels"],
) -> ChainResult:
    into, out_of, of_label = graph.groups
    sources, labels = graph.source[into.order], graph.label[into.order]
    forward = np.full((len(weight) + 1, graph.states), -np.inf)
    forward[0, start] = 0.0
    highest = forward.copy()
    for i in range(len(weight)):
        forward[i + 1] = _level(into.log_sum(forward[i, sources] + weight[i, labels]))
        highest[i + 1] = into.highest(highest[i, sources] + best[i, labels])
    bias, backward = np.empty(weight.shape), end
    for i in reversed(range(len(weight))):
        bias[i] = of_label.log_sum(forward[i, graph.source[of_label.order]] + backward[graph.target[of_label.order]])
        backward = _level(out_of.log_sum(weight[i, graph.label[out_of.order]] + backward[graph.target[out_of.order]]))
    return ChainResult(bias, *_best_path(graph, highest, best, end))


def _level(values: Float64[np.ndarray, " states"]) -> Float64[np.ndarray, " states"]:
    """The values less their largest, so that long sums keep their digits."""
    most = values.max()
    return values - most if np.isfinite(most) else values


def _best_path(
    graph: ChainGraph,
    highest: Float64[np.ndarray, "ends states"],
    best: Float64[np.ndarray, "positions labels"],
    end: Float64[np.ndarray, " states"],
) -> tuple[Int[np.ndarray, " positions"], Int[np.ndarray, " positions_and_one"]]:
    """The labels and states of the best way, followed from its end."""
    into, _, _ = graph.groups
    path, through = np.full(len(best), -1), np.zeros(len(best) + 1, np.int64)
    through[-1] = (highest[-1] + end).argmax()
    for i in reversed(range(len(best))):
        state = through[i + 1]
        moves = into.order[into.starts[state] : into.starts[state + 1]]
        ways = highest[i, graph.source[moves]] + best[i, graph.label[moves]]
        if len(moves) and ways.max() > -np.inf:
            move = moves[ways.argmax()]
            path[i], through[i] = graph.label[move], graph.source[move]
    return path, through


class _Groups(ctypes.Structure):
    """Mirrors `native/chain.cpp`, as does `_Chain`."""

    _fields_ = [("order", ctypes.c_void_p), ("starts", ctypes.c_void_p)]


class _Chain(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("positions", "states", "labels", "start")),
        *((name, ctypes.c_void_p) for name in ("source", "target", "label")),
        *((name, _Groups) for name in ("into", "out_of", "of_label")),
        *((name, ctypes.c_void_p) for name in ("weight", "best", "end", "bias", "path", "through")),
    ]


def _in_cpp(
    graph: ChainGraph,
    start: int,
    end: Float64[np.ndarray, " states"],
    weight: Float64[np.ndarray, "positions labels"],
    best: Float64[np.ndarray, "positions labels"],
) -> ChainResult:
    library, positions = _library(), len(weight)
    assert library is not None
    end, weight, best = (np.ascontiguousarray(x) for x in (end, weight, best))
    result = ChainResult(np.empty(weight.shape), np.empty(positions, np.int64), np.empty(positions + 1, np.int64))
    given = _Chain(positions=positions, states=graph.states, labels=graph.labels, start=start)
    arrays = {"source": graph.source, "target": graph.target, "label": graph.label, **vars(result)}
    for name, array in {**arrays, "end": end, "weight": weight, "best": best}.items():
        assert array.flags.c_contiguous
        setattr(given, name, array.ctypes.data)
    given.into, given.out_of, given.of_label = (
        _Groups(each.order.ctypes.data, each.starts.ctypes.data) for each in graph.groups
    )
    library.chain(ctypes.byref(given))
    return result


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("chain")
    if library is not None:
        library.chain.argtypes, library.chain.restype = [ctypes.POINTER(_Chain)], None
    return library
