"""The answer to one prompt while it grows (`Row`), how it is read (`Turn`), what is told of it (events, `Reply`).

Invariant: whatever is special about one answer lives here or in its turn, never in the loop that writes it.
"""

from blockpress.decoding.events import (
    Broken,
    Called,
    Committed,
    Denoised,
    Done,
    Event,
    Failed,
    FinishReason,
    Reply,
    Text,
    Thought,
    TokenLogprob,
    Usage,
)
from blockpress.decoding.output import Decoder, PlainTurn, Turn
from blockpress.decoding.sequence import Cancel, FinishedCanvas, Row, common_prefix, denoised

__all__ = [
    "Broken",
    "Called",
    "Cancel",
    "Committed",
    "Decoder",
    "Denoised",
    "Done",
    "Event",
    "Failed",
    "FinishReason",
    "FinishedCanvas",
    "PlainTurn",
    "Reply",
    "Row",
    "Text",
    "Thought",
    "TokenLogprob",
    "Turn",
    "Usage",
    "common_prefix",
    "denoised",
]
