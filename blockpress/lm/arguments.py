"""The forms that prompts, token ids and seeds may have, and how each is recognised.

Invariant: a value of a wrong type is refused by the name of its argument, before any forward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, TypedDict, TypeGuard, cast, get_args

import numpy as np
import torch
from torch import Tensor

from blockpress.config import AutoregressiveSampling, GenerationConfig, LogitEdits, ModelConfig, Sampling
from blockpress.config.checks import is_count, value_text
from blockpress.config.sampling import DEFAULT_MAX_VERIFICATIONS
from blockpress.decoding import Cancel
from blockpress.decoding.sequence import MOST_LOGPROBS
from blockpress.errors import RequestError

Prompt = str | Sequence[int] | Tensor
Conversation = Sequence[Mapping[str, Any]]
Mode = Literal["diffusion", "verified", "autoregressive"]
AnySampling = Sampling | AutoregressiveSampling
"""How canvases are denoised, or how single tokens are chosen."""


class ConstraintOptions(TypedDict, total=False):
    """What the answer must be; at most one of them is given.

    regex: a regular expression in Python's syntax that matches the whole answer. choice: texts, of which the answer is
    one. schema: a JSON schema of the value that the answer, a JSON text, stands for. grammar: a context-free grammar in
    Lark's syntax, which derives the answer from its rule `start` (docs/constraints.md has what each may hold).
    """

    regex: str | None
    choice: Sequence[str] | None
    schema: Mapping[str, Any] | bool | None
    grammar: str | None


class GivenOptions(TypedDict, total=False):
    """What is given of the answer.

    pins: position in the answer to the id of the token that stands there. draft: text or ids that the answer starts
    from. noise: share of the draft's tokens that random ones replace, from 0 to 1; None: 0.5 (docs/infilling.md).
    """

    pins: Mapping[int, int] | None
    draft: str | Sequence[int] | Tensor | None
    noise: float | None


class RequestOptions(ConstraintOptions, GivenOptions, total=False):
    """The options of `LM.build_requests`; `lm.requests.RequestBuilder.for_prompts` describes them."""

    mode: Mode | None
    logprobs: int | None


class GenerateOptions(RequestOptions, total=False):
    """The options of `LM.generate`: `cancel` beside those of its requests."""

    cancel: Cancel | None


class ChatRequestOptions(ConstraintOptions, total=False):
    """The options of `LM.build_chat_requests`; `lm.requests.RequestBuilder.for_chats` describes them."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    thinking: bool
    thinking_budget: int | None
    max_tokens: int | None
    sampling: AnySampling | None
    retry_empty: bool
    soft_tokens: int | None
    mode: Mode | None
    logprobs: int | None
    draft: str | None
    noise: float | None


class ChatOptions(ChatRequestOptions, total=False):
    """The options of `LM.chat`: `cancel` beside those of its requests."""

    cancel: Cancel | None


class DecideOptions(TypedDict, total=False):
    """The options of `LM.decide`.

    form: the canvas's text around the answers, one more than there are questions; the options stand in it as they are,
    and the context is the whole prompt. None: a line for each answer, its options as labels. steps: denoising steps, of
    which the last is read (default 1). draws: how many draws of noise in the slots are averaged (default 1). seed: of
    these (default 0).
    """

    form: Sequence[str] | None
    steps: int
    draws: int
    seed: int


def is_integer(value: object) -> bool:
    """Whether it is an integer, NumPy's included; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_batch(prompt: object) -> bool:
    """Whether it is a list of prompts, rather than one text, one list of ids or one 1-D tensor."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 2
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(not is_token_id(x) for x in prompt)


def is_token_id(value: object) -> bool:
    """Whether it can stand for one token id."""
    return value.ndim == 0 if isinstance(value, Tensor) else hasattr(value, "__index__")


def as_list(ids: Sequence[int] | Tensor, name: str) -> list[int]:
    """The integers of a list, a tuple, or a 1-D tensor or array. Raises RequestError: it is something else."""
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        return ids.tolist()
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(
                f"{name} is a tensor of shape {tuple(ids.shape)}, {ids.dtype}", hint=f"{name} must be 1-D whole numbers"
            )
        return ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise RequestError(
            f"{name} is {value_text(ids)}", hint=f"{name} must be a list or a 1-D tensor of whole numbers"
        )
    try:
        return [operator.index(x) for x in ids]
    except TypeError:
        raise RequestError(f"{name} is {value_text(ids)}", hint=f"{name} must hold whole numbers only") from None


def are_conversations(messages: object) -> TypeGuard[Sequence[Conversation]]:
    """Whether it is a list of conversations, rather than one list of messages."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        return False
    return bool(messages) and isinstance(messages[0], list | tuple)


def check_mode(mode: object, config: ModelConfig) -> Mode:
    """The decoding mode; None: diffusion if the model has a canvas. Raises RequestError: the model has no such mode."""
    if mode is None:
        return "diffusion" if config.has_canvas else "autoregressive"
    if mode not in get_args(Mode):
        raise RequestError(
            f"mode is {value_text(mode)}", hint=f"mode must be {', '.join(map(repr, get_args(Mode)))}, or None"
        )
    if mode != "autoregressive" and not config.has_canvas:
        raise RequestError(
            f"mode is {value_text(mode)}",
            hint=f"a model of the family {config.family} has no canvas: use 'autoregressive'",
        )
    return cast("Mode", mode)


def check_sampling(
    sampling: object, mode: object, generation: GenerationConfig, config: ModelConfig, *, has_text: bool
) -> AnySampling:
    """The sampling of a mode; None: the checkpoint's. In the mode "verified", `max_verifications` of 0 is the default.

    Raises:
        RequestError: a mode that the model does not have, sampling of another type, stop texts without a tokenizer,
            token ids that are not in the vocabulary.
    """
    chosen = check_mode(mode, config)
    kind = AutoregressiveSampling if chosen == "autoregressive" else Sampling
    if sampling is None:
        sampling = generation.autoregressive if chosen == "autoregressive" else generation.sampling
    if not isinstance(sampling, kind):
        raise RequestError(
            f"sampling is {value_text(sampling)}", hint=f"give a blockpress.{kind.__name__} in the mode {chosen!r}"
        )
    if sampling.stop and not has_text:
        raise RequestError(
            f"sampling.stop is {sampling.stop!r}", hint="stop texts need a tokenizer; this model has none"
        )
    check_edits(sampling, config)
    if chosen == "verified" and isinstance(sampling, Sampling) and not sampling.max_verifications:
        return sampling.with_(max_verifications=DEFAULT_MAX_VERIFICATIONS)
    return sampling


def check_edits(edits: LogitEdits, config: ModelConfig) -> None:
    """Raises RequestError: edits name a token that is not in the vocabulary, or ban all of it."""
    for name, ids in edits.token_ids.items():
        token = max(ids, default=0)
        if token >= config.vocab_size:
            raise RequestError(
                f"sampling.{name} has token id {token}", hint=f"ids go from 0 to {config.vocab_size - 1}"
            )
    if len(edits.suppress_tokens) == config.vocab_size:
        raise RequestError("sampling.suppress_tokens bans the whole vocabulary", hint="leave some token allowed")


def check_cancel(cancel: object) -> Cancel | None:
    """The flag that ends an answer, or None. Raises RequestError: it is no flag."""
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise RequestError(f"cancel is {value_text(cancel)}", hint="give a threading.Event, or what has `is_set()`")
    return cast("Cancel | None", cancel)


def check_logprobs(logprobs: object, config: ModelConfig) -> int | None:
    """How many alternatives are reported with each log-probability; None: neither. Raises RequestError."""
    most = min(config.vocab_size, MOST_LOGPROBS)
    if logprobs is None or is_count(logprobs, 0, most):
        return None if logprobs is None else int(cast("int", logprobs))
    raise RequestError(
        f"logprobs is {value_text(logprobs)}",
        hint=f"logprobs must be a whole number of alternatives from 0 to {most}, or None; next_token_logits gives all",
    )
