"""Keyed randomness: every draw is a pure function of (seed, canvas, step, position, purpose).

Philox4x32-10 with the seed as key and the other four as counter:

    counter   position | step | canvas | purpose          key   seed, low and high 32 bits

so a row draws the same numbers alone or in any batch, on any device, in any order. Step 0 is the first canvas; the
purpose separates the noise that fills a canvas from the uniform that samples a token.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Triton's `tl.philox` has the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device
from blockpress.shapes import Canvas, Logits

NOISE, SAMPLE = 0, 1
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

Words = Int[Tensor, "..."]
Fractions = Float64[Tensor, "..."]
Steps = int | Int[Tensor, " rows"]
"""The number of the step: one for all rows, or one per row."""


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four 32-bit words for each counter, held in int64 tensors that broadcast together.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero, zero))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if key[0].device.type != "cpu" or torch.compiler.is_compiling():
        return in_tensors(counter, key)
    # numpy starts an operation in a third of torch's time, and its words have no sign.
    words: list[Any] = [word.numpy().view(np.uint64) for word in (*counter, *key)]
    c0, c1, c2, c3, k0, k1 = words
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & LOW, (first >> 32) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + _WEYL[0]) & LOW, (k1 + _WEYL[1]) & LOW
    d0, d1, d2, d3 = (torch.from_numpy(np.asarray(word).view(np.int64)) for word in (c0, c1, c2, c3))
    return d0, d1, d2, d3


def in_tensors(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """`philox` on any device."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & LOW, (k1 + _WEYL[1]) & LOW
    return c0, c1, c2, c3


def _multiply(word: Words, factor: int) -> tuple[Words, Words]:
    """High and low half of a 32 x 32 bit product; int64 wraps, and the mask takes the sign back out."""
    product = word * factor
    return (product >> 32) & LOW, product & LOW


def _fraction(first: Words, second: Words) -> Fractions:
    """A number in [0, 1) from the upper 53 bits of two words."""
    return ((first << 21) | (second >> 11)).double() * 2.0**-53


class KeyedDraws:
    """The draws of some rows on one canvas each.

    seeds: one integer per row, taken modulo 2^64. canvases: the number of the canvas that each row writes, from 0.
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
        low, high = ([seed >> shift & LOW for seed in seeds] for shift in (0, 32))
        words = to_device(torch.tensor([low, high, list(canvases)], dtype=torch.int64), device)
        self._hold(words[0], words[1], words[2], length, vocab)

    @classmethod
    def from_words(
        cls,
        low: Int[Tensor, " rows"],
        high: Int[Tensor, " rows"],
        canvases: Int[Tensor, " rows"],
        *,
        length: int,
        vocab: int,
    ) -> KeyedDraws:
        """The same from int64 tensors: the low and high 32 bits of the seeds, and the numbers of the canvases."""
        draws = cls.__new__(cls)
        draws._hold(low, high, canvases, length, vocab)
        return draws

    def _hold(self, low: Tensor, high: Tensor, canvases: Tensor, length: int, vocab: int) -> None:
        self.length, self.vocab = length, vocab
        self._key, self._canvas = (low[:, None], high[:, None]), canvases[:, None]
        self._position = torch.arange(length, dtype=torch.int64, device=canvases.device)[None]

    def noise(self, rows: Int[Tensor, " rows"], step: Steps) -> Canvas:
        """Uniform random tokens for the rows: the first canvas at step 0, positions not accepted at a later step."""
        return self._token(self._words(rows, step, NOISE)[0])

    def uniform(self, rows: Int[Tensor, " rows"], step: Steps) -> Float64[Tensor, "rows canvas"]:
        """One uniform number in [0, 1) per position, with 53 random bits."""
        first, second, _, _ = self._words(rows, step, SAMPLE)
        return _fraction(first, second)

    def sample(self, rows: Int[Tensor, " rows"], step: Steps, scaled: Logits) -> Canvas:
        """One token per position, drawn from softmax(scaled)."""
        return vocabulary.sample(scaled, self.uniform(rows, step))

    def of_step(
        self, number: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, "rows canvas"], Int[Tensor, "rows canvas"], Float64[Tensor, "rows canvas"]]:
        """All draws that a step may need, in one pass: `noise` of step 0, `noise` and `uniform` of step `number`."""
        kind = torch.arange(3, device=number.device)[:, None, None]
        step, purpose = number[:, None] * (kind > 0), (kind == 2) * SAMPLE
        first, second, _, _ = philox((self._position, step, self._canvas, purpose), self._key)
        return self._token(first[0]), self._token(first[1]), _fraction(first[2], second[2])

    def _token(self, word: Words) -> Words:
        return (word * self.vocab) >> 32

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
