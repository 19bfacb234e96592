"""From checked prompts to rows (`SequenceState`), each with its seed, its limits and its room in the context.

Invariant: a row is created only if its prompt and at least one canvas fit into the model's context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from blockpress.chat import EncodedChat
from blockpress.config import ModelConfig
from blockpress.config.checks import value_text
from blockpress.constrain import Constraint, ConstraintState
from blockpress.decoding import Given, OutputProcessor, SequenceState
from blockpress.errors import PromptTooLong, RequestError
from blockpress.lm.arguments import as_list, check_logprobs, is_integer
from blockpress.model import VisionTower
from blockpress.ops.computing import computing


def make_sequences(
    prompts: list[list[int]],
    seed: int | Sequence[int],
    make_processor: Callable[[list[int]], OutputProcessor],
    canvas: int,
    config: ModelConfig,
    *,
    max_tokens: int | None,
    stop_ids: Sequence[int],
    logprobs: int | None = None,
    constraints: Sequence[Constraint | None] = (),
    given: Given | None = None,
) -> list[SequenceState]:
    """A row for each prompt, or for each seed if there is one prompt; `canvas` is the canvas length, 1 for
    autoregressive decoding. `constraints`: of each prompt; none if it is empty.

    Raises:
        RequestError: max_tokens, seed or logprobs are invalid. PromptTooLong: no room for a canvas.
    """
    logprobs = check_logprobs(logprobs, config)
    seeds = [cast(int, seed)] * len(prompts) if is_integer(seed) else as_list(cast("Sequence[int]", seed), "seed")
    if len(prompts) == 1 and not is_integer(seed):
        prompts, constraints = prompts * len(seeds), [*constraints] * len(seeds)
    if len(seeds) != len(prompts):
        raise RequestError(f"seed has {len(seeds)} entries", hint=f"give one for each of the {len(prompts)} prompts")
    rows = []
    for index, (ids, row_seed) in enumerate(zip(prompts, seeds, strict=True)):
        check_context_length(config, len(ids), canvas)
        room = config.context_length - len(ids)
        constraint = constraints[index] if constraints else None
        row_given, pins = Given() if given is None else given, {} if given is None else given.pins
        state = None if constraint is None else ConstraintState(constraint, pins)
        rows.append(
            SequenceState(
                index,
                ids,
                row_seed,
                stop_ids=stop_ids,
                canvas_length=canvas,
                room=room,
                max_tokens=max_tokens,
                processor=make_processor(ids),
                logprobs=logprobs,
                constraint=state,
                given=row_given,
            )
        )
        rows[-1].check_given()
    return rows


@computing()
@torch.inference_mode()
def attach_images(rows: list[SequenceState], chats: Sequence[EncodedChat], tower: Callable[[], VisionTower]) -> None:
    """Put the images' features into the rows; one conversation may have several rows with different seeds."""
    pairs = [zip(chat.image_spans, tower()(chat.pictures), strict=True) if chat.pictures else () for chat in chats]
    images = [{span.start: features for span, features in each} for each in pairs]
    for row in rows:
        row.images = images[row.index if len(images) > 1 else 0]


def check_ids(config: ModelConfig, ids: Sequence[int] | Tensor, name: str) -> list[int]:
    """Token ids in the model's vocabulary, at least one. Raises RequestError."""
    listed = as_list(ids, name)
    if not listed:
        raise RequestError(f"{name} is empty", hint="give at least one token")
    for position, token in enumerate(listed):
        if not 0 <= token < config.vocab_size:
            raise RequestError(
                f"{name} holds id {value_text(token)} at position {position}",
                hint=f"ids go from 0 to {config.vocab_size - 1}",
            )
    return listed


def check_context_length(config: ModelConfig, prompt: int, canvas: int) -> None:
    """Raises PromptTooLong: a prompt of `prompt` tokens leaves no room for a canvas."""
    if prompt + canvas > config.context_length:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens, a canvas {canvas}, the model's context {config.context_length}",
            hint=f"shorten the prompt to {config.context_length - canvas} tokens or fewer",
        )
