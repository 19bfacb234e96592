"""Edits of a row's logits: `LogitEdits` of its sampling, with what it has written so far.

    prompt      p p p p                            repetition counts it
    answer      a a a a a a                        committed tokens: every penalty counts them
    canvas      c c ~ c ~ ~ c ~                    c: decided, ~: noise
    place 3           ^    answer and c c          counts what is before it, as it will be read
    repeat_last_n = 5      a a c c ~               of the last places before it, noise among them

Decided is what the last step accepted, and pins; nothing is at a canvas's first step. A place counts only what stands
before it: then the first of two equal tokens loses nothing, where each would otherwise drive the other out, and come
back with it. It is also what the causal pass counts, so verified decoding writes what autoregressive decoding does.
Stop ids are never penalised: a canvas is filled up with them after its end (docs/adr/0035-edits-of-logits.md).

Invariant: rows without edits have none of this; a row's edits depend on nothing but the row.
Run it:  python -m pytest tests/decoding/test_edits.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.config import LogitEdits
from blockpress.decoding.sequence import SequenceState
from blockpress.diffusion.pins import UNPINNED
from blockpress.ops.nucleus import Truncation
from blockpress.ops.transfer import to_device
from blockpress.ops.vocabulary import LogitChanges, Penalties


def truncation_of(edits: LogitEdits) -> Truncation | None:
    """What samples are cut down to; None: nothing is cut."""
    if not edits.truncates:
        return None
    return Truncation(top_k=edits.top_k, top_p=edits.top_p, min_p=edits.min_p)


def canvas_changes(
    row: SequenceState, decided: Sequence[int], length: int, vocab: int, device: torch.device
) -> LogitChanges | None:
    """The edits at the places of the row's current canvas; None: it has none.

    Args:
        decided: its tokens where the last step accepted them, `UNPINNED` elsewhere; empty before its first step.
        length: of a canvas.
    """
    if not row.edits.edits_logits:
        return None
    here = [row.pins.get(place, token) for place, token in enumerate(decided or [UNPINNED] * length)]
    counted = row.max_draft_tokens  # what comes after these is dropped
    return _changes(row, [*here[:counted], *[UNPINNED] * (length - counted)], vocab, device)


def causal_changes(row: SequenceState, tokens: Sequence[int], vocab: int, device: torch.device) -> LogitChanges | None:
    """The edits of what the causal pass predicts at the place of each of these tokens after the answer so far."""
    return _changes(row, tokens, vocab, device) if row.edits.edits_logits else None


def _changes(row: SequenceState, here: Sequence[int], vocab: int, device: torch.device) -> LogitChanges:
    edits = row.edits
    allowed, suppressed = edits.allowed_token_ids, frozenset(edits.suppress_tokens)
    label = torch.zeros(vocab, dtype=torch.int32)
    if allowed is not None:
        label.fill_(1)[torch.tensor(allowed)] = 0
    label[torch.tensor(edits.suppress_tokens, dtype=torch.int64)] = 1
    window, penalised = edits.repeat_last_n, edits.has_penalties
    answer = row.answer if penalised else []
    text = [*row.prompt, *answer] if penalised and edits.repetition_penalty != 1 else answer
    seen = set(text if window is None else text[max(0, len(text) - window) :])
    named = {*edits.logit_bias, *seen, *(here if penalised else ())} - suppressed - {UNPINNED}
    ids = sorted(named if allowed is None else named.intersection(allowed))
    at = torch.tensor(ids, dtype=torch.int64)
    label[at] = torch.arange(2, 2 + len(ids), dtype=torch.int32)
    bias = torch.tensor([edits.logit_bias.get(token, 0.0) for token in ids])
    penalties = None
    if penalised:
        column = {token: place for place, token in enumerate(ids) if token not in row.stop_ids}
        counts = _counts(column, len(ids), answer, here, window)
        penalties = Penalties(
            counts=to_device(counts, device),
            seen=to_device((counts if text is answer else _counts(column, len(ids), text, here, window)) > 0, device),
            presence=edits.presence_penalty,
            frequency=edits.frequency_penalty,
            repetition=edits.repetition_penalty,
        )
    label, at, bias = (to_device(each, device) for each in (label, at, bias))
    return LogitChanges(label=label, ids=at, bias=bias, penalties=penalties)


def _counts(
    column: Mapping[int, int], width: int, before: Sequence[int], here: Sequence[int], window: int | None
) -> Float32[Tensor, "places ids"]:
    """How often each token stands among the last `window` places before each place; None: among all.

    Args:
        column: of the tokens that are counted, among `width`.
        before: the tokens in front of the first place. here: those of the places.
    """
    text, start = [*before, *here], len(before)
    reach = len(text) if window is None else window
    changes = [(0, token, count) for token, count in Counter(text[max(0, start - reach) : start]).items()]
    for place in range(1, len(here)):  # one token comes into the window, and one leaves it
        end = start + place - 1
        changes += [(place, text[end], 1), *([(place, text[end - reach], -1)] if end >= reach else [])]
    counts = torch.zeros(len(here), width)
    if known := [(place, column[token], count) for place, token, count in changes if token in column]:
        places, columns, values = zip(*known, strict=True)
        at = torch.tensor(places), torch.tensor(columns)
        counts.index_put_(at, torch.tensor(values, dtype=torch.float32), accumulate=True)
    return counts.cumsum(0)
