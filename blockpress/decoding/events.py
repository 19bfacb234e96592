"""What the caller gets for a prompt: events while the answer grows, its usage, the reply.

Invariant: events are immutable; the texts of a row's events, joined, are its reply's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.chat import MalformedToolCall, Piece, TextDelta, ToolCall
from blockpress.errors import BlockpressError, renamed_fields

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@runtime_checkable
class Cancel(Protocol):
    """A flag to stop; `threading.Event` is one."""

    def is_set(self) -> bool: ...


@renamed_fields(rounds="redos", checks="verifications")  # until version 0.3
@dataclass(frozen=True)
class Usage:
    """Tokens read and returned, and what was computed for them.

    steps: denoising steps over all canvases. forwards: runs of the network after prefill, steps and commits.
    tokens_per_forward: returned tokens per forward. reasoning_tokens: returned tokens inside thoughts, without the
    control tokens around them. thought_cut: whether the budget closed a thought. empty_retries: canvases that were
    written again because they ended the answer before it began; their steps are counted, their tokens are not.
    verifications: those of settled canvases by the causal pass. redos: how often one led to denoising part of a
    canvas again. repairs: how often unlikely places of a settled canvas were denoised again. A verification is a
    forward, and so is what finds such places; where they accept the whole canvas, they are also the commit.
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
    verifications: int = 0
    redos: int = 0
    repairs: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token given those before it, by the causal pass: natural logarithm, temperature 1.

    top: the likeliest tokens at this position with their log-probabilities, best first, as many as were requested.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """The whole answer. `text` is None if the model has no tokenizer; `tokens` ends with the stop id if there was one.

    For a chat also the thought (None without one), the tool calls, and the malformed ones.
    logprobs: one for each of `tokens`, in order; None if they were not requested. invalid: why the answer does not
    satisfy its constraint, which an answer that was cut or cancelled may not; None if it does, or has none.
    holes, whole: of an infill or edit, the texts of its holes and the whole text; `text` is the holes, joined.
    stopped: the stop text that ended it, which is not part of it; None if none did.
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    broken_calls: tuple[MalformedToolCall, ...] = ()
    logprobs: list[TokenLogprob] | None = None
    invalid: str | None = None
    holes: tuple[str, ...] = ()
    whole: str | None = None
    stopped: str | None = None

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat's history, with its calls numbered: what the next `chat` takes.

        A malformed call cannot be represented there and is left out.
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


@renamed_fields(attempt="retry", checks="verifications")  # until version 0.3
@dataclass(frozen=True)
class Denoised:
    """One denoising step of one row, with entropies in nats.

    changed: positions whose argmax differs from the previous step's. attempt: how many times this canvas has been
    restarted because the answer was empty. verifications: how many of it had the rest redone. repairs: how often places
    of it were denoised again.
    """

    row: int
    canvas: int
    step: int
    argmax: Int[Tensor, " canvas"]
    accepted: Bool[Tensor, " canvas"]
    entropy: Float32[Tensor, " canvas"]
    changed: Bool[Tensor, " canvas"]
    settled: bool
    retry: int = 0
    verifications: int = 0
    repairs: int = 0


@dataclass(frozen=True)
class Committed:
    """A canvas is finished: its returned tokens, their log-probabilities if requested, and the number of steps it took.

    A stop text that spans two canvases removes tokens of the first one later; `Reply.tokens` is final.
    """

    row: int
    canvas: int
    tokens: list[int]
    steps: int
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Text:
    """Text that is final."""

    row: int
    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """Text of a chat's thought that is final."""

    row: int
    text: str


@dataclass(frozen=True)
class ToolCallEvent:
    """A tool call is complete."""

    row: int
    call: ToolCall


@dataclass(frozen=True)
class MalformedToolCallEvent:
    """A tool call was started but cannot be parsed."""

    row: int
    call: MalformedToolCall


@dataclass(frozen=True)
class Done:
    """The row is answered."""

    row: int
    reply: Reply


@dataclass(frozen=True)
class Failed:
    """The row ended with an error of its own; earlier events remain valid, and no `Done` follows."""

    row: int
    error: BlockpressError


Event = Denoised | Committed | Text | ReasoningDelta | ToolCallEvent | MalformedToolCallEvent | Done | Failed


def piece_events(row: int, pieces: Sequence[Piece]) -> Iterator[Event]:
    """The events of a row's new output."""
    for piece in pieces:
        if isinstance(piece, TextDelta):
            yield (Text if piece.kind == "answer" else ReasoningDelta)(row, piece.text)
        elif isinstance(piece, ToolCall):
            yield ToolCallEvent(row, piece)
        else:
            yield MalformedToolCallEvent(row, piece)
