"""What a step asks of the vocabulary and what it is told, on a processor and on a GPU alike.

They stand by themselves so that both versions, `step.py` and `ops/kernels/vocabulary.py`, can name them.

Invariant: no operation here, and no import of another module of `ops`.
Run it:  python -m pytest tests/ops/test_vocabulary_step.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

SignalKind = Literal["exact", "sparse"] | None
"""How the next signal is made: of all tokens, of the likeliest alone, or not at all."""

BannedTokens = tuple[Int[Tensor, " ids"], Bool[Tensor, "n ids"]]
"""Ids, and for each position which of them it must not take."""


@dataclass(frozen=True)
class SampleStats:
    """What a step makes of n positions; `signal` is in the hidden states' dtype, None where it was not wanted."""

    argmax: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    entropy: Float32[Tensor, " n"]
    signal: Float[Tensor, "n hidden"] | None
