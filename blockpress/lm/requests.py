"""From what a call asks for to the engine's requests: everything is checked here, before the first forward.

Invariant: an argument that is accepted is honoured; one that cannot be is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack, cast, final

from torch import Tensor

from blockpress.chat import Chat, check_options
from blockpress.checkpoints import Checkpoint, load_picture_settings, load_vision
from blockpress.config import GenerationConfig, Sampling
from blockpress.constrain import Constraint
from blockpress.constrain.turns import Turn
from blockpress.decoding import EarlyText, Given, OutputProcessor, SequenceState, TextOutputProcessor
from blockpress.engine import Request
from blockpress.errors import CheckpointError, RequestError
from blockpress.lm.arguments import (
    AnySampling,
    ConstraintOptions,
    Conversation,
    Mode,
    Prompt,
    are_conversations,
    check_sampling,
    is_batch,
)
from blockpress.lm.constraints import ConstraintCache
from blockpress.lm.decide import Decider
from blockpress.lm.fills import FillBuilder
from blockpress.lm.given import read_given
from blockpress.lm.rows import attach_images, check_ids, make_sequences
from blockpress.lm.tool_choice import check_tool_choice
from blockpress.model import Network, VisionTower
from blockpress.text import StreamDecoder, Tokenizer


@final
class RequestBuilder:
    """Makes the requests of one model's calls; the vision tower is loaded by the first picture."""

    def __init__(
        self, checkpoint: Checkpoint, network: Network, generation: GenerationConfig, tokenizer: Tokenizer | None
    ) -> None:
        self._checkpoint, self._network, self._generation, self._tokenizer = checkpoint, network, generation, tokenizer
        self._constraints = ConstraintCache(tokenizer, network.config.vocab_size)

    def for_prompts(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
        pins: Mapping[int, int] | None = None,
        draft: str | Sequence[int] | Tensor | None = None,
        noise: float | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[Request]:
        """The requests of `LM.generate`, for a prompt or a list of them.

        Args:
            mode: "diffusion", canvas by canvas; "verified", the same with settled canvases verified by the causal pass,
                at most `sampling.max_verifications` times, or 4 if that is 0; or "autoregressive", one token at a time
                with the same weights. None: diffusion if the model has a canvas.
            logprobs: report the log-probability of each returned token in the causal pass, at temperature 1, and of
                this many likeliest alternatives; None: neither. It costs the causal pass over the last canvas.
            pins, draft, noise: what is given of each answer (`arguments.GivenOptions`).
            constraint: what the answer must be (`arguments.ConstraintOptions`); `Reply.invalid`: why it is not.

        Raises:
            RequestError: an argument that is wrong or cannot be honoured. PromptTooLong: no room for a canvas.
        """
        tokenizer, stop_ids = self._tokenizer, self._generation.stop_ids
        sampling = check_sampling(
            sampling, mode, self._generation, self._network.config, has_text=tokenizer is not None
        )
        given = read_given(
            {"pins": pins, "draft": draft, "noise": noise},
            sampling,
            self._network.config,
            lambda text: needs_tokenizer(tokenizer, self._checkpoint.path, "encode").encode(text, add_special=False),
        )
        compiled = self._constraints.get(stop_ids, constraint)
        prompts = list(cast("Sequence[Prompt]", prompt)) if is_batch(prompt) else [cast("Prompt", prompt)]

        def make_processor(prompt: list[int]) -> OutputProcessor:
            text = None if tokenizer is None else StreamDecoder(tokenizer, stop=sampling.stop)
            return TextOutputProcessor(text)

        def prompt_ids(prompt: Prompt) -> list[int]:
            if isinstance(prompt, str):
                prompt = needs_tokenizer(tokenizer, self._checkpoint.path, "encode").encode(prompt)
            return check_ids(self._network.config, prompt, "prompt")

        ids = [prompt_ids(each) for each in prompts]
        rows = self._rows(
            ids, max_tokens, seed, stop_ids, make_processor, sampling, logprobs, [compiled] * len(ids), given
        )
        return [Request(row, sampling) for row in rows]

    def for_chats(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        thinking: bool = False,
        thinking_budget: int | None = None,
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        retry_empty: bool = True,
        soft_tokens: int | None = None,
        mode: Mode | None = None,
        logprobs: int | None = None,
        draft: str | None = None,
        noise: float | None = None,
        **constraint: Unpack[ConstraintOptions],
    ) -> list[Request]:
        """The requests of `LM.chat`, for a conversation or a list of them.

        Args:
            tools: that the model may call, in OpenAI's format.
            tool_choice: "auto" (also None), "none", "required", or {"type": "function", "function": {"name": ...}}; in
                the last two the answer is a call, whose arguments follow the tool's schema (docs/constraints.md).
            parallel_tool_calls: whether an answer may hold several calls; None: yes.
            thinking: whether the model is asked to think before it answers.
            thinking_budget: most tokens of its thoughts; at that point the thought is closed and the answer starts.
            max_tokens, sampling, mode, logprobs: as in `for_prompts`; `sampling.stop` applies to the answer only, while
                `max_tokens` also counts thoughts and calls.
            retry_empty: rewrite a canvas that ends the answer before it contains anything, at most three times;
                `usage.empty_retries` counts them.
            soft_tokens: most tokens per image or video frame (70, 140, 280, 560 or 1120); None: as in the checkpoint.
            draft, noise: as in `for_prompts`, of an answer without thoughts (`arguments.GivenOptions`).
            constraint: as in `for_prompts`, of the answer's text; with tools, an answer may be a call instead.
        """
        check_options(thinking, thinking_budget, retry_empty, soft_tokens)
        sampling = check_sampling(
            sampling, mode, self._generation, self._network.config, has_text=self._tokenizer is not None
        )
        many = are_conversations(messages)
        conversations = messages if many else [messages]
        encoded = self._chat.encode_all(conversations, many, tools=tools, thinking=thinking, soft_tokens=soft_tokens)
        stop_ids = (*self._generation.stop_ids, *self._chat.controls.stops)

        if thinking and draft is not None:
            hint = "leave out one of them: such an answer begins with a thought"
            raise RequestError("draft is given with thinking", hint=hint)
        given = read_given({"draft": draft, "noise": noise}, sampling, self._network.config, self._encode_answer)
        choice = check_tool_choice(tool_choice, parallel_tool_calls, tools)
        is_shaped = any(value is not None for value in constraint.values())
        calls = choice.all_calls if is_shaped else choice.calls
        ids = [chat.ids for chat in encoded]
        turns = [Turn(opening=self._chat.opening(each, thinking), calls=calls) for each in ids]
        compiled = [self._constraints.get(stop_ids, constraint, turn) for turn in turns]
        # What is held to a constraint is empty only where that allows it.
        retry_empty = retry_empty and not is_shaped and not (calls and calls.needed)
        limits = partial(self._chat.output_processor, thinking_budget=thinking_budget, retry_empty=retry_empty)
        may = {"may_call": choice.may_call, "held": any(compiled)}
        make_processor = partial(limits, stop=sampling.stop, stop_ids=stop_ids, tools=tools, **may)
        rows = self._rows(ids, max_tokens, seed, stop_ids, make_processor, sampling, logprobs, compiled, given)
        attach_images(rows, encoded, lambda: self._tower)
        return [Request(row, sampling) for row in rows]

    def _encode_answer(self, text: str) -> list[int]:
        return self._chat.tokenizer.encode(text, add_special=False)

    def __reduce__(self) -> tuple[object, ...]:
        # A copy of a model reads its own template and tower: a template cannot be pickled.
        return RequestBuilder, (self._checkpoint, self._network, self._generation, self._tokenizer)

    @cached_property
    def decider(self) -> Decider:
        """What answers typed questions. Raises CheckpointError: the model has no tokenizer."""
        tokenizer = needs_tokenizer(self._tokenizer, self._checkpoint.path, "decide")
        chat = None if tokenizer.chat_template is None else self._chat
        return Decider(self._network, self._generation, tokenizer, chat, lambda: self._tower)

    @cached_property
    def fills(self) -> FillBuilder:
        """What makes the fillers of holes. Raises CheckpointError: the model has no tokenizer."""
        tokenizer = needs_tokenizer(self._tokenizer, self._checkpoint.path, "infill")
        chat = None if tokenizer.chat_template is None else self._chat
        return FillBuilder(self._network, self._generation, tokenizer, chat, self._constraints)

    @cached_property
    def _chat(self) -> Chat:
        settings = partial(load_picture_settings, self._checkpoint.path, self._network.config)
        return Chat.of(self._tokenizer, self._checkpoint.path, self._network.config, settings)

    @cached_property
    def _tower(self) -> VisionTower:
        types = {"dtype": self._network.storage_dtype, "compute_dtype": self._network.dtype}
        return load_vision(self._checkpoint, config=self._network.config, device=self._network.device, **types)

    def _rows(
        self,
        ids: list[list[int]],
        max_tokens: int | None,
        seed: int | Sequence[int],
        stop_ids: Sequence[int],
        make_processor: Callable[[list[int]], OutputProcessor],
        sampling: AnySampling,
        logprobs: int | None,
        constraints: Sequence[Constraint | None],
        given: Given | None = None,
    ) -> list[SequenceState]:
        canvas = self._network.config.canvas_length if isinstance(sampling, Sampling) else 1
        if (
            isinstance(sampling, Sampling)
            and sampling.release
            and not (sampling.max_verifications or sampling.max_repairs)
        ):
            make_processor = partial(_early_text, make_processor, sampling)
        limits: dict[str, Any] = {"max_tokens": max_tokens, "stop_ids": stop_ids, "logprobs": logprobs, "given": given}
        return make_sequences(
            ids, seed, make_processor, canvas, self._network.config, constraints=constraints, **limits
        )


def needs_tokenizer(tokenizer: Tokenizer | None, path: Path, what: str) -> Tokenizer:
    """The tokenizer of the model at `path`. Raises CheckpointError: it has none, which `what` needs."""
    if tokenizer is None:
        raise CheckpointError(
            f"{path} has no tokenizer.json, which {what} needs", hint="give token ids, or add the file"
        )
    return tokenizer


def _early_text(make: Callable[[list[int]], OutputProcessor], sampling: Sampling, prompt: list[int]) -> EarlyText:
    return EarlyText(make(prompt), make(prompt), sampling.release, sampling.confidence)
