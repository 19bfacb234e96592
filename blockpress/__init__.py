"""blockpress writes text in blocks: the DiffusionGemma system in one readable package.

    import blockpress
    lm = blockpress.load("sudoku-nano")
    print(lm.generate(puzzle).text)

These are the public names; each is imported when it is first used, so that `import blockpress` costs nothing.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockpress.hardware import cores, cpu_quota

if TYPE_CHECKING:
    from blockpress.chat import MalformedToolCall, ToolCall
    from blockpress.config import ModelConfig, Sampling
    from blockpress.decide import (
        Choice,
        ChoiceAnswer,
        Decision,
        DecisionUsage,
        Score,
        ScoreAnswer,
        YesNo,
        YesNoAnswer,
    )
    from blockpress.decoding import (
        Committed,
        Denoised,
        Done,
        Event,
        MalformedToolCallEvent,
        ReasoningDelta,
        Reply,
        Text,
        TokenLogprob,
        ToolCallEvent,
        Usage,
    )
    from blockpress.errors import BlockpressError
    from blockpress.lm import LM, load

    Broken, BrokenCall = MalformedToolCallEvent, MalformedToolCall
    Called, Thought = ToolCallEvent, ReasoningDelta

# Torch's OpenMP reads this once, when torch is imported. Otherwise its threads would spin after each operation, on the
# cores that the pool in ops/native/pool.cpp uses: steps took 1.2 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# It knows this process's cores, but no container's quota of their time, with which most of its threads would be paused.
if cpu_quota() is not None:
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))

logging.getLogger("blockpress").addHandler(logging.NullHandler())  # silent, until the application wants to hear it

__version__ = "0.1.0"

_HOMES = {
    "BlockpressError": "errors",
    "MalformedToolCallEvent": "decoding",
    "MalformedToolCall": "chat",
    "ToolCallEvent": "decoding",
    "Committed": "decoding",
    "Denoised": "decoding",
    "Done": "decoding",
    "Event": "decoding",
    "LM": "lm",
    "ModelConfig": "config",
    "Reply": "decoding",
    "Sampling": "config",
    "Text": "decoding",
    "ReasoningDelta": "decoding",
    "TokenLogprob": "decoding",
    "ToolCall": "chat",
    "Usage": "decoding",
    "Choice": "decide",
    "ChoiceAnswer": "decide",
    "Decision": "decide",
    "DecisionUsage": "decide",
    "Score": "decide",
    "ScoreAnswer": "decide",
    "YesNo": "decide",
    "YesNoAnswer": "decide",
    "load": "lm",
}

__all__ = [
    "LM",
    "BlockpressError",
    "Choice",
    "ChoiceAnswer",
    "Committed",
    "Decision",
    "DecisionUsage",
    "Denoised",
    "Done",
    "Event",
    "MalformedToolCall",
    "MalformedToolCallEvent",
    "ModelConfig",
    "ReasoningDelta",
    "Reply",
    "Sampling",
    "Score",
    "ScoreAnswer",
    "Text",
    "TokenLogprob",
    "ToolCall",
    "ToolCallEvent",
    "Usage",
    "YesNo",
    "YesNoAnswer",
    "__version__",
    "load",
]


_RENAMED = {
    "Broken": "MalformedToolCallEvent",
    "BrokenCall": "MalformedToolCall",
    "Called": "ToolCallEvent",
    "Thought": "ReasoningDelta",
}
"""Names of version 0.1, to be removed in version 0.3."""


def _getattribute(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"blockpress.{name} is now blockpress.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'blockpress' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"blockpress.{_HOMES[name]}"), name)


if not TYPE_CHECKING:  # which knows the names from above, and would take every other name, too
    __getattr__ = _getattribute


def __dir__() -> list[str]:
    return list(__all__)
