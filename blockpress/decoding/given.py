"""What is given of an answer before it is written: tokens that are pinned, and a draft that it starts from.

    position     0    1    2    3    4    5       of the answer, over all of its canvases
    pins              7                           holds 7 at every step, certain
    draft        4         9    2                 stands in the first noise, unless its draw is below the noise level
    start        4    7    x    2    x    x       x: random, by the answer's seed

A draft is a hint: any step may change it. A canvas of which half is random is one that has been denoised half the way,
so its schedule starts there too: `skipped_steps`.

Invariant: pins stand in the answer, whatever the network prefers; no stop id ends it before its last pin.
Run it:  python -m pytest tests/lm/test_given.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field

import torch

from blockpress.diffusion import KeyedDraws
from blockpress.errors import RequestError

LEAST_STEPS = 8
"""Steps that a draft leaves to its canvas at least: what it has wrong is seen at the first and mended at the next."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """pins: position in the answer to token id. draft: the same, of tokens that it starts from. noise: how likely each
    of these is replaced by a random one, from 0 to 1; without an entry it stays, and does not count as denoised."""

    pins: Mapping[int, int] = field(default_factory=dict)
    draft: Mapping[int, int] = field(default_factory=dict)
    noise: Mapping[int, float] = field(default_factory=dict)

    def pins_on(self, first: int, length: int) -> dict[int, int]:
        """The pins of a canvas whose first token is number `first` of the answer, by their positions in it.

        >>> Given(pins={1: 7, 9: 8}).pins_on(8, 4)
        {1: 8}
        """
        return _shifted(self.pins, first, length)

    def start_on(self, first: int, length: int, seed: int, canvas: int) -> dict[int, int]:
        """The draft's tokens that a canvas starts with, by their positions in it.

        canvas: what keys its draws (`SequenceState.canvas_number`); step 0 samples nothing else.
        """
        tokens = _shifted(self.draft, first, length)
        if not tokens:
            return {}
        draws = KeyedDraws([seed], [canvas], length=length, vocab=1).uniform(torch.arange(1), 0)[0].tolist()
        return {place: token for place, token in tokens.items() if draws[place] >= self.noise.get(first + place, 0.0)}

    def skipped_steps(self, first: int, length: int, steps: int) -> int:
        """How many of a canvas's `steps` come before its start: as many as would have left so much noise.

        The noise level is the mean over the positions that are to be denoised; 1 where there is no draft.

        >>> Given(draft={0: 5, 1: 6}, noise={0: 0.5, 1: 0.5}).skipped_steps(0, 2, 48)
        24
        """
        if not _shifted(self.draft, first, length):
            return 0
        free = (place for place in range(first, first + length) if place not in self.pins)
        levels = [self.noise.get(place, 1.0) for place in free if place in self.noise or place not in self.draft]
        return steps - max(min(steps, LEAST_STEPS), math.ceil(steps * sum(levels) / max(1, len(levels))))

    def check_room(self, most: int, stop_ids: Collection[int]) -> None:
        """Raises RequestError: an answer of at most `most` tokens cannot hold the pins, or has no use for the draft."""
        more = "allow more by max_tokens, a shorter prompt, or the engine option memory"
        last, end = max(self.pins, default=-1), max(self.draft, default=-1) + 1
        if last >= most:
            raise RequestError(
                f"pins has position {last}, and the answer has room for {most} tokens", hint=f"pin earlier, or {more}"
            )
        if end > most:
            raise RequestError(
                f"draft has {end} tokens, and the answer has room for {most}", hint=f"shorten the draft, or {more}"
            )
        stops = [place for place, token in self.pins.items() if token in stop_ids]
        texts = [place for place, token in self.pins.items() if token not in stop_ids]
        if stops and texts and min(stops) < max(texts):
            raise RequestError(
                f"pins has the stop id {self.pins[min(stops)]} at position {min(stops)} and text at {max(texts)}",
                hint="pin nothing else after a stop id: the answer ends there",
            )

    def banned_on(
        self, first: int, stop_ids: Collection[int], others: Mapping[int, Container[int]]
    ) -> Mapping[int, Container[int]]:
        """Ids and the positions where a canvas must not hold them: `others`, and stop ids that would end the answer
        before its last pin."""
        before = max((place for place, token in self.pins.items() if token not in stop_ids), default=0) - first
        if before <= 0:
            return others
        return {**others, **{token: _Either(range(before), others.get(token, ())) for token in stop_ids}}


@dataclass(frozen=True)
class _Either:
    """The positions in one of two."""

    first: Container[int]
    second: Container[int]

    def __contains__(self, place: object) -> bool:
        return place in self.first or place in self.second


def _shifted(tokens: Mapping[int, int], first: int, length: int) -> dict[int, int]:
    return {place - first: token for place, token in tokens.items() if first <= place < first + length}
