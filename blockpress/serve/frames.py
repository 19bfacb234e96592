"""A step of the canvas as it goes over the wire: an extra key of a stream's chunk, which plain clients pass over."""

from __future__ import annotations

from typing import Any

from blockpress.decoding import Denoised
from blockpress.lm import LM


def frame(lm: LM, event: Denoised) -> dict[str, Any]:
    """What a step has made of its canvas.

    pieces: the text of the likeliest token at each position; accepted and changed: whether it is kept, and whether it
    is another than a step before; entropy: nats, in thousandths.
    """
    tokens = event.argmax.tolist()
    assert lm.tokenizer is not None
    raw = lm.tokenizer.token_bytes()
    pieces = [(raw[token] or lm.tokenizer.token(token).encode()).decode("utf-8", "replace") for token in tokens]
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
