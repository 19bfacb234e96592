"""The state of one answer while it grows (`SequenceState`), how its tokens become output (`OutputProcessor`), and what
the caller gets (events, `Reply`).

Invariant: everything specific to one answer is kept here or in its output processor, never in the loop that writes it.
"""

from blockpress.decoding.early import EarlyText
from blockpress.decoding.events import (
    Cancel,
    Committed,
    Denoised,
    Done,
    Event,
    Failed,
    FinishReason,
    MalformedToolCallEvent,
    ReasoningDelta,
    Reply,
    Text,
    TokenLogprob,
    ToolCallEvent,
    Usage,
)
from blockpress.decoding.given import Given
from blockpress.decoding.output import Decoder, OutputProcessor, TextOutputProcessor, common_prefix
from blockpress.decoding.sequence import FinishedCanvas, SequenceState

__all__ = [
    "Cancel",
    "Committed",
    "Decoder",
    "Denoised",
    "Done",
    "EarlyText",
    "Event",
    "Failed",
    "FinishReason",
    "FinishedCanvas",
    "Given",
    "MalformedToolCallEvent",
    "OutputProcessor",
    "ReasoningDelta",
    "Reply",
    "SequenceState",
    "Text",
    "TextOutputProcessor",
    "TokenLogprob",
    "ToolCallEvent",
    "Usage",
    "common_prefix",
]
