"""The answer to one prompt while it grows.

    canvas     t t t t E x x x        valid: up to and including the first stop id E
    returned   t t t t E              never more than `max_tokens`, cut again where a stop string begins

Invariant: `tokens_per_forward` and the counts beside it follow one definition: a canvas of N steps is N forwards, each
canvas but the last costs one more to commit, and what is past the end of the answer counts as nothing. A causal pass
that looks at a draft is a forward, and the commit too, of as much as it has read.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from blockpress.chat import MalformedToolCall, Piece, TextDelta, ToolCall
from blockpress.decoding.events import (
    Committed,
    Denoised,
    Done,
    Event,
    FinishReason,
    MalformedToolCallEvent,
    ReasoningDelta,
    Reply,
    Text,
    TokenLogprob,
    ToolCallEvent,
    Usage,
)
from blockpress.decoding.output import Decoder, OutputProcessor, TextOutputProcessor
from blockpress.diffusion import Step


@runtime_checkable
class Cancel(Protocol):
    """Anything that can be asked whether to stop; `threading.Event` is one."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class FinishedCanvas:
    """A canvas's tokens, all of them that are context for the next, and its steps.

    read: whether a causal pass had read them before they were committed.
    """

    tokens: list[int]
    steps: int
    read: bool = False


class SequenceState:
    """One prompt under way. Limits are in tokens; `room` is how many more the context holds.

    `turn` reads the tokens; without one they are one text, by `decoder`, or tokens alone. `logprobs`: how many
    alternatives are told with the log-probability of each token; None: neither is.
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
        turn: OutputProcessor | None = None,
        logprobs: int | None = None,
    ) -> None:
        assert decoder is None or turn is None, "a turn reads by itself"
        self.index, self.prompt, self.seed, self.logprobs = index, prompt, seed, logprobs
        self.images: Mapping[int, Float[Tensor, "_soft hidden"]] = {}
        """The pictures of the prompt: where the soft tokens of each begin, and what the vision tower made of it."""
        self.canvases: list[FinishedCanvas] = []
        self.finish_reason: FinishReason | None = None
        self.attempt = 0
        """How many times the canvas under way has been begun again."""
        self.pins: Mapping[int, int] = {}
        """Tokens that places of the canvas under way must hold."""
        self.checks = 0
        """How many times the causal pass has checked the canvas under way."""
        self.num_kept = 0
        """How many of the tokens that the causal pass read of the last draft are context now."""
        self.new_tokens: list[int] = []
        """What the context does not hold yet of the last committed canvas; nothing where a canvas is begun again."""
        self._stop_ids, self._canvas_length, self._room = frozenset(stop_ids), canvas_length, room
        self._limit = max_tokens
        self._turn: OutputProcessor = TextOutputProcessor(decoder) if turn is None else turn
        self._tokens: list[int] = []
        self._pieces: list[Piece] = []
        self._logprobs: list[TokenLogprob] = []
        self._retries = self._retried_steps = 0
        self._begun = self._passes = self._checked = self._rounds = 0
        self._draft, self._before = FinishedCanvas([], 0), 0
        self._read: list[int] = []

    @property
    def canvas_number(self) -> int:
        """What keys the draws of the canvas under way: no two canvases of a row share it, written again or not.

        bits 24 to 31   how often this canvas was begun again, because it was empty or because of a check, modulo 256
        bits 20 to 23   the same, divided by 256: a check settles a token at least, so a canvas is not begun more often
        bits 0 to 19    the number of the canvas
        """
        again, low = divmod(self._begun, 256)
        assert again < 16 and len(self.canvases) < 1 << 20, "two canvases of a row would draw the same"
        return len(self.canvases) + (low << 24) + (again << 20)

    def limit(self, room: int) -> None:
        """The context holds at most `room` more tokens; before the first canvas."""
        self._room = min(self._room, room)

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        """Ids that the canvas under way must not hold, and at which places."""
        return self._turn.banned_ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the answer."""
        return self._stop_ids

    @property
    def max_draft_tokens(self) -> int:
        """How many places of the canvas under way the answer has room for."""
        left = self._canvas_length if self._limit is None else self._limit - len(self._tokens)
        return min(left, self._room, self._canvas_length)

    @property
    def drafted(self) -> list[int]:
        """The tokens of the draft, all of them."""
        return self._draft.tokens

    @property
    def proposal(self) -> list[int]:
        """What a commit would take of the draft: up to the first stop id or the limits, and as the turn cuts it.

        A prefix of the draft; behind it there may be one token that the turn puts there.
        """
        left = self._room if self._limit is None else min(self._room, self._limit - len(self._tokens))
        return self._turn.cut(self._draft.tokens[: self._end(self._draft)])[:left]

    def draft(self, argmax: list[int], steps: int) -> None:
        """The canvas as its last step left it; `steps` since it was begun, or begun again after a check."""
        self._draft = FinishedCanvas(argmax, self._before + steps)

    def count_causal_pass(self, *, check: bool) -> None:
        """A causal pass has read the proposal, to check it or for its log-probabilities alone."""
        self._read, self._passes = self.proposal, self._passes + 1
        self.checks, self._checked = self.checks + check, self._checked + check

    def correct(self, tokens: list[int]) -> None:
        """These tokens take the place of the draft's."""
        self._draft = FinishedCanvas(tokens, self._draft.steps)

    def redo(self, pins: Mapping[int, int]) -> None:
        """The canvas is denoised again, under draws of its own, and holds the pins from its first noise on."""
        self._before = self._draft.steps
        self._draft, self._read, self.new_tokens, self.num_kept = FinishedCanvas([], self._before), [], [], 0
        self.pins, self._begun, self._rounds = pins, self._begun + 1, self._rounds + 1

    def commit(self, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[Event]:
        """Take the draft as finished, or begin the canvas again; tell what that adds to the answer.

        `logprobs`: of the proposal's tokens, where the row tells them.
        """
        canvas, read = self._draft, self._read
        self._draft, self._before, self._read, self.new_tokens, self.num_kept = FinishedCanvas([], 0), 0, [], [], 0
        self.pins, self.checks = {}, 0
        end = self._end(canvas)
        valid = canvas.tokens[:end]
        kept = self._turn.cut(valid)
        stopped = end is not None and kept is valid
        if stopped and self._turn.should_retry(valid):
            self.attempt, self._begun, self._retries = self.attempt + 1, self._begun + 1, self._retries + 1
            self._retried_steps += canvas.steps
            return
        kept, context = kept[: self._room], (canvas.tokens if kept is valid else kept)[: self._room]
        self.attempt, self._begun, self._room = 0, 0, self._room - len(context)
        self.num_kept = common_prefix(read, context)
        self.new_tokens = context[self.num_kept :]
        self.canvases.append(FinishedCanvas(context, canvas.steps, read=bool(read) and not self.new_tokens))
        yield from self._return(kept, stopped, logprobs)

    def _end(self, canvas: FinishedCanvas) -> int | None:
        """Behind the first stop id of a canvas."""
        return next((i + 1 for i, token in enumerate(canvas.tokens) if token in self._stop_ids), None)

    def _return(self, tokens: list[int], stopped: bool, logprobs: Sequence[TokenLogprob]) -> Iterator[Event]:
        """Add the canvas's tokens to the answer, up to the limit or a stop text; end where there is no going on."""
        if self._limit is not None and len(self._tokens) + len(tokens) > self._limit:
            tokens, stopped = tokens[: self._limit - len(self._tokens)], False
        before = len(self._tokens)
        self._tokens += tokens
        self._logprobs += [] if self.logprobs is None else logprobs[: len(tokens)]
        pieces = self._turn.take(tokens)
        if stopped:
            self.finish_reason = "stop"
        elif len(self._tokens) == self._limit or self._room < self._canvas_length:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            pieces = [*pieces, *self._turn.finish()]
        if self._turn.stopped is not None:
            self.finish_reason = "stop"
            self._tokens = self._tokens[: self._turn.tokens_used]
            self._logprobs = self._logprobs[: self._turn.tokens_used]
            tokens = self._tokens[before:]
        assert self.logprobs is None or len(self._logprobs) == len(self._tokens), "log-probabilities were not given"
        told = None if self.logprobs is None else self._logprobs[before:]
        yield Committed(self.index, len(self.canvases) - 1, tokens, self.canvases[-1].steps, told)
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
            if isinstance(piece, TextDelta):
                yield (Text if piece.kind == "answer" else ReasoningDelta)(self.index, piece.text)
            else:
                yield (
                    ToolCallEvent(self.index, piece)
                    if isinstance(piece, ToolCall)
                    else MalformedToolCallEvent(self.index, piece)
                )

    def reply(self) -> Reply:
        """The finished answer. The steps of a canvas that was cancelled are counted, its tokens are not returned."""
        assert self.finish_reason is not None
        said = {
            kind: [p.text for p in self._pieces if isinstance(p, TextDelta) and p.kind == kind]
            for kind in ("answer", "thought")
        }
        return Reply(
            text="".join(said["answer"]) if self._turn.has_text else None,
            tokens=list(self._tokens),
            finish_reason=self.finish_reason,
            usage=self._usage(),
            thinking="".join(said["thought"]) or None,
            tool_calls=tuple(piece for piece in self._pieces if isinstance(piece, ToolCall)),
            broken_calls=tuple(piece for piece in self._pieces if isinstance(piece, MalformedToolCall)),
            logprobs=None if self.logprobs is None else list(self._logprobs),
        )

    def _usage(self) -> Usage:
        steps = sum(canvas.steps for canvas in self.canvases) + self._draft.steps + self._retried_steps
        begun = len(self.canvases) + (self._draft.steps > 0 or self.attempt > 0)
        commits = sum(not canvas.read for canvas in self.canvases[: max(0, begun - 1)])
        forwards = steps + self._passes + commits
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
            checks=self._checked,
            rounds=self._rounds,
        )


def denoised_event(row: SequenceState, place: int, step: Step) -> Denoised:
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
        checks=row.checks,
    )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with.

    >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
