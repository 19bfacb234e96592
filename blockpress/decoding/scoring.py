"""Scores of tokens under the causal pass: the tokens that it would have written, and the log-probabilities of both.

    context ... c      tokens   t0   t1   t2
    hidden state of    c        t0   t1              each predicts the token after it
    predicts           t0       t1   t2

Log-probabilities are the model's own: at temperature 1, ignoring the row's banned ids and edits of its logits (vLLM's
"raw_logprobs"). The token that it would have written is the likeliest one that the row has not banned, after the edits,
as in autoregressive decoding. Under a constraint both are those of the tokens that may stand there after the ones
before: all others have probability 0.

Invariant: memory does not grow with tokens times vocabulary: `ops/vocabulary` holds one block of logits at a time.
Run it:  python -m pytest tests/decoding/test_scoring.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blockpress.config import Sampling
from blockpress.decoding import Cancel, SequenceState, TokenLogprob
from blockpress.decoding.edits import causal_changes
from blockpress.decoding.generate import pad
from blockpress.diffusion import TokenMask
from blockpress.errors import EngineError
from blockpress.model import Cache, Network
from blockpress.ops import vocabulary
from blockpress.ops.transfer import to_device, to_host

LastHidden = Float[Tensor, "rows 1 hidden"]
"""The hidden state of the last token of each row's context."""
PIECE = 512
"""Tokens of a prompt that `score_prompt` reads at a time."""
States = Float[Tensor, "rows states hidden"]
"""Hidden states that predict tokens: at position i, the state of the token before token i."""
Forbid = Callable[[slice, Float[Tensor, "positions vocab"]], None]
"""Sets the products of some positions to -inf where a token may not stand."""


@dataclass(frozen=True)
class TokenScores:
    """The causal pass's scores of some tokens of a row, one entry per position.

    greedy_ids: the tokens that it would have written. logprobs, greedy_logprobs: the log-probabilities of the row's
    tokens and of the greedy ones; empty for a row that wants none. edited_logprobs: those of the row's tokens after its
    edits; empty for a row without edits, and where no draft is verified or repaired.
    """

    greedy_ids: list[int]
    logprobs: list[TokenLogprob]
    greedy_logprobs: list[TokenLogprob]
    edited_logprobs: list[float] = field(default_factory=list)


def causal_forward(
    network: Network, drafts: Sequence[list[int]], last: LastHidden, cache: Cache
) -> tuple[States, Cache]:
    """The causal pass over drafts, tokens that may still be rejected: one list per row, which may be empty.

    Args:
        last: the hidden state of the last token in the cache.

    Returns:
        the hidden states that predict them, starting with `last` and ending with the state after the last token,
        [rows, 1 + longest draft, hidden]; and the cache with all the tokens.
    """
    if not any(drafts):
        return last, cache
    padded, counts = pad(network, drafts)
    hidden, cache = network.read(padded, cache, counts)
    return torch.cat((last, hidden), dim=1), cache


def score_tokens(
    network: Network,
    states: States,
    rows: Sequence[SequenceState],
    drafts: Sequence[list[int]],
    wanted: Sequence[int | None] | None = None,
) -> list[TokenScores]:
    """Score one list of tokens per row, given the hidden states that predict them (`causal_forward`).

    `wanted`: of each row the number of alternatives with its log-probabilities, None for no log-probabilities. Without
    it, what the rows report.
    """
    wanted = [row.logprobs for row in rows] if wanted is None else wanted
    if not any(drafts):
        return [TokenScores([], [], []) for _ in drafts]
    tops = [top for top in wanted if top is not None]
    scores = _score(
        network,
        torch.cat([states[row, : len(draft)] for row, draft in enumerate(drafts)]),
        [token for draft in drafts for token in draft],
        max(tops) if tops else None,
        banned=_banned(rows, drafts, network.device),
        forbid=_forbid(rows, drafts, network.device),
    )
    split = _split_by_row(wanted, drafts, scores)
    for place, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        if draft and isinstance(row.edits, Sampling) and row.edits.reads_drafts and row.edits.edits_logits:
            split[place] = _edited(network, states[place, : len(draft)], row, draft, split[place])
    return split


def _edited(
    network: Network, states: Float[Tensor, "tokens hidden"], row: SequenceState, draft: list[int], scores: TokenScores
) -> TokenScores:
    """The scores of a row's draft with the tokens that are greedy after the row's edits."""
    config, device = network.config, network.device
    changes = causal_changes(row, draft, config.vocab_size, device)
    assert changes is not None
    edited = vocabulary.score_edited(
        states,
        network.embed_tokens.weight,
        changes,
        cap=config.softcap,
        tokens=to_device(torch.tensor(draft), device),
        wide=config.has_canvas,
        banned=_banned([row], [draft], device),
        forbid=_forbid([row], [draft], device),
    )
    greedy, before, after = to_host(torch.stack([x.double() for x in vars(edited).values()])).tolist()
    pairs = zip(greedy, before, scores.greedy_logprobs, strict=False)
    return replace(
        scores,
        greedy_ids=[int(token) for token in greedy],
        greedy_logprobs=[TokenLogprob(int(token), logprob, scored.top) for token, logprob, scored in pairs],
        edited_logprobs=after,
    )


@torch.inference_mode()
def score_prompt(
    network: Network, prompt: Sequence[int], top: int = 0, cancel: Cancel | None = None
) -> list[TokenLogprob]:
    """The log-probability of every token of a prompt after those before it, from the second one on.

    Args:
        prompt: one token or more. top: how many of the likeliest tokens come with each.
        cancel: checked between two pieces; once it is set, what was scored until then is returned.

    Raises:
        EngineError: the network gave NaN.
    """
    scored: list[TokenLogprob] = []
    cache = network.empty_cache(1)
    for start in range(0, len(prompt) - 1, PIECE):
        if cancel is not None and cancel.is_set():
            break
        tokens = list(prompt[start : start + PIECE + 1])  # the last one is predicted, and read with the next piece
        padded, counts = pad(network, [tokens[:-1]])
        hidden, cache = network.read(padded, cache, counts)
        scored += _score(network, hidden[0], tokens[1:], top).logprobs
    if any(math.isnan(each.logprob) for each in scored):
        raise EngineError("the network gave NaN for the prompt", hint="its weights are damaged, or overflow this dtype")
    return scored


def _score(
    network: Network,
    states: Float[Tensor, "tokens hidden"],
    tokens: list[int],
    top: int | None,
    banned: vocabulary.BannedTokens | None = None,
    forbid: Forbid | None = None,
) -> TokenScores:
    """The scores of tokens, given the state that predicts each; without `top` the greedy tokens only."""
    config = network.config
    result = vocabulary.score_targets(
        states,
        network.embed_tokens.weight,
        cap=config.softcap,
        tokens=to_device(torch.tensor(tokens), network.device),
        top=None if top is None else min(top, config.vocab_size),
        wide=config.has_canvas,
        banned=banned,
        forbid=forbid,
    )
    columns = [result.greedy[:, None]]
    if result.logprobs is not None:
        parts = result.logprobs
        columns += [parts.target[:, None], parts.greedy[:, None], parts.top_ids, parts.top]
    # One copy, waited for once; float64 holds ids exactly.
    table = to_host(torch.cat([column.double() for column in columns], dim=1)).tolist()
    greedy_ids, logprobs, greedy_logprobs = [int(line[0]) for line in table], [], []
    for token, (greedy, *line) in zip(tokens, [] if top is None else table, strict=top is not None):
        logprob, greedy_logprob, *best = line
        ids, values = map(int, best[: len(best) // 2]), best[len(best) // 2 :]
        pairs = tuple(pair for pair in zip(ids, values, strict=True) if pair[1] > -math.inf)
        logprobs.append(TokenLogprob(token, logprob, pairs))
        greedy_logprobs.append(TokenLogprob(int(greedy), greedy_logprob, pairs))
    return TokenScores(greedy_ids, logprobs, greedy_logprobs)


def _banned(
    rows: Sequence[SequenceState], drafts: Sequence[list[int]], device: torch.device
) -> vocabulary.BannedTokens | None:
    """The rows' banned ids, one entry for each token of the drafts."""
    token_mask = TokenMask.of([row.banned_ids for row in rows], max(map(len, drafts)), device)
    if token_mask is None:
        return None
    return token_mask.ids, torch.cat([token_mask.banned[row, : len(draft)] for row, draft in enumerate(drafts)])


def _forbid(rows: Sequence[SequenceState], drafts: Sequence[list[int]], device: torch.device) -> Forbid | None:
    """Masks what the rows' constraints do not allow at each token of the drafts; None if no row has one."""
    if all(row.constraint is None for row in rows):
        return None
    allowed: list[tuple[Bool[Tensor, " classes_and_one"], Int[Tensor, " vocab"]] | None] = []
    for row, draft in zip(rows, drafts, strict=True):
        constraint = row.canvas_constraint
        if constraint is None:
            allowed += [None] * len(draft)
        else:
            class_of = to_device(torch.from_numpy(constraint.automaton.class_of).long(), device)
            table = to_device(torch.from_numpy(constraint.allowed(draft)), device)
            allowed += [(line, class_of) for line in table]

    def forbid(positions: slice, products: Float[Tensor, "positions vocab"]) -> None:
        for line, known in zip(products, allowed[positions], strict=True):
            if known is not None:
                classes, class_of = known
                line.masked_fill_(~classes[class_of], -math.inf)

    return forbid


def _split_by_row(wanted: Sequence[int | None], drafts: Sequence[list[int]], scores: TokenScores) -> list[TokenScores]:
    """Split the scores of all tokens into those of each row's draft, with as many alternatives as the row wants."""
    result, start = [], 0
    for top, draft in zip(wanted, drafts, strict=True):
        part, start = slice(start, start + len(draft)), start + len(draft)
        own, greedy = (() if top is None else x[part] for x in (scores.logprobs, scores.greedy_logprobs))
        result.append(TokenScores(scores.greedy_ids[part], _with_top(own, top or 0), _with_top(greedy, top or 0)))
    return result


def _with_top(logprobs: Sequence[TokenLogprob], top: int) -> list[TokenLogprob]:
    return [TokenLogprob(scored.token, scored.logprob, scored.top[:top]) for scored in logprobs]


def gather_last_hidden(states: States, num_kept: Int[Tensor, " rows"]) -> LastHidden:
    """The hidden state after the first `num_kept` tokens of each row's draft, out of those of `causal_forward`."""
    return states.gather(1, num_kept[:, None, None].expand(-1, 1, states.shape[-1]))
