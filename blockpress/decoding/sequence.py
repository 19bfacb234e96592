"""The state of one answer while it grows.

    canvas     t t t t E x x x        valid: up to and including the first stop id E
    returned   t t t t E              never more than `max_tokens`, cut again where a stop string begins

Invariant: `tokens_per_forward` and the other counts follow one definition: a canvas of N steps is N forwards, each
canvas except the last costs one more for its commit, and tokens past the end of the answer are not counted. A causal
pass over a draft is a forward, and also the commit of the tokens it read that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from blockpress.chat import MalformedToolCall, Piece, TextDelta, ToolCall
from blockpress.config import LogitEdits
from blockpress.config.checks import is_count, value_text
from blockpress.constrain import CanvasConstraint, ConstraintState
from blockpress.decoding.early import EarlyText
from blockpress.decoding.events import (
    Committed,
    Denoised,
    Done,
    Event,
    FinishReason,
    Reply,
    TokenLogprob,
    Usage,
    piece_events,
)
from blockpress.decoding.given import Given
from blockpress.decoding.output import Decoder, OutputProcessor, TextOutputProcessor, common_prefix
from blockpress.errors import RequestError

MOST_LOGPROBS = 128
"""Most alternatives that are reported with each token. They are kept for all tokens of the answer: at 130 bytes each,
8,192 tokens with as many alternatives as a vocabulary of 262,144 has would take 280 GB."""


@dataclass(frozen=True)
class FinishedCanvas:
    """The tokens of a canvas that are context for the next one, and its steps.

    read: whether a causal pass had read them all before they were committed.
    """

    tokens: list[int]
    steps: int
    read: bool = False


class SequenceState:
    """One prompt and its answer so far. Limits are in tokens; `room` is how many more the context can hold. Seeds that
    differ by a multiple of 2^64 are the same one.

    `processor` turns the tokens into output; without one they are one text, by `decoder`, or just tokens. `logprobs`:
    how many alternatives are reported with each token's log-probability; None: no log-probabilities.
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
        processor: OutputProcessor | None = None,
        logprobs: int | None = None,
        constraint: ConstraintState | None = None,
        given: Given | None = None,
    ) -> None:
        assert decoder is None or processor is None
        _need(is_count(seed, -math.inf), "seed", seed, "a whole number")
        _need(is_count(canvas_length), "canvas_length", canvas_length, "a whole number of at least 1")
        _need(is_count(room, 0), "room", room, "a whole number of at least 0")
        _need(max_tokens is None or is_count(max_tokens), "max_tokens", max_tokens, "a whole number from 1, or None")
        most = f"a whole number of alternatives from 0 to {MOST_LOGPROBS}, or None"
        _need(logprobs is None or is_count(logprobs, 0, MOST_LOGPROBS), "logprobs", logprobs, most)
        self.index, self.prompt, self.seed = index, list(prompt), int(seed)
        self.logprobs = None if logprobs is None else int(logprobs)
        self.constraint, self.edits = constraint, LogitEdits()  # whoever runs the row sets those of its sampling
        self.images: Mapping[int, Float[Tensor, "_soft hidden"]] = {}
        """The images of the prompt: the position of each one's first soft token, and its features."""
        self.canvases: list[FinishedCanvas] = []
        self.finish_reason: FinishReason | None = None
        self.retry = 0
        """How many times the current canvas has been restarted because the answer was empty."""
        self.given = Given() if given is None else given
        self.pins: Mapping[int, int] = self.given.pins_on(0, canvas_length)
        """Tokens that the current canvas must hold, by position."""
        self.verifications = self._all_verifications = 0
        """How many times the causal pass has verified the current canvas."""
        self.repairs: list[set[tuple[int, int]]] = []
        """Of each repair of the current canvas, what was denoised again: positions, with the tokens that were there."""
        self.num_kept = 0
        """How many of the last draft's tokens that a causal pass read are context now."""
        self.new_tokens: list[int] = []
        """Tokens of the last committed canvas that the context does not hold yet; empty while a canvas is redone."""
        self.stop_ids, self._canvas_length, self._room = frozenset(stop_ids), canvas_length, room
        self._limit = None if max_tokens is None else int(max_tokens)
        self._processor: OutputProcessor = TextOutputProcessor(decoder) if processor is None else processor
        self._tokens, self._read_tokens = list[int](), list[int]()
        self._pieces, self._logprobs = list[Piece](), list[TokenLogprob]()
        self._retries = self._retried_steps = self._restarts = self._redos = self._repairs = self._causal_passes = 0
        self._draft, self._earlier_steps = FinishedCanvas([], 0), 0

    @property
    def canvas_number(self) -> int:
        """Keys the draws of the current canvas: no two canvases of a row share it, restarted ones included.

        bits 24 to 31   how often this canvas was restarted (empty answer) or redone (verification), modulo 256
        bits 20 to 23   the same divided by 256: each verification settles at least one token, so 4 bits suffice
        bits 0 to 19    the number of the canvas
        """
        high, low = divmod(self._restarts, 256)
        assert high < 16 and len(self.canvases) < 1 << 20, "two canvases of a row would draw the same"
        return len(self.canvases) + (low << 24) + (high << 20)

    def claim(self) -> bool:
        """Whether nobody has claimed the row before: it is answered once. Of several threads, one gets it."""
        claim = object()
        return self.__dict__.setdefault("_claim", claim) is claim

    def release(self) -> None:
        """Give up the claim: the row was refused, and may be handed in again."""
        self.__dict__.pop("_claim", None)

    def limit(self, room: int) -> None:
        """Lower the room in the context, before the first canvas. Raises as `check_given`."""
        self._room = min(self._room, room)
        self.check_given()

    def check_given(self) -> None:
        """Raises RequestError: a constraint, pins or a draft need more tokens than there is room for, or contradict."""
        most = self.max_draft_tokens + self.max_later_tokens
        self.given.check_room(most, self.stop_ids)
        if self.constraint is not None:
            self.constraint.constraint.check_length(most, self.constraint.state)
            self.constraint.constraint.check_pins(self.given.pins, most)

    @property
    def banned_ids(self) -> Mapping[int, Container[int]]:
        """Ids that the current canvas must not hold, and at which positions."""
        return self.given.banned_on(len(self._tokens), self.stop_ids, self._processor.banned_ids)

    @property
    def start(self) -> Mapping[int, int]:
        """Tokens that stand in the current canvas's first noise, by position; none once it is repaired."""
        if self.repairs:
            return {}
        return self.given.start_on(len(self._tokens), self._canvas_length, self.seed, self.canvas_number)

    def skipped_steps(self, steps: int) -> int:
        """How many of a canvas's steps come before the one that the current canvas starts with."""
        return 0 if self.repairs else self.given.skipped_steps(len(self._tokens), self._canvas_length, steps)

    @property
    def max_draft_tokens(self) -> int:
        """How many positions of the current canvas the answer has room for."""
        left = self._canvas_length if self._limit is None else self._limit - len(self._tokens)
        return min(left, self._room, self._canvas_length)

    @property
    def max_later_tokens(self) -> int:
        """How many tokens there is room for after the current canvas."""
        most = self._room // self._canvas_length * self._canvas_length
        left = most if self._limit is None else min(most, self._limit - len(self._tokens))
        return max(0, left - self.max_draft_tokens)

    @property
    def canvas_constraint(self) -> CanvasConstraint | None:
        """What the current canvas must follow."""
        return self.constraint and self.constraint.canvas(self.max_draft_tokens, self.max_later_tokens, self.pins)

    @property
    def draft_tokens(self) -> list[int]:
        """All tokens of the draft."""
        return self._draft.tokens

    @property
    def proposal(self) -> list[int]:
        """What a commit would take: the draft up to the first stop id or the limits, as the processor cuts it.

        A prefix of the draft, possibly followed by one token that the processor appends.
        """
        left = self._room if self._limit is None else min(self._room, self._limit - len(self._tokens))
        return self._processor.cut(self._draft.tokens[: self._end(self._draft)])[:left]

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer so far, without the draft."""
        return list(self._tokens)

    def draft(self, argmax: list[int], steps: int) -> None:
        """The canvas after its latest step; `steps` since it was started, or redone after a verification."""
        self._draft = FinishedCanvas(argmax, self._earlier_steps + steps)

    def count_causal_pass(self, *, verification: bool) -> None:
        """A causal pass has read the proposal, to verify it or only for its log-probabilities."""
        self._read_tokens, self._causal_passes = self.proposal, self._causal_passes + 1
        self.verifications += verification
        self._all_verifications += verification

    def correct(self, tokens: list[int]) -> None:
        """Replace the draft's tokens."""
        self._draft = FinishedCanvas(tokens, self._draft.steps)

    def release_text(self, step: Denoised) -> Iterator[Event]:
        """The output that a step of the canvas releases before its end; the tokens become pins (`early`)."""
        pieces = None
        if isinstance(self._processor, EarlyText):
            pieces = self._processor.step(step, self.max_draft_tokens, self.stop_ids)
            self.pins = self.pins if pieces is None else {**self.pins, **self._processor.pins}
        yield from self._emit(pieces or [])

    def redo(self, pins: Mapping[int, int], repaired: set[tuple[int, int]] | None = None) -> None:
        """Denoise the canvas again, with new draws; it holds the pins from its first noise on.

        `repaired`: where a repair denoises it again, and which tokens were there; None: it is redone by a verification.
        """
        self._earlier_steps = self._draft.steps
        self._draft, self.num_kept = FinishedCanvas([], self._earlier_steps), 0
        self._read_tokens, self.new_tokens = [], []
        self.pins, self._restarts = pins, self._restarts + 1
        self._redos, self._repairs = self._redos + (repaired is None), self._repairs + (repaired is not None)
        self.repairs += [] if repaired is None else [repaired]

    def commit(self, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[Event]:
        """Commit the draft, or restart the canvas; yields the events of what this adds. `logprobs`: the proposal's."""
        canvas, read_tokens = self._draft, self._read_tokens
        self._draft, self._earlier_steps, self.num_kept = FinishedCanvas([], 0), 0, 0
        self._read_tokens, self.new_tokens = [], []
        self.pins = self.given.pins_on(len(self._tokens), self._canvas_length)
        self.verifications, self.repairs = 0, []
        end = self._end(canvas)
        valid = canvas.tokens[:end]
        kept = self._processor.cut(valid)
        stopped = end is not None and kept is valid
        if stopped and self._processor.should_retry(valid):
            self.retry, self._restarts, self._retries = self.retry + 1, self._restarts + 1, self._retries + 1
            self._retried_steps += canvas.steps
            if isinstance(self._processor, EarlyText):
                self.pins = {**self.pins, **self._processor.pins}
            return
        kept, context = kept[: self._room], (canvas.tokens if kept is valid else kept)[: self._room]
        self.retry, self._restarts, self._room = 0, 0, self._room - len(context)
        self.num_kept = common_prefix(read_tokens, context)
        self.new_tokens = context[self.num_kept :]
        self.canvases.append(FinishedCanvas(context, canvas.steps, read=bool(read_tokens) and not self.new_tokens))
        yield from self._extend_answer(kept, stopped, logprobs)

    def _end(self, canvas: FinishedCanvas) -> int | None:
        """The length of a canvas up to and including its first stop id; None without one."""
        return next((i + 1 for i, token in enumerate(canvas.tokens) if token in self.stop_ids), None)

    def _extend_answer(self, tokens: list[int], stopped: bool, logprobs: Sequence[TokenLogprob]) -> Iterator[Event]:
        """Add the canvas's tokens to the answer, up to the limit or a stop text; finish it if it cannot continue."""
        if self._limit is not None and len(self._tokens) + len(tokens) > self._limit:
            tokens, stopped = tokens[: self._limit - len(self._tokens)], False
        before = len(self._tokens)
        self._tokens += tokens
        self.pins = self.given.pins_on(len(self._tokens), self._canvas_length)
        if self.constraint is not None:
            self.constraint.advance(tokens)
        self._logprobs += [] if self.logprobs is None else logprobs[: len(tokens)]
        pieces = self._processor.take(tokens)
        if stopped:
            self.finish_reason = "stop"
        elif len(self._tokens) == self._limit or self._room < self._canvas_length:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            pieces = [*pieces, *self._processor.finish()]
        if self._processor.stopped is not None:
            self.finish_reason = "stop"
            self._tokens = self._tokens[: self._processor.tokens_used]
            self._logprobs = self._logprobs[: self._processor.tokens_used]
            tokens = self._tokens[before:]
        assert self.logprobs is None or len(self._logprobs) == len(self._tokens), "log-probabilities are missing"
        new_logprobs = None if self.logprobs is None else self._logprobs[before:]
        yield Committed(self.index, len(self.canvases) - 1, tokens, self.canvases[-1].steps, new_logprobs)
        yield from self._emit(pieces)
        if stopped and self._processor.stopped is None and any(isinstance(piece, ToolCall) for piece in self._pieces):
            self.finish_reason = "tool_calls"
        if self.finish_reason is not None:
            yield Done(self.index, self.reply())

    def cancel(self) -> Iterator[Event]:
        """End here: committed tokens stay, and text held back for later tokens is released."""
        self.finish_reason = "cancelled"
        yield from self._emit(self._processor.finish())
        yield Done(self.index, self.reply())

    def _emit(self, pieces: list[Piece]) -> Iterator[Event]:
        self._pieces += pieces
        return piece_events(self.index, pieces)

    def reply(self) -> Reply:
        """The finished answer. The steps of a cancelled canvas are counted, its tokens are not returned."""
        assert self.finish_reason is not None
        texts = {
            kind: [p.text for p in self._pieces if isinstance(p, TextDelta) and p.kind == kind]
            for kind in ("answer", "thought")
        }
        return Reply(
            text="".join(texts["answer"]) if self._processor.has_text else None,
            tokens=list(self._tokens),
            finish_reason=self.finish_reason,
            usage=self._usage(),
            thinking="".join(texts["thought"]) or None,
            tool_calls=tuple(piece for piece in self._pieces if isinstance(piece, ToolCall)),
            broken_calls=tuple(piece for piece in self._pieces if isinstance(piece, MalformedToolCall)),
            logprobs=None if self.logprobs is None else list(self._logprobs),
            invalid=self.constraint and self.constraint.invalid(self._tokens, self._processor.stopped),
            stopped=self._processor.stopped,
        )

    def _usage(self) -> Usage:
        steps = sum(canvas.steps for canvas in self.canvases) + self._draft.steps + self._retried_steps
        num_started = len(self.canvases) + (self._draft.steps > 0 or self.retry > 0)
        commits = sum(not canvas.read for canvas in self.canvases[: max(0, num_started - 1)])
        forwards = steps + self._causal_passes + commits
        reasoning, cut = self._processor.counts
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
            verifications=self._all_verifications,
            redos=self._redos,
            repairs=self._repairs,
        )


def _need(ok: bool, name: str, value: object, what: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {value_text(value)}", hint=f"{name} must be {what}")
