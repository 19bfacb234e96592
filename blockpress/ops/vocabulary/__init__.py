"""What a step needs from the logits over the vocabulary, without ever holding them all as float32.

    plain.py     entropy and sample from float32 logits: the reference
    types.py     arguments and results of a step
    step.py      argmax, sample, entropy and self-conditioning embedding, from hidden states
    conditioned.py  the same for a canvas under a constraint
    changes.py   biases, bans and penalties of tokens, for either
    causal.py    greedy tokens, and logprobs of given tokens, from hidden states
    blocks.py    the products of the head, a block of rows at a time, and the choice between:
    passes.py    the pass over a block in torch
    native.py    the same in C++ (`ops/native/vocabulary.cpp`)
    fused.py     a step in float32 in C++ tile by tile, with no block of products (`ops/native/head.h`)

Invariant: both versions round where the reference rounds and give its tokens; memory does not grow with rows x
vocabulary.
Run it:  python -m pytest tests/ops/test_vocabulary.py tests/ops/test_vocabulary_step.py
"""

from blockpress.ops.vocabulary.blocks import Room
from blockpress.ops.vocabulary.causal import EditedScores, TargetScores, score_edited, score_ids, score_targets
from blockpress.ops.vocabulary.changes import Condition, LogitChanges, Penalties
from blockpress.ops.vocabulary.conditioned import sample_conditioned
from blockpress.ops.vocabulary.passes import class_stats
from blockpress.ops.vocabulary.plain import TILE, entropy, sample
from blockpress.ops.vocabulary.step import sample_from_hidden
from blockpress.ops.vocabulary.types import BannedTokens, ClassBias, ClassStats, SampleStats, SignalKind, TokenClasses

__all__ = [
    "TILE",
    "BannedTokens",
    "ClassBias",
    "ClassStats",
    "Condition",
    "EditedScores",
    "LogitChanges",
    "Penalties",
    "Room",
    "SampleStats",
    "SignalKind",
    "TargetScores",
    "TokenClasses",
    "class_stats",
    "entropy",
    "sample",
    "sample_conditioned",
    "sample_from_hidden",
    "score_edited",
    "score_ids",
    "score_targets",
]
