"""What a step needs from the logits over the vocabulary, without ever holding them as float32.

    plain.py     entropy and sample from float32 logits: the truth
    types.py     what a step asks and is told
    step.py      see: argmax, sample, entropy and signal from hidden states
    causal.py    judge: greedy tokens and log-probabilities, from hidden states
    blocks.py    the products of the head a block of rows at a time, and who reads them:
    passes.py    the pass over a block in torch
    native.py    the same in C++ (`ops/native/vocabulary.cpp`)

Invariant: both versions round where the truth rounds and give its tokens; memory does not grow with rows x vocabulary.
Run it:  python -m pytest tests/ops/test_vocabulary.py tests/ops/test_vocabulary_step.py
"""

from blockpress.ops.vocabulary.causal import TargetScores, score_targets
from blockpress.ops.vocabulary.plain import TILE, entropy, sample
from blockpress.ops.vocabulary.step import sample_from_hidden
from blockpress.ops.vocabulary.types import BannedTokens, SampleStats, SignalKind

__all__ = [
    "TILE",
    "BannedTokens",
    "SampleStats",
    "SignalKind",
    "TargetScores",
    "entropy",
    "sample",
    "sample_from_hidden",
    "score_targets",
]
