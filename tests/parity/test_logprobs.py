"""Log-probabilities of answers against `transformers`: its causal logits over prompt and answer, both families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from blockpress.checkpoints import load_network
from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Done, Reply, SequenceState
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.verified import generate_verified
from blockpress.model import Network

from .checkpoints import TINY
from .oracle import CACHE, _head, build, network_like
from .siblings import CASES, checkpoint, prompts
from .test_sibling import their_logits

pytestmark = pytest.mark.parity

TOP = 3


def answers(network: Network, rows: Sequence[list[int]], sampling: Sampling | AutoregressiveSampling) -> list[Reply]:
    diffusion = isinstance(sampling, Sampling)
    length = network.config.canvas_length if diffusion else 1
    given = {"stop_ids": (), "canvas_length": length, "room": 60, "max_tokens": 14, "logprobs": TOP}
    made = [SequenceState(index, row, index, **given) for index, row in enumerate(rows)]
    events = (
        generate_verified(network, made, sampling) if diffusion else generate_autoregressive(network, made, sampling)
    )  # type: ignore[arg-type]
    found = {event.row: event.reply for event in events if isinstance(event, Done)}
    return [found[index] for index in range(len(rows))]


def check(reply: Reply, prompt: Sequence[int], logits: Tensor) -> None:
    """`logits`: of all of prompt and answer, [length, vocabulary]."""
    log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    assert reply.logprobs is not None and [said.token for said in reply.logprobs] == reply.tokens
    own = log_p.gather(-1, torch.tensor(reply.tokens)[:, None])[:, 0]
    assert [said.logprob for said in reply.logprobs] == pytest.approx(own.tolist(), abs=1e-4)
    best = log_p.topk(TOP).values
    assert [value for said in reply.logprobs for _, value in said.top] == pytest.approx(
        best.flatten().tolist(), abs=1e-4
    )


@pytest.mark.parametrize("checks", [0, 2])
def test_logprobs_of_canvases_equal_the_oracle_s(checks: int) -> None:
    config = replace(TINY, canvas_length=8)
    theirs = build(config, 0)
    theirs.set_attn_implementation("eager")
    rows = [[3, 4, 5], [9] * 20, [7]]
    replies = answers(network_like(theirs, config), rows, Sampling(steps=3, max_verifications=checks))
    for prompt, reply in zip(rows, replies, strict=True):
        out = theirs(
            input_ids=torch.tensor([[*prompt, *reply.tokens]]),
            decoder_input_ids=torch.zeros(1, 8, dtype=torch.long),
            **{CACHE: DynamicCache(config=theirs.config.text_config)},
        )
        check(reply, prompt, _head(theirs, out.encoder_last_hidden_state[0]))


@pytest.mark.parametrize("name", ["experts, keys are values", "dense, saved by itself, no softcap"])
def test_logprobs_of_autoregressive_tokens_equal_the_oracle_s(name: str, workspace: object) -> None:
    theirs, directory = checkpoint(name, workspace)  # type: ignore[arg-type]
    rows = prompts(CASES[name], seed=2)
    replies = answers(load_network(directory), rows, AutoregressiveSampling(temperature=1.0))
    whole = [[*prompt, *reply.tokens] for prompt, reply in zip(rows, replies, strict=True)]
    for prompt, reply, logits in zip(rows, replies, their_logits(theirs, whole, "eager"), strict=True):
        check(reply, prompt, logits)
