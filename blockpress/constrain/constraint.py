"""A constraint on answers, and where one answer stands within it.

    regex, choice --expression--> Automaton (bytes) --lift--> TokenAutomaton --with_stops--> Constraint
    canvas        logits [positions, vocab] --masses of classes--> posterior --> biased logits, best path

Every step sees the whole canvas: each position's probabilities become those that it has in allowed texts, so acceptance
and settling work as always, on numbers that are true of the constrained answer; and the argmax is the likeliest allowed
canvas, so what is committed is always a beginning of an allowed text that the remaining tokens can complete.

Invariant: a row's constraint affects this row only.
Run it:  python -m pytest tests/constrain
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.constrain.automaton import DEAD, Expression
from blockpress.constrain.compiler import compile_expression
from blockpress.constrain.posterior import entry_weights, posterior
from blockpress.constrain.tokens import FAR, TokenAutomaton, TokenBytes, lift
from blockpress.errors import RequestError
from blockpress.ops.transfer import to_device, to_host
from blockpress.ops.vocabulary import ClassBias, ClassStats, Room, class_stats


@final
@dataclass(frozen=True, eq=False)
class Constraint:
    """An automaton over tokens with its stop ids; requests share it. `about` says what it enforces."""

    automaton: TokenAutomaton
    about: str

    @classmethod
    def of(cls, expression: Expression, vocabulary: TokenBytes, stop_ids: Collection[int], about: str) -> Constraint:
        """Compile an expression.

        Raises:
            RequestError: there is no stop id; the vocabulary without these can write none of its texts; it needs too
                many states. _NothingMatches: it allows no text.
        """
        if not stop_ids:
            raise RequestError(
                f"the model has no stop ids, so no text of {about} could end",
                hint="name its eos_token_id in generation_config.json",
            )
        automaton = lift(compile_expression(expression), vocabulary.without(stop_ids))
        if automaton.distance[0] >= FAR:
            raise RequestError(f"the vocabulary cannot write {about}", hint="use characters that it has tokens for")
        return cls(automaton.with_stops(stop_ids), about)

    def check_pins(self, pins: Mapping[int, int], most: int) -> None:
        """Raises RequestError: no allowed text of at most `most` tokens has these tokens at these positions."""
        if pins and not self._completes(pins, 0, most)[0]:
            raise RequestError(
                f"pins {dict(pins)!r:.200} contradict {self.about}", hint="pin tokens of a text that it allows"
            )

    def _completes(self, pins: Mapping[int, int], first: int, most: int) -> Bool[np.ndarray, " states"]:
        """The states before token number `first` from which a text with these pins ends within `most` tokens."""
        automaton, last = self.automaton, max(pins, default=-1)
        fits = automaton.distance <= most - max(first, last + 1)
        for place in range(last, first - 1, -1):
            way = fits[automaton.target]
            if place in pins:
                way &= automaton.label == automaton.class_of[pins[place]]
            fits = np.zeros(len(fits), bool)
            fits[automaton.source[way]] = True
        return fits

    def check_length(self, most: int, state: int = 0) -> None:
        """Raises RequestError: no allowed text from a state on has as few as `most` tokens."""
        least = int(self.automaton.distance[state])
        if least > most:
            raise RequestError(
                f"{self.about} needs {least} tokens, and there is room for {most}",
                hint=f"allow {least} tokens or more: by max_tokens, a shorter prompt, or the engine option memory",
            )


@final
class ConstraintState:
    """Where one answer stands: the state after its tokens so far. `pins`: tokens that are given, by their positions in
    the answer; the constraint allows them."""

    def __init__(self, constraint: Constraint, pins: Mapping[int, int] | None = None) -> None:
        self.constraint, self.state, self.pins, self._count = constraint, 0, pins or {}, 0
        self.room = Room()

    def after(self, tokens: Iterable[int], state: int = 0) -> int:
        """The state after some tokens, or DEAD."""
        for token in tokens:
            state = self.constraint.automaton.step(state, token)
            if state == DEAD:
                break
        return state

    def advance(self, tokens: Iterable[int]) -> None:
        """Take committed tokens."""
        taken = list(tokens)
        self.state, self._count = self.after(taken, self.state), self._count + len(taken)

    def canvas(self, positions: int, left: int, pins: Mapping[int, int]) -> CanvasConstraint:
        """What a canvas with some pinned tokens must follow in its first `positions` positions, when `left` more tokens
        may follow it.

        An answer that cannot end within its limits any more goes on as long as it may.
        """
        constraint, first, stop = self.constraint, self._count, self._count + positions
        left = max(left, int(constraint.automaton.distance[self.state]) - positions)
        later = {place: token for place, token in self.pins.items() if place >= stop}
        ends = constraint._completes(later, stop, stop + left) if later else None
        given = {place - first: token for place, token in self.pins.items() if first <= place < stop}
        return CanvasConstraint(constraint.automaton, self.state, positions, left, pins, given, ends)

    def invalid(self, tokens: Iterable[int], stopped: str | None = None) -> str | None:
        """Why an answer of these tokens is not allowed, or was not to end there; None if it is whole.

        `stopped`: the stop text that cut it, perhaps inside of its last token.
        """
        if stopped is not None:
            return f"the stop text {stopped!r} cut the answer: {self.constraint.about} may need more"
        automaton, state = self.constraint.automaton, self.after(tokens)
        if state != DEAD and automaton.accepting[state]:
            return None
        if state == DEAD:
            return f"the answer leaves {self.constraint.about}"
        return f"the answer ends early: {self.constraint.about} needs {automaton.distance[state]} more tokens"

    def allowed(self, left: int) -> Bool[Tensor, " vocab"]:
        """Which tokens may come next if `left` more may follow it."""
        automaton = self.constraint.automaton
        here = (automaton.source == self.state) & (automaton.distance[automaton.target] <= left)
        classes = np.zeros(automaton.num_classes + 1, bool)
        classes[automaton.label[here]] = True
        return torch.from_numpy(classes[automaton.class_of])


@final
@dataclass(frozen=True, eq=False)
class CanvasConstraint:
    """The constraint on one canvas: its first `positions` positions, from `state`, when `left` more tokens may follow.

    Positions after these are dropped from the answer and stay as they are. pins: tokens that it must hold, by position;
    given: those of them that were given, and not pinned by a verification. ends: the states that may follow the canvas,
    where pins after it exclude some.
    """

    automaton: TokenAutomaton
    state: int
    positions: int
    left: int
    pins: Mapping[int, int] = field(default_factory=dict)
    given: Mapping[int, int] = field(default_factory=dict)
    ends: Bool[np.ndarray, " states"] | None = None

    def allowed(self, tokens: Sequence[int]) -> Bool[np.ndarray, "tokens classes_and_one"]:
        """Which classes may stand at the place of each token, after those before it; the last is that of no class.

        What follows a token that is not allowed is not judged.
        """
        automaton, state = self.automaton, self.state
        result, fits = np.zeros((len(tokens), automaton.num_classes + 1), bool), self._fitting()
        for place, token in enumerate(tokens):
            here = (automaton.source == state) & fits[place + 1][automaton.target]
            result[place, automaton.label[here]] = True
            state = automaton.step(state, token)
            if state == DEAD:
                result[place + 1 :] = True
                break
        return result

    def _fitting(self) -> list[Bool[np.ndarray, " states"]]:
        """For every position and the end: the states from which the canvas can be completed with the given pins."""
        automaton = self.automaton
        fits = [automaton.distance <= self.left if self.ends is None else self.ends]
        for place in reversed(range(self.positions)):
            way = fits[-1][automaton.target]
            if place in self.given:
                way &= automaton.label == automaton.class_of[self.given[place]]
            before = np.zeros(len(automaton.accepting), bool)
            before[automaton.source[way]] = True
            fits.append(before)
        return fits[::-1]

    def __call__(
        self, scaled: Float32[Tensor, "canvas vocab"]
    ) -> tuple[Float32[Tensor, "canvas vocab"], Int[Tensor, " canvas"]]:
        """From temperature-scaled logits: those of the posterior, and the likeliest allowed canvas.

        The plain version of what `vocabulary.sample_conditioned` does without full logits.
        """
        classes = self.automaton.classes(scaled.device)
        own = scaled[: self.positions]
        own = own if classes.tokens is None else own[:, classes.tokens]
        stats = class_stats(own.detach(), None, scaled.new_ones(self.positions), classes)
        values, labels = self.condition(stats)
        path = stats.token.gather(1, labels[:, None])[:, 0]
        biased, posterior_logits = ClassBias(classes, values).added(own), scaled.clone()
        if classes.tokens is None:
            posterior_logits[: self.positions] = biased
        else:
            path = classes.tokens[path]
            posterior_logits[: self.positions] = -torch.inf
            posterior_logits[: self.positions, classes.tokens] = biased
        return posterior_logits, torch.cat((path, scaled[self.positions :].argmax(-1)))

    def condition(self, stats: ClassStats) -> tuple[Float32[Tensor, "n classes_and_one"], Int[Tensor, " n"]]:
        """The bias of each class at each position, and the classes of the likeliest allowed canvas."""
        mass, best = (to_host(x).double().numpy() for x in (stats.mass, stats.best))
        for place, token in self.pins.items():
            for masses in (mass, best) if place < self.positions else ():
                masses[place] = -np.inf
                masses[place, self.automaton.class_of[token]] = 0.0
        weights = entry_weights(self.automaton, self.left, mass, self.ends)
        result = posterior(self.automaton, self.state, self.left, mass + weights, best + weights, self.ends)
        bias = np.concatenate((result.bias + weights, np.full((self.positions, 1), -np.inf)), axis=1).astype(np.float32)
        device = stats.mass.device
        return to_device(torch.from_numpy(bias), device), to_device(torch.from_numpy(result.path), device)
