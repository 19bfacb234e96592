"""The object that `blockpress.load` gives: text in, text out, and the logits for whoever wants to look inside.

Invariant: whatever comes in is checked here, by name, before the first forward; nothing that is accepted is ignored.
An answer is a function of weights, prompt, seed and sampling, never of what the engine has kept of earlier calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, Unpack, cast, overload

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.chat import Chat, EncodedChat, check_options
from blockpress.checkpoints import Checkpoint, load_picture_settings, load_vision
from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.decoding import Cancel, Done, Event, OutputProcessor, Reply, SequenceState, TextOutputProcessor
from blockpress.engine import EngineOptions, Request
from blockpress.errors import CheckpointError
from blockpress.lm.arguments import (
    AnySampling,
    ChatOptions,
    Conversation,
    Mode,
    Prompt,
    are_conversations,
    as_list,
    check_sampling,
    is_batch,
    is_integer,
)
from blockpress.lm.execute import Answer, LazyEngine
from blockpress.lm.logits import denoise_logits, next_token_logits
from blockpress.lm.rows import check_ids, make_sequences
from blockpress.model import Network, VisionTower
from blockpress.text import StreamDecoder, Tokenizer


class LM:
    """A loaded model. `path` is its directory, `config` its shape, `network` the torch module inside.

    Calls share one engine, made for the first of them, which keeps what it has read: a conversation that goes on is
    not read again. Several threads may ask at once. `close()`, or leaving `with load(...) as lm:`, frees its memory.

    Args:
        checkpoint: what is open at `path` already. options: of the engine; without them its queue has no limit.
        answer: what answers requests in place of that engine: `lm.execute.run_reference` does it slowly and plainly.
    """

    def __init__(
        self,
        *,
        path: Path,
        network: Network,
        generation: GenerationConfig,
        tokenizer: Tokenizer | None,
        options: EngineOptions | None = None,
        answer: Answer | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._checkpoint = Checkpoint(path=path) if checkpoint is None else checkpoint
        self.path, self.network, self.generation, self.tokenizer = path, network, generation, tokenizer
        self.engine = LazyEngine(network, EngineOptions(max_waiting=sys.maxsize) if options is None else options)
        self.answer = self.engine.answer if answer is None else answer

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def close(self) -> None:
        """Give back what the engine holds; answers under way end with an `EngineError`, a later call begins anew."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the ids that the model wants in front.

        Raises:
            TextError: the vocabulary has no token for some of the text.
        """
        return self._needs_tokenizer("encode").encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids; control tokens are left out.

        Raises:
            TextError: an id outside the vocabulary.
        """
        return self._needs_tokenizer("decode").decode(as_list(ids, "ids"))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too; it is meant as one
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        seed: int = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
        cancel: Cancel | None = None,
    ) -> Reply: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
        cancel: Cancel | None = None,
    ) -> list[Reply]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
        cancel: Cancel | None = None,
    ) -> Reply | list[Reply]:
        """Answer a prompt, or a list of them in one batch.

        Args:
            prompt: text, or token ids as a list or a 1-D tensor; or a list of such prompts.
            max_tokens: most tokens to return; None: until a stop or the context's end.
            seed: of the random draws; a list gives each prompt its own. The same seed gives the same answer.
            sampling: how canvases are denoised, or, in the mode "autoregressive", how tokens are chosen; None: as the
                checkpoint's generation_config.json says.
            mode: "diffusion", canvas by canvas; "verified", the same with settled canvases checked by the causal pass,
                `sampling.checks` times at most, or 4 where that is 0; or "autoregressive", token by token with the same
                weights. None: diffusion where the model has a canvas.
            logprobs: tell the log-probability of each returned token in the causal pass, at temperature 1, and this
                many of the likeliest tokens in its place; None: neither. It costs the causal pass over the last canvas.
            cancel: asked between steps (`is_set()`); a `threading.Event` will do.

        Returns:
            a `Reply`, or a list of them where `prompt` or `seed` is a list.
        """
        events = self.stream(prompt, max_tokens, seed, sampling, mode=mode, logprobs=logprobs, cancel=cancel)
        replies = {event.row: event.reply for event in events if isinstance(event, Done)}
        many = is_batch(prompt) or not is_integer(seed)
        return [replies[row] for row in sorted(replies)] if many else replies[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[Event]:
        """The same as `generate`, as events: `Denoised` a step, `Committed` a canvas (or token), `Text`, and `Done`.

        Arguments are checked at once, before the first event is asked for. Leaving the loop early ends the work.
        """
        wanted = self.requests(prompt, max_tokens, seed, sampling, mode=mode, logprobs=logprobs)
        return self.answer(self.network, wanted, cancel)

    def requests(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        *,
        mode: Mode | None = None,
        logprobs: int | None = None,
    ) -> list[Request]:
        """What `stream` would answer, checked, as requests for an engine that others use, too (`engine`)."""
        sampling = self._sampling(sampling, mode)
        prompts = list(cast("Sequence[Prompt]", prompt)) if is_batch(prompt) else [cast("Prompt", prompt)]

        def turn(prompt: list[int]) -> OutputProcessor:
            text = None if self.tokenizer is None else StreamDecoder(self.tokenizer, stop=sampling.stop)
            return TextOutputProcessor(text)

        ids = [check_ids(self.config, self.encode(one) if isinstance(one, str) else one, "prompt") for one in prompts]
        rows = self._rows(ids, max_tokens, seed, self.generation.stop_ids, turn, sampling, logprobs)
        return [Request(row, sampling) for row in rows]

    @overload
    def chat(self, messages: Conversation, *, seed: int = 0, **options: Unpack[ChatOptions]) -> Reply: ...

    @overload
    def chat(
        self, messages: Sequence[Conversation], *, seed: int | Sequence[int] = 0, **options: Unpack[ChatOptions]
    ) -> list[Reply]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[ChatOptions],
    ) -> Reply | list[Reply]:
        """Answer a conversation, or a list of them in one batch, in the form of the checkpoint's chat template.

        Args:
            messages: in OpenAI's shape (`chat.messages.check_messages` has the fields); `Reply.message` gives an answer
                back as one.
            seed: as `generate` takes it.
            options: `cancel`, as `generate` takes it, and those of `chat_requests`, where each is described.

        Returns:
            a `Reply`, or a list of them where `messages` or `seed` is one. `finish_reason` is "tool_calls" where the
            answer ended by itself and called a tool.
        """
        replies = {e.row: e.reply for e in self.chat_stream(messages, seed=seed, **options) if isinstance(e, Done)}
        many = are_conversations(messages) or not is_integer(seed)
        return [replies[row] for row in sorted(replies)] if many else replies[0]

    def chat_stream(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[ChatOptions],
    ) -> Iterator[Event]:
        """The same as `chat`, as events: those of `stream`, and thoughts and tool calls (`decoding.events`).

        Arguments are checked at once, before the first event. Leaving the loop early ends the work.
        """
        given: dict[str, Any] = {**options}
        cancel = given.pop("cancel", None)
        return self.answer(self.network, self.chat_requests(messages, seed=seed, **given), cancel)

    def chat_requests(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        thinking_budget: int | None = None,
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        retry_empty: bool = True,
        soft_tokens: int | None = None,
        mode: Mode | None = None,
        logprobs: int | None = None,
    ) -> list[Request]:
        """What `chat_stream` would answer, checked, as requests for an engine that others use, too (`engine`).

        Args:
            tools: that the model may call, in OpenAI's shape.
            thinking: whether the model is asked to think before it answers.
            thinking_budget: most tokens of its thoughts; there the thought is closed and the answer begun.
            max_tokens, sampling, mode, logprobs: as `generate` takes them; `sampling.stop` is looked for in the
                answer alone, and `max_tokens` counts thoughts and calls, too.
            retry_empty: write a canvas again that ends the answer before anything was said, at most three times, as
                `usage.empty_retries` counts.
            soft_tokens: most tokens that an image, or a frame of a video, becomes (70, 140, 280, 560 or 1120); None: as
                the checkpoint says.
        """
        check_options(thinking, thinking_budget, retry_empty, soft_tokens)
        sampling = self._sampling(sampling, mode)
        many = are_conversations(messages)
        talks = messages if many else [messages]
        asked = self._chat.encode_all(talks, many, tools=tools, thinking=thinking, soft_tokens=soft_tokens)
        stop_ids = (*self.generation.stop_ids, *self._chat.controls.stops)

        def turn(prompt: list[int]) -> OutputProcessor:
            return self._chat.output_processor(
                prompt, stop=sampling.stop, stop_ids=stop_ids, thinking_budget=thinking_budget, retry_empty=retry_empty
            )

        rows = self._rows([one.ids for one in asked], max_tokens, seed, stop_ids, turn, sampling, logprobs)
        self._show(rows, asked)
        return [Request(row, sampling) for row in rows]

    @cached_property
    def _chat(self) -> Chat:
        settings = partial(load_picture_settings, self.path, self.config)
        return Chat.of(self.tokenizer, self.path, self.config, settings)

    @cached_property
    def _tower(self) -> VisionTower:
        types = {"dtype": self.network.storage_dtype, "compute_dtype": self.network.dtype}
        return load_vision(self._checkpoint, config=self.config, device=self.network.device, **types)

    @torch.inference_mode()
    def _show(self, rows: list[SequenceState], asked: Sequence[EncodedChat]) -> None:
        """Put the pictures' features into the rows; one question may have several rows, each with a seed of its own."""
        shown = [zip(one.image_spans, self._tower(one.pictures), strict=True) if one.pictures else () for one in asked]
        seen = [{span.start: features for span, features in pairs} for pairs in shown]
        for row in rows:
            row.images = seen[row.index if len(seen) > 1 else 0]

    def _sampling(self, given: AnySampling | None, mode: Mode | None) -> AnySampling:
        return check_sampling(given, mode, self.generation, self.config, has_text=self.tokenizer is not None)

    def _rows(
        self,
        ids: list[list[int]],
        max_tokens: int | None,
        seed: int | Sequence[int],
        stop_ids: Sequence[int],
        turn: Callable[[list[int]], OutputProcessor],
        sampling: AnySampling,
        logprobs: int | None,
    ) -> list[SequenceState]:
        canvas = self.config.canvas_length if isinstance(sampling, Sampling) else 1
        limits = {"max_tokens": max_tokens, "logprobs": logprobs}
        return make_sequences(ids, seed, turn, canvas, self.config, stop_ids=stop_ids, **limits)

    def denoise_logits(
        self,
        prompt_ids: Sequence[int] | Tensor,
        canvas_ids: Sequence[int] | Tensor,
        previous_logits: Float32[Tensor, "canvas vocab"] | None = None,
    ) -> Float32[Tensor, "canvas vocab"]:
        """What one denoising step makes of a canvas behind a prompt: softcapped float32 logits.

        Args:
            previous_logits: the last step's temperature-scaled logits, for self-conditioning; None: the first step.
        """
        return denoise_logits(self.network, prompt_ids, canvas_ids, previous_logits)

    def next_token_logits(self, ids: Sequence[int] | Tensor) -> Float32[Tensor, "length vocab"]:
        """The causal pass as a language model: for every token, softcapped float32 logits of the one behind it."""
        return next_token_logits(self.network, ids)

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.path} has no tokenizer.json, which {what} needs", hint="give token ids, or add the file"
            )
        return self.tokenizer
