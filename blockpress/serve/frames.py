"""A step of the canvas as it goes over the wire: whole in an extra key of a stream's chunk, or as what is new in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from blockpress.decoding import Denoised
from blockpress.lm import LM


def written_bytes(lm: LM, token: int) -> bytes:
    """The bytes that a token writes; of a control token, its name."""
    assert lm.tokenizer is not None
    return lm.tokenizer.token_bytes()[token] or lm.tokenizer.token(token).encode()


def pieces_of(lm: LM, tokens: Sequence[int]) -> list[str]:
    """The text of each token by itself; control tokens are spelled out."""
    return [written_bytes(lm, token).decode("utf-8", "replace") for token in tokens]


@final
class FrameDiffs:
    """The steps of one answer, each as what differs from the step before."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._canvas = -1
        self._cells: list[tuple[int, bool, int]] = []

    def frame(self, event: Denoised) -> dict[str, Any]:
        """The body of a `canvas.frame`.

        cells: [position, token id, text, accepted (0 or 1), entropy in thousandths of a nat] of each position at which
        one of them differs from the frame before; the first frame of a canvas has all positions.
        """
        flags, nats = event.accepted.tolist(), event.entropy.tolist()
        tokens = event.argmax.tolist()
        cells = [(t, bool(flag), round(1000 * nat)) for t, flag, nat in zip(tokens, flags, nats, strict=True)]
        before = self._cells if self._canvas == event.canvas else [None] * len(cells)
        new = [place for place, (old, now) in enumerate(zip(before, cells, strict=True)) if old != now]
        self._canvas, self._cells = event.canvas, cells
        pieces = pieces_of(self._lm, [tokens[place] for place in new])
        return {
            "canvas": event.canvas,
            "step": event.step,
            "settled": event.settled,
            "retry": event.retry,
            "verifications": event.verifications,
            "entropy": round(sum(nats) / len(nats), 6),
            "cells": [
                [place, cells[place][0], piece, int(cells[place][1]), cells[place][2]]
                for place, piece in zip(new, pieces, strict=True)
            ],
        }


def frame(lm: LM, event: Denoised) -> dict[str, Any]:
    """What a step has made of its canvas.

    pieces: the text of the likeliest token at each position; accepted and changed: whether it is kept, and whether it
    is another than a step before; entropy: nats, in thousandths.
    """
    pieces = pieces_of(lm, event.argmax.tolist())
    return {
        "type": "diffusion_frame",
        "block": event.canvas,
        "step": event.step,
        "text": "".join(pieces),
        "canvas": {
            "pieces": pieces,
            "accepted": [int(flag) for flag in event.accepted.tolist()],
            "changed": [int(flag) for flag in event.changed.tolist()],
            "entropy": [round(1000 * value) for value in event.entropy.tolist()],
            "settled": event.settled,
        },
    }
