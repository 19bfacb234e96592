"""The answer to one prompt while it grows, and what is told about it: events, usage, the reply.

    canvas     t t t t E x x x        valid: up to and including the first stop id E
    returned   t t t t E              never more than `max_tokens`, cut again where a stop string begins

Invariant: `tokens_per_forward` and the counts beside it follow one definition: a canvas of N steps is N forwards, each
canvas but the last costs one more to commit, and what is past the end of the answer counts as nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float32, Int
from torch import Tensor

from blockpress.diffusion import Step

FinishReason = Literal["stop", "length", "cancelled"]


@runtime_checkable
class Cancel(Protocol):
    """Anything that can be asked whether to stop; `threading.Event` is one."""

    def is_set(self) -> bool: ...


@runtime_checkable
class Decoder(Protocol):
    """Text of a growing list of tokens; `text.StreamDecoder` is one."""

    @property
    def stopped(self) -> str | None: ...

    @property
    def tokens_used(self) -> int: ...

    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True)
class Usage:
    """What was read and returned (tokens), and what was computed for it.

    steps: denoising steps over all canvases. forwards: runs of the network after prefill, steps and commits.
    tokens_per_forward: returned tokens a forward.
    """

    prompt_tokens: int
    completion_tokens: int
    canvases: int
    steps: int
    forwards: int
    tokens_per_forward: float


@dataclass(frozen=True)
class Reply:
    """The whole answer. `text` is None where the model has no tokenizer; `tokens` ends with the stop id if one came."""

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Denoised:
    """One step of one row: what the canvas looked like and what the step made of it. Entropies in nats."""

    row: int
    canvas: int
    step: int
    argmax: Int[Tensor, " canvas"]
    accepted: Bool[Tensor, " canvas"]
    entropy: Float32[Tensor, " canvas"]
    changed: Bool[Tensor, " canvas"]
    settled: bool


@dataclass(frozen=True)
class Committed:
    """A canvas is finished: its returned tokens and the steps that it took.

    A stop text that begins in one canvas and ends in the next takes tokens back: `Reply.tokens` has the last word.
    """

    row: int
    canvas: int
    tokens: list[int]
    steps: int


@dataclass(frozen=True)
class Text:
    """Text that will not change any more."""

    row: int
    text: str


@dataclass(frozen=True)
class Done:
    """The row is answered."""

    row: int
    reply: Reply


Event = Denoised | Committed | Text | Done


@dataclass(frozen=True)
class FinishedCanvas:
    """A canvas's tokens, all of them, and its steps."""

    tokens: list[int]
    steps: int


class Row:
    """One prompt under way. Limits are in tokens; `room` is how many the context holds behind the prompt."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        seed: int,
        *,
        stop_ids: Collection[int],
        canvas_length: int,
        room: int,
        max_tokens: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.index, self.prompt, self.seed = index, prompt, seed
        self.canvases: list[FinishedCanvas] = []
        self.finish_reason: FinishReason | None = None
        self._stop_ids, self._canvas_length, self._room = frozenset(stop_ids), canvas_length, room
        self._limit, self._decoder = max_tokens, decoder
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._draft = FinishedCanvas([], 0)

    def draft(self, argmax: list[int], steps: int) -> None:
        """The canvas as its last step left it."""
        self._draft = FinishedCanvas(argmax, steps)

    def commit(self) -> tuple[list[int], str]:
        """Take the draft as finished; return the tokens that it adds to the answer, and the text that is now safe."""
        canvas, self._draft = self._draft, FinishedCanvas([], 0)
        self.canvases.append(canvas)
        end = next((i + 1 for i, token in enumerate(canvas.tokens) if token in self._stop_ids), None)
        tokens = canvas.tokens[:end]
        stopped = end is not None
        if self._limit is not None and len(self._tokens) + len(tokens) > self._limit:
            tokens, stopped = tokens[: self._limit - len(self._tokens)], False
        self._tokens += tokens
        text = "" if self._decoder is None else self._decoder.feed(tokens)
        if stopped:
            self.finish_reason = "stop"
        elif len(self._tokens) == self._limit or self._room < (len(self.canvases) + 1) * self._canvas_length:
            self.finish_reason = "length"
        if self._decoder is not None:
            if self.finish_reason is not None:
                text += self._decoder.finish()
            if self._decoder.stopped is not None:
                self.finish_reason = "stop"
                before = len(self._tokens) - len(tokens)
                self._tokens = self._tokens[: self._decoder.tokens_used]
                tokens = self._tokens[before:]
        self._text.append(text)
        return tokens, text

    def cancel(self) -> Iterator[Event]:
        """End here: what was committed stays, text that was held back for later tokens is let go."""
        self.finish_reason = "cancelled"
        text = "" if self._decoder is None else self._decoder.finish()
        self._text.append(text)
        if text:
            yield Text(self.index, text)
        yield Done(self.index, self.reply())

    def reply(self) -> Reply:
        """The finished answer. The steps of a canvas that was cancelled are counted, its tokens are not returned."""
        assert self.finish_reason is not None
        steps = sum(canvas.steps for canvas in self.canvases) + self._draft.steps
        begun = len(self.canvases) + (self._draft.steps > 0)
        forwards = steps + max(0, begun - 1)
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self._tokens),
            canvases=len(self.canvases),
            steps=steps,
            forwards=forwards,
            tokens_per_forward=len(self._tokens) / forwards if forwards else 0.0,
        )
        text = None if self._decoder is None else "".join(self._text)
        return Reply(text, list(self._tokens), self.finish_reason, usage)


def denoised(row: Row, place: int, step: Step) -> Denoised:
    """The event of one row of a step; `place` is where the row stands in the step."""
    return Denoised(
        row=row.index,
        canvas=len(row.canvases),
        step=step.number,
        argmax=step.argmax[place],
        accepted=step.accepted[place],
        entropy=step.entropy[place],
        changed=step.changed[place],
        settled=bool(step.settled[place]),
    )
