"""What the causal pass thinks of tokens: which it would have written, and how likely it holds those that stand there.

    context ... c      tokens   t0   t1   t2
    state behind       c        t0   t1              each speaks of the token below the next place
    speaks of          t0       t1   t2

Log-probabilities are the model's own: at temperature 1, whatever a row is banned. What it would have written is the
best of what the row is not banned, as token by token.

Invariant: memory does not grow with tokens times vocabulary: `ops/vocabulary` holds a block of products at a time.
Run it:  python -m pytest tests/decoding/test_scoring.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blockpress.decoding import SequenceState, TokenLogprob
from blockpress.decoding.generate import pad
from blockpress.diffusion import TokenMask
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device, to_host

Last = Float[Tensor, "rows 1 hidden"]
"""The hidden state of the last token of each row's context."""
States = Float[Tensor, "rows states hidden"]
"""Hidden states that speak of tokens: at place i that of the token before token i."""


@dataclass(frozen=True)
class TokenScores:
    """What the causal pass says of some tokens of a row, place by place.

    expected: what it would have written there. said, instead: the log-probabilities of the tokens and of the expected
    ones; nothing where the row does not tell any.
    """

    greedy_ids: list[int]
    logprobs: list[TokenLogprob]
    greedy_logprobs: list[TokenLogprob]


def causal_forward(network: Network, asked: Sequence[list[int]], last: Last, cache: Cache) -> tuple[States, Cache]:
    """The causal pass over tokens that may yet be taken back: one list a row, which may be empty.

    Args:
        last: of the context that the cache holds.

    Returns:
        the states that speak of them, `last` first, and behind the tokens that of the last of them: 1 + longest a row;
        and the cache with all the tokens.
    """
    if not any(asked):
        return last, cache
    padded, counts = pad(network, asked)
    hidden, cache = network.read(padded, cache, counts)
    return torch.cat((last, hidden), dim=1), cache


def score_tokens(
    network: Network, states: States, rows: Sequence[SequenceState], asked: Sequence[list[int]]
) -> list[TokenScores]:
    """What the causal pass says of one list of tokens a row, given the states that speak of them (`causal_forward`)."""
    if not any(asked):
        return [TokenScores([], [], []) for _ in asked]
    config, tokens = network.config, [token for own in asked for token in own]
    tops = [row.logprobs for row in rows if row.logprobs is not None]
    found = vocabulary.score_targets(
        torch.cat([states[row, : len(own)] for row, own in enumerate(asked)]),
        network.embed_tokens.weight,
        cap=config.softcap,
        tokens=to_device(torch.tensor(tokens), network.device),
        top=min(max(tops), config.vocab_size) if tops else None,
        wide=config.has_canvas,
        banned=_banned(rows, asked, network.device),
    )
    columns = [found.greedy[:, None]]
    if found.logprobs is not None:
        told = found.logprobs
        columns += [told.target[:, None], told.greedy[:, None], told.top_ids, told.top]
    table = to_host(
        torch.cat([column.double() for column in columns], dim=1)
    ).tolist()  # waited for once; ids are exact
    expected, said, instead = [int(line[0]) for line in table], [], []
    for token, (greedy, *line) in zip(tokens, table if tops else [], strict=bool(tops)):
        own, best, *top = line
        ids, values = map(int, top[: len(top) // 2]), top[len(top) // 2 :]
        pairs = tuple(zip(ids, values, strict=True))
        said.append(TokenLogprob(token, own, pairs))
        instead.append(TokenLogprob(int(greedy), best, pairs))
    return _a_row_each(rows, asked, TokenScores(expected, said, instead))


def _banned(
    rows: Sequence[SequenceState], asked: Sequence[list[int]], device: torch.device
) -> vocabulary.BannedTokens | None:
    """The rows' banned ids for the tokens that are asked about, every one a row of its own."""
    edits = TokenMask.of([row.banned_ids for row in rows], max(map(len, asked)), device)
    if edits is None:
        return None
    return edits.ids, torch.cat([edits.banned[row, : len(own)] for row, own in enumerate(asked)])


def _a_row_each(rows: Sequence[SequenceState], asked: Sequence[list[int]], every: TokenScores) -> list[TokenScores]:
    """Cut what was found for all tokens into what each row asked for."""
    found, start = [], 0
    for row, own in zip(rows, asked, strict=True):
        part, top, start = slice(start, start + len(own)), row.logprobs, start + len(own)
        told = [[], []] if top is None else [_shortened(x[part], top) for x in (every.logprobs, every.greedy_logprobs)]
        found.append(TokenScores(every.greedy_ids[part], *told))
    return found


def _shortened(said: Sequence[TokenLogprob], top: int) -> list[TokenLogprob]:
    return [TokenLogprob(each.token, each.logprob, each.top[:top]) for each in said]


def gather_last_hidden(states: States, kept: Int[Tensor, " rows"]) -> Last:
    """Of what `causal_forward` gave: the state behind the first `kept` tokens of each row."""
    return states.gather(1, kept[:, None, None].expand(-1, 1, states.shape[-1]))
