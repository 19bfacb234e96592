"""Keyed randomness: every draw is a pure function of (seed, canvas, step, position, purpose).

Philox4x32-10 with the seed as key and the other four as counter:

    counter   position | step | canvas | purpose          key   seed, low and high 32 bits

so a row draws the same numbers alone or in any batch, on any device, in any order. Step 0 is the first canvas; the
purpose parts the noise that fills a canvas from the uniform that samples a token.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Triton's `tl.philox` has the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from blockpress.ops import vocabulary
from blockpress.shapes import Canvas, Logits

NOISE, SAMPLE = 0, 1
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

Words = Int[Tensor, "..."]
Steps = int | Int[Tensor, " rows"]
"""The number of the step that the rows are at: of all of them, or one by one."""


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four 32-bit words for each counter, held in int64 tensors that broadcast together.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero, zero))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _multiply(word: Words, factor: int) -> tuple[Words, Words]:
    """High and low half of a 32 x 32 bit product; int64 wraps, and the mask takes the sign back out."""
    product = word * factor
    return (product >> 32) & _LOW, product & _LOW


class KeyedDraws:
    """The draws of some rows on one canvas each.

    seeds: one whole number a row, taken modulo 2^64. canvases: the number of the canvas that each row writes, from 0.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        canvases: Sequence[int],
        *,
        length: int,
        vocab: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length, self.vocab = length, vocab
        low = [seed & _LOW for seed in seeds]
        high = [seed >> 32 & _LOW for seed in seeds]
        self._key = tuple(torch.tensor(x, dtype=torch.int64, device=device)[:, None] for x in (low, high))
        self._canvas = torch.tensor(list(canvases), dtype=torch.int64, device=device)[:, None]
        self._position = torch.arange(length, dtype=torch.int64, device=device)[None]

    def noise(self, rows: Int[Tensor, " rows"], step: Steps) -> Canvas:
        """Uniform random tokens for the rows: the first canvas at step 0, what is not accepted after a later step."""
        word = self._words(rows, step, NOISE)[0]
        return (word * self.vocab) >> 32

    def uniform(self, rows: Int[Tensor, " rows"], step: Steps) -> Float64[Tensor, "rows canvas"]:
        """One uniform number in [0, 1) with 53 random bits for every position."""
        first, second, _, _ = self._words(rows, step, SAMPLE)
        return ((first << 21) | (second >> 11)).double() * 2.0**-53

    def sample(self, rows: Int[Tensor, " rows"], step: Steps, scaled: Logits) -> Canvas:
        """A token a position from softmax(scaled)."""
        return vocabulary.sample(scaled, self.uniform(rows, step))

    def _words(self, rows: Int[Tensor, " rows"], step: Steps, purpose: int) -> tuple[Words, Words, Words, Words]:
        canvas = self._canvas[rows]
        number = torch.full_like(canvas, step) if isinstance(step, int) else step[:, None].to(canvas)
        counter = (
            self._position.expand(len(rows), -1),
            number,
            canvas,
            torch.full_like(canvas, purpose),
        )
        return philox(counter, (self._key[0][rows], self._key[1][rows]))
