"""The answer to one prompt while it grows.

    canvas     t t t t E x x x        valid: up to and including the first stop id E
    returned   t t t t E              never more than `max_tokens`, cut again where a stop string begins

Invariant: `tokens_per_forward` and the counts beside it follow one definition: a canvas of N steps is N forwards, each
canvas but the last costs one more to commit, and what is past the end of the answer counts as nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from blockpress.diffusion import Step
from blockpress.reply.events import (
    Broken,
    Called,
    Committed,
    Denoised,
    Done,
    Event,
    FinishReason,
    Reply,
    Text,
    Thought,
    Usage,
)
from blockpress.reply.turn import Decoder, PlainTurn, Turn
from blockpress.text import BrokenCall, Piece, Said, ToolCall


@runtime_checkable
class Cancel(Protocol):
    """Anything that can be asked whether to stop; `threading.Event` is one."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class FinishedCanvas:
    """A canvas's tokens, all of them that are context for the next, and its steps."""

    tokens: list[int]
    steps: int


class Row:
    """One prompt under way. Limits are in tokens; `room` is how many more the context holds.

    `turn` reads the tokens; without one they are one text, by `decoder`, or tokens alone.
    """

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
        turn: Turn | None = None,
    ) -> None:
        assert decoder is None or turn is None, "a turn reads by itself"
        self.index, self.prompt, self.seed = index, prompt, seed
        self.images: Mapping[int, Float[Tensor, "_soft hidden"]] = {}
        """The pictures of the prompt: where the soft tokens of each begin, and what the vision tower made of it."""
        self.canvases: list[FinishedCanvas] = []
        self.finish_reason: FinishReason | None = None
        self.attempt = 0
        """How many times the canvas under way has been begun again."""
        self.fresh: list[int] = []
        """What the context does not hold yet of the last committed canvas; nothing where a canvas is begun again."""
        self._stop_ids, self._canvas_length, self._room = frozenset(stop_ids), canvas_length, room
        self._limit = max_tokens
        self._turn: Turn = PlainTurn(decoder) if turn is None else turn
        self._tokens: list[int] = []
        self._pieces: list[Piece] = []
        self._retries = self._retried_steps = 0
        self._draft = FinishedCanvas([], 0)

    @property
    def number(self) -> int:
        """What keys the draws of the canvas under way: no two canvases of a row share it, written again or not."""
        return len(self.canvases) + (self.attempt << 24)

    @property
    def denied(self) -> Mapping[int, Container[int]]:
        """Ids that the canvas under way must not hold, and at which places."""
        return self._turn.denied

    def draft(self, argmax: list[int], steps: int) -> None:
        """The canvas as its last step left it."""
        self._draft = FinishedCanvas(argmax, steps)

    def commit(self) -> Iterator[Event]:
        """Take the draft as finished, or begin the canvas again; tell what that adds to the answer."""
        canvas, self._draft, self.fresh = self._draft, FinishedCanvas([], 0), []
        end = next((i + 1 for i, token in enumerate(canvas.tokens) if token in self._stop_ids), None)
        valid = canvas.tokens[:end]
        kept = self._turn.cut(valid)
        stopped = end is not None and kept is valid
        if stopped and self._turn.begins_again(valid):
            self.attempt, self._retries = self.attempt + 1, self._retries + 1
            self._retried_steps += canvas.steps
            return
        kept, context = kept[: self._room], (canvas.tokens if kept is valid else kept)[: self._room]
        self.attempt, self.fresh, self._room = 0, context, self._room - len(context)
        self.canvases.append(FinishedCanvas(context, canvas.steps))
        yield from self._return(kept, stopped)

    def _return(self, tokens: list[int], stopped: bool) -> Iterator[Event]:
        """Add the canvas's tokens to the answer, up to the limit or a stop text; end where there is no going on."""
        if self._limit is not None and len(self._tokens) + len(tokens) > self._limit:
            tokens, stopped = tokens[: self._limit - len(self._tokens)], False
        self._tokens += tokens
        pieces = self._turn.take(tokens)
        if stopped:
            self.finish_reason = "stop"
        elif len(self._tokens) == self._limit or self._room < self._canvas_length:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            pieces = [*pieces, *self._turn.finish()]
        if self._turn.stopped is not None:
            self.finish_reason = "stop"
            before = len(self._tokens) - len(tokens)
            self._tokens = self._tokens[: self._turn.tokens_used]
            tokens = self._tokens[before:]
        yield Committed(self.index, len(self.canvases) - 1, tokens, self.canvases[-1].steps)
        yield from self._tell(pieces)
        if stopped and self._turn.stopped is None and any(isinstance(piece, ToolCall) for piece in self._pieces):
            self.finish_reason = "tool_calls"
        if self.finish_reason is not None:
            yield Done(self.index, self.reply())

    def cancel(self) -> Iterator[Event]:
        """End here: what was committed stays, text that was held back for later tokens is let go."""
        self.finish_reason = "cancelled"
        yield from self._tell(self._turn.finish())
        yield Done(self.index, self.reply())

    def _tell(self, pieces: list[Piece]) -> Iterator[Event]:
        self._pieces += pieces
        for piece in pieces:
            if isinstance(piece, Said):
                yield (Text if piece.kind == "answer" else Thought)(self.index, piece.text)
            else:
                yield Called(self.index, piece) if isinstance(piece, ToolCall) else Broken(self.index, piece)

    def reply(self) -> Reply:
        """The finished answer. The steps of a canvas that was cancelled are counted, its tokens are not returned."""
        assert self.finish_reason is not None
        said = {
            kind: [p.text for p in self._pieces if isinstance(p, Said) and p.kind == kind]
            for kind in ("answer", "thought")
        }
        return Reply(
            text="".join(said["answer"]) if self._turn.has_text else None,
            tokens=list(self._tokens),
            finish_reason=self.finish_reason,
            usage=self._usage(),
            thinking="".join(said["thought"]) or None,
            tool_calls=tuple(piece for piece in self._pieces if isinstance(piece, ToolCall)),
            broken_calls=tuple(piece for piece in self._pieces if isinstance(piece, BrokenCall)),
        )

    def _usage(self) -> Usage:
        steps = sum(canvas.steps for canvas in self.canvases) + self._draft.steps + self._retried_steps
        begun = len(self.canvases) + (self._draft.steps > 0 or self.attempt > 0)
        forwards = steps + max(0, begun - 1)
        reasoning, cut = self._turn.counts
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self._tokens),
            canvases=len(self.canvases),
            steps=steps,
            forwards=forwards,
            tokens_per_forward=len(self._tokens) / forwards if forwards else 0.0,
            reasoning_tokens=reasoning,
            thought_cut=cut,
            empty_retries=self._retries,
        )


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
        attempt=row.attempt,
    )
