"""What a canvas's probabilities become once the whole canvas must follow an automaton.

The denoiser gives every position its own distribution, so a canvas has the product of them. Given that the text is an
allowed one, the product is a chain over the automaton's states, and the usual sums over it are exact:

    forward  f[i, s]   log mass of all ways from the start to state s with the first i tokens
    backward b[i, s]   log mass of all ways from s to an allowed end with the tokens from i on
    position i         P(token t | allowed)  =  softmax(logit[i, t] + bias[i, class of t])
                       bias[i, c]            =  log sum over edges s -c-> s' of exp(f[i, s] + b[i + 1, s'])
    best path          the likeliest allowed canvas: the same recursion with the maximum (Viterbi)

A bias per class and position is all that the rest of a step needs: sample, entropy and self-conditioning embedding are
those of the biased logits. Adding one number to all biases of a position changes nothing.
Where text is free until a control token begins what is not (a thought before an answer, text before a call), the free
part is the network's alone: `entry_weights` takes from that token what the allowed texts after it weigh. Otherwise a
thought would never end in a canvas of noise, in which no allowed answer is likely yet.

Source: forward-backward and Viterbi algorithms; DINGO (arXiv 2505.23061) uses the latter for masked diffusion.

Invariant: the best path is an allowed text, or the beginning of one that `left` more tokens can complete.
Run it:  python -m pytest tests/constrain/test_posterior.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int

from blockpress.constrain.tokens import EdgeGroups, Ints, TokenAutomaton

Masses = Float64[np.ndarray, "positions classes"]


@dataclass(frozen=True)
class Posterior:
    """bias: what to add to the logits of a class at a position, -inf where it cannot stand. path: the best canvas's
    classes, and `states` the state before each of its tokens and after the last."""

    bias: Float64[np.ndarray, "positions classes"]
    path: Int[np.ndarray, " positions"]
    states: Int[np.ndarray, " positions_and_one"]


def posterior(
    automaton: TokenAutomaton,
    start: int,
    left: int,
    mass: Masses,
    best: Masses,
    ends: Bool[np.ndarray, " states"] | None = None,
) -> Posterior:
    """The posterior of a canvas of as many positions as `mass` has.

    Args:
        start: the state before the canvas.
        left: how many tokens may follow the canvas.
        mass: log of the summed weight of each class's tokens at each position.
        best: log of the largest weight.
        ends: the states that may follow the canvas; None: all from which the tokens that are left suffice.

    Raises:
        ValueError: no allowed text fits; `distance[start]` is more than the positions and `left`.
    """
    if automaton.distance[start] > len(mass) + left:
        raise ValueError("no allowed text is this short")
    end = np.where(automaton.distance <= left if ends is None else ends, 0.0, -np.inf)
    positions, states = len(mass), len(end)
    into, out_of, of_class = automaton.groups
    source, label, target = automaton.source, automaton.label, automaton.target
    forward = np.full((positions + 1, states), -np.inf)
    highest, backward = forward.copy(), forward.copy()
    forward[0, start] = highest[0, start] = 0.0
    backward[-1] = end
    for i in range(positions):
        way = into.log_sum(forward[i, source[into.order]] + mass[i, label[into.order]])
        forward[i + 1, into.keys] = way - way.max()
        highest[i + 1, into.keys] = into.highest(highest[i, source[into.order]] + best[i, label[into.order]])
    for i in reversed(range(positions)):
        way = out_of.log_sum(mass[i, label[out_of.order]] + backward[i + 1, target[out_of.order]])
        backward[i, out_of.keys] = way - way.max()
    bias = np.full(mass.shape, -np.inf)
    bias[:, of_class.keys] = of_class.log_sum(
        forward[:-1, source[of_class.order]] + backward[1:, target[of_class.order]]
    )
    bias -= bias.max(1, keepdims=True)
    return Posterior(bias, *_best_path(automaton, into, highest, best, end))


def entry_weights(
    automaton: TokenAutomaton, left: int, mass: Masses, ends: Bool[np.ndarray, " states"] | None = None
) -> Masses:
    """What to add to the logits of each class at each position so that free text ends where the network ends it.

    The posterior then is P(free text) times P(rest | allowed, free text), where it was P(both | allowed). Zero where no
    free text ends. Arguments as for `posterior`.
    """
    labels, targets = automaton.entries
    weights = np.zeros_like(mass)
    if not len(labels):
        return weights
    mass = mass - np.logaddexp.reduce(mass, axis=1, keepdims=True)  # 0 is certainty
    out_of = automaton.groups[1]
    label, target = automaton.label[out_of.order], automaton.target[out_of.order]
    ahead = np.where(automaton.distance <= left if ends is None else ends, 0.0, -np.inf)
    for i in reversed(range(len(mass))):
        rest = ahead[targets]
        weights[i, labels] = np.where(np.isneginf(rest), 0.0, -rest)
        way = out_of.log_sum(mass[i, label] + weights[i, label] + ahead[target])
        ahead = np.full(len(ahead), -np.inf)
        ahead[out_of.keys] = way
    return weights


def _best_path(
    automaton: TokenAutomaton,
    into: EdgeGroups,
    highest: Float64[np.ndarray, "ends states"],
    best: Masses,
    end: Float64[np.ndarray, " states"],
) -> tuple[Ints, Ints]:
    """The classes and states of the likeliest way, followed from its end; of equal ways the first."""
    positions = len(best)
    path, states = np.empty(positions, np.int64), np.empty(positions + 1, np.int64)
    states[-1] = state = int((highest[-1] + end).argmax())
    for i in reversed(range(positions)):
        edges = into.members(state)
        edge = edges[(highest[i, automaton.source[edges]] + best[i, automaton.label[edges]]).argmax()]
        path[i], states[i] = automaton.label[edge], automaton.source[edge]
        state = int(states[i])
    return path, states
