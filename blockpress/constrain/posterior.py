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

from blockpress.constrain.tokens import TokenAutomaton
from blockpress.ops.chain import Groups, chain

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
    *,
    native: bool = True,
) -> Posterior:
    """The posterior of a canvas of as many positions as `mass` has.

    If no allowed text has any weight, the biases are NaN, and the path means nothing.

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
    moves, end = automaton.moves, np.where(automaton.distance <= left if ends is None else ends, 0.0, -np.inf)
    by_label, by_class = moves.by_label, moves.by_class
    weight = by_label.log_sum(mass.T[moves.member[by_label.order]]).T
    highest = by_label.highest(best.T[moves.member[by_label.order]]).T
    result = chain(moves.graph, start, end, weight, highest, native=native)
    bias = by_class.log_sum(result.bias.T[moves.label[by_class.order]]).T
    with np.errstate(invalid="ignore"):
        bias -= bias.max(1, keepdims=True)
    path = np.zeros(len(mass), np.int64)
    for i, label in enumerate(result.path):
        if label < 0:
            break
        members = moves.member[by_label.order[by_label.starts[label] : by_label.starts[label + 1]]]
        path[i] = members[best[i, members].argmax()]
    return Posterior(bias, path, result.through)


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
    moves, (_, out_of, _) = automaton.moves, automaton.moves.graph.groups
    graph, ahead = moves.graph, np.where(automaton.distance <= left if ends is None else ends, 0.0, -np.inf)
    weight = moves.by_label.log_sum(mass.T[moves.member[moves.by_label.order]]).T
    changed = np.unique(moves.label[np.isin(moves.member, labels)])
    pair = np.nonzero(np.isin(moves.label, changed))[0]
    sets = Groups.of(np.searchsorted(changed, moves.label[pair]), len(changed))
    members = moves.member[pair[sets.order]]
    label, target = graph.label[out_of.order], graph.target[out_of.order]
    for i in reversed(range(len(mass))):
        rest = ahead[targets]
        weights[i, labels] = np.where(np.isneginf(rest), 0.0, -rest)
        weight[i, changed] = sets.log_sum(mass[i, members] + weights[i, members])
        ahead = out_of.log_sum(weight[i, label] + ahead[target])
    return weights
