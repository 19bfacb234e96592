"""The object that `blockpress.load` returns: text in, text out, and the logits inside.

Invariant: every argument is checked here, by name, before the first forward; none that is accepted is ignored. An
answer is a function of weights, prompt, seed and sampling, never of what the engine has cached from earlier calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack, overload

from jaxtyping import Float32
from torch import Tensor

from blockpress.checkpoints import Checkpoint
from blockpress.config import GenerationConfig, ModelConfig
from blockpress.decide import Decision
from blockpress.decide.questions import Question
from blockpress.decoding import Cancel, Done, Event, Reply, TokenLogprob
from blockpress.engine import EngineOptions, Request
from blockpress.errors import renamed_attribute
from blockpress.lm.arguments import (
    AnySampling,
    ChatOptions,
    ChatRequestOptions,
    Conversation,
    DecideOptions,
    GenerateOptions,
    Prompt,
    RequestOptions,
    are_conversations,
    as_list,
    check_cancel,
    is_batch,
    is_integer,
)
from blockpress.lm.decide import Context
from blockpress.lm.execute import Answer, LazyEngine
from blockpress.lm.infilling import Infilling
from blockpress.lm.logits import denoise_logits, next_token_logits, token_logprobs
from blockpress.lm.requests import RequestBuilder, needs_tokenizer
from blockpress.model import Network
from blockpress.text import Tokenizer


class LM(Infilling):
    """A loaded model. `path` is its directory, `config` its shape, `network` the torch module inside.

    Calls, from any thread, share one engine, created by the first: it caches what it has read, so a conversation that
    continues is not read again. `close()`, or leaving `with load(...) as lm:`, frees its memory.

    Args:
        checkpoint: the open checkpoint at `path`. options: of the engine; without them its queue has no limit.
        answer: runs requests in place of the engine, such as `lm.execute.run_reference`, the reference loop.
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
        """Free what the engine holds; unfinished answers end with an `EngineError`, a later call starts afresh."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, including the ids that the model expects in front.

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
    def generate(  # type: ignore[overload-overlap]  # a str is also a sequence of str; here it means one prompt
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        seed: int = 0,
        sampling: AnySampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Reply: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Reply]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Reply | list[Reply]:
        """Answer a prompt, or a list of them in one batch.

        Args:
            prompt: text, or token ids as a list or a 1-D tensor; or a list of such prompts.
            max_tokens: most tokens to return; None: until a stop or the end of the context.
            seed: of the random draws; a list gives each prompt its own. The same seed gives the same answer.
            sampling: how canvases are denoised, or, in the mode "autoregressive", how tokens are chosen; None: as in
                the checkpoint's generation_config.json.
            options: `cancel`, checked between steps (`is_set()`), such as a `threading.Event`, and those of
                `lm.requests.RequestBuilder.for_prompts`, which describes each.

        Returns:
            a `Reply`, or a list of them if `prompt` or `seed` is a list.
        """
        events = self.stream(prompt, max_tokens, seed, sampling, **options)
        replies = {e.row: e.reply for e in events if isinstance(e, Done)}
        return [replies[row] for row in sorted(replies)] if is_batch(prompt) or not is_integer(seed) else replies[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Event]:
        """As `generate`, but gives events: `Denoised` per step, `Committed` per canvas (or token), `Text`, and `Done`.

        Arguments are checked at once, before the first event is requested. Leaving the loop early cancels the answers.
        """
        given: dict[str, Any] = {**options}
        cancel = check_cancel(given.pop("cancel", None))
        return self.answer(self.network, self.build_requests(prompt, max_tokens, seed, sampling, **given), cancel)

    def build_requests(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: AnySampling | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Request]:
        """What `stream` would answer, checked, as requests for an engine that serves others too (`engine`).

        Args: those of `generate`; `lm.requests.RequestBuilder.for_prompts` describes the options.
        """
        return self._builder.for_prompts(prompt, max_tokens, seed, sampling, **options)

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
            messages: in OpenAI's format (`chat.messages.check_messages` has the fields); `Reply.message` is an answer
                as such a message.
            seed: as in `generate`.
            options: `cancel`, as in `generate`, and those of `lm.requests.RequestBuilder.for_chats`.

        Returns:
            a `Reply`, or a list of them if `messages` or `seed` is one. `finish_reason` is "tool_calls" if the answer
            ended by itself and called a tool.
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

        Arguments are checked at once, before the first event. Leaving the loop early cancels the answers.
        """
        given: dict[str, Any] = {**options}
        cancel = check_cancel(given.pop("cancel", None))
        return self.answer(self.network, self.build_chat_requests(messages, seed=seed, **given), cancel)

    def build_chat_requests(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> list[Request]:
        """What `chat_stream` would answer, checked, as requests for an engine that serves others too (`engine`).

        Args: those of `chat`; `lm.requests.RequestBuilder.for_chats` describes the options.
        """
        return self._builder.for_chats(messages, seed=seed, **options)

    @overload  # a str is also a sequence of str; here it means one context
    def decide(  # type: ignore[overload-overlap]
        self, context: Context, questions: Sequence[Question], **options: Unpack[DecideOptions]
    ) -> Decision: ...

    @overload
    def decide(
        self, context: Sequence[Context], questions: Sequence[Question], **options: Unpack[DecideOptions]
    ) -> list[Decision]: ...

    def decide(
        self, context: Context | Sequence[Context], questions: Sequence[Question], **options: Unpack[DecideOptions]
    ) -> Decision | list[Decision]:
        """Answer typed questions about a context by their probabilities, read from one denoising step.

        They are the model's own, before any edit of the logits that `generation` has.

        Args:
            context: a text or, for a model with a chat template, messages; or a list of such contexts.
            questions: 1 to 64 of `YesNo`, `Choice` and `Score`; they and their options are shown after the context.
            options: `form`, `steps`, `draws` and `seed` (`lm.arguments.DecideOptions`).

        Returns:
            a `Decision`, or a list of them if `context` is a list of contexts.

        Raises:
            RequestError: an argument, before any forward. PromptTooLong: no room for a canvas. TextError: the
            vocabulary has no token for some of the text. EngineError: the network gave NaN.
        """
        return self._builder.decider.decide(context, questions, **options)

    requests = renamed_attribute("requests", "build_requests")  # until version 0.3
    chat_requests = renamed_attribute("chat_requests", "build_chat_requests")

    def denoise_logits(
        self,
        prompt_ids: Sequence[int] | Tensor,
        canvas_ids: Sequence[int] | Tensor,
        previous_logits: Float32[Tensor, "canvas vocab"] | None = None,
    ) -> Float32[Tensor, "canvas vocab"]:
        """Softcapped float32 logits of one denoising step for a canvas after a prompt.

        Args:
            previous_logits: the last step's temperature-scaled logits, for self-conditioning; None: the first step.
        """
        return denoise_logits(self.network, prompt_ids, canvas_ids, previous_logits)

    def next_token_logits(self, ids: Sequence[int] | Tensor) -> Float32[Tensor, "length vocab"]:
        """The causal pass as a language model: for every token, softcapped float32 logits of the one after it."""
        return next_token_logits(self.network, ids)

    def token_logprobs(
        self, ids: Sequence[int] | Tensor, top: int = 0, cancel: Cancel | None = None
    ) -> list[TokenLogprob]:
        """The causal pass as a judge of a text: for every token but the first, the log-probability that it follows.

        It is that of `log_softmax(next_token_logits(ids))`, in memory that does not grow with the vocabulary.

        Args:
            top: how many of the likeliest tokens come with each. cancel: checked between pieces of the text; what was
                scored until then is returned.
        """
        return token_logprobs(self.network, ids, top, cancel)

    @cached_property
    def _builder(self) -> RequestBuilder:
        return RequestBuilder(self._checkpoint, self.network, self.generation, self.tokenizer)

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        return needs_tokenizer(self.tokenizer, self.path, what)
