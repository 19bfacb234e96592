"""What is told about an answer: events while it grows, its usage, the reply.

Invariant: events are values that nobody changes; the texts of a row's events, joined, are its reply's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.chat import MalformedToolCall, ToolCall
from blockpress.errors import BlockpressError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """What was read and returned (tokens), and what was computed for it.

    steps: denoising steps over all canvases. forwards: runs of the network after prefill, steps and commits.
    tokens_per_forward: returned tokens a forward. reasoning_tokens: of the returned ones, those inside thoughts, the
    control tokens around them left out. thought_cut: whether the budget closed a thought. empty_retries: canvases that
    were written again because they ended the answer before it began; their steps are counted, their tokens are not.
    checks: how often the causal pass checked a settled canvas. rounds: how often it had part of one denoised again. A
    check is a forward; where it agrees with all of a canvas, it is the commit as well.
    """

    prompt_tokens: int
    completion_tokens: int
    canvases: int
    steps: int
    forwards: int
    tokens_per_forward: float
    reasoning_tokens: int = 0
    thought_cut: bool = False
    empty_retries: int = 0
    checks: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """What the causal pass thinks of a token behind the ones before it: natural logarithms, at temperature 1.

    top: the likeliest tokens there with theirs, the best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """The whole answer. `text` is None where the model has no tokenizer; `tokens` ends with the stop id if one came.

    Of a chat also: the thought (None without one), the tool calls, and what began like a call and is none.
    logprobs: one for each of `tokens`, in their order; None where they were not asked for.
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    broken_calls: tuple[MalformedToolCall, ...] = ()
    logprobs: list[TokenLogprob] | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat's history, its calls numbered: what the next `chat` takes.

        A broken call has no form there and is left out.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text or ""}
        if self.thinking is not None:
            message["thinking"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(self.tool_calls)
            ]
        return message


@dataclass(frozen=True)
class Denoised:
    """One step of one row: what the canvas looked like and what the step made of it. Entropies in nats.

    attempt: how many times this canvas has been begun again. checks: how many times the causal pass has checked it and
    has had the rest of it denoised again.
    """

    row: int
    canvas: int
    step: int
    argmax: Int[Tensor, " canvas"]
    accepted: Bool[Tensor, " canvas"]
    entropy: Float32[Tensor, " canvas"]
    changed: Bool[Tensor, " canvas"]
    settled: bool
    attempt: int = 0
    checks: int = 0


@dataclass(frozen=True)
class Committed:
    """A canvas is finished: its returned tokens, their log-probabilities if asked for, and the steps that it took.

    A stop text that begins in one canvas and ends in the next takes tokens back: `Reply.tokens` has the last word.
    """

    row: int
    canvas: int
    tokens: list[int]
    steps: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Text:
    """Text that will not change any more."""

    row: int
    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """Text of a chat's thought that will not change any more."""

    row: int
    text: str


@dataclass(frozen=True)
class ToolCallEvent:
    """A tool call is whole."""

    row: int
    call: ToolCall


@dataclass(frozen=True)
class MalformedToolCallEvent:
    """A tool call was begun and cannot be read."""

    row: int
    call: MalformedToolCall


@dataclass(frozen=True)
class Done:
    """The row is answered."""

    row: int
    reply: Reply


@dataclass(frozen=True)
class Failed:
    """The row ended with an error of its own; what was told before stands, and no `Done` follows."""

    row: int
    error: BlockpressError


Event = Denoised | Committed | Text | ReasoningDelta | ToolCallEvent | MalformedToolCallEvent | Done | Failed
