"""Infilling: a hole is written between what stands before and after it; and editing, which starts from the old text.

    context   | canvas                                                            lengths are tried in one batch, each
    p p p p p | p p p h h h h s s s s E E E      p: before   h: hole   s: after    with the text after the hole in place
              |       ^-----^ seams are re-cut: a token may hold both sides

What stands on both sides is shown on the canvas as far as it fits, and given back byte for byte: `whole` is joined
from the caller's strings. A hole that is as long as the canvas allows is kept by half, and the rest is written anew.

Invariant: `whole` is the pieces with the holes between them; nothing runs before every argument has been checked.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal, final

from blockpress.constrain import Constraint, ConstraintState
from blockpress.constrain.filling import Filling, filling
from blockpress.constrain.tokens import FAR
from blockpress.decoding import FinishReason, Given, Reply, SequenceState, Text, Usage
from blockpress.engine import Request
from blockpress.errors import PromptTooLong, RequestError
from blockpress.lm.hole import End, Fill, Hole, HoleLayout, how_well, joined
from blockpress.lm.rounds import Filler, Outcome, Round
from blockpress.lm.seams import Seams

FIRST_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Lengths of a hole, in tokens, that are tried at first; then those between the best one and its neighbours."""
FINER = 8
"""Most lengths of each finer trial."""
ALL = 64
"""Lengths up to this one are all tried if none of the others fits."""
FITS = 0.5
"""The score of a length that fits: the network takes most of what stands around the hole for what belongs there."""
VIEW = 4
"""A canvas shows at least one part in so many of what stands after the hole, if there is as much."""


@final
class Infiller:
    """Fills the holes of one model's calls."""

    def __init__(self, fill: Fill, seams: Seams, canvas: int, context_length: int) -> None:
        self.fill, self.seams, self.canvas, self.context_length = fill, seams, canvas, context_length
        self._usage = Usage(0, 0, 0, 0, 0, 0.0)

    def check(self) -> None:
        """Raises RequestError, PromptTooLong: a hole has no room, or the text around it cannot be written."""
        pieces = self.fill.pieces
        for number in range(1, len(pieces)):
            hole = self._hole("".join(pieces[:number]), pieces[number], last=number + 1 == len(pieces))
            if not self._lengths(hole):
                self._refuse(hole)

    def _refuse(self, hole: Hole) -> None:
        if hole.middle.distance[0] >= FAR:
            raise RequestError(f"the vocabulary cannot write {self.fill.about}", hint="use characters that it has")
        if self.fill.old is not None and hole.old is not None and len(hole.old) > self._room(hole):
            raise RequestError(
                f"span has {len(hole.old)} tokens, and a canvas has room for {self._room(hole)}",
                hint="edit a shorter span, one after the other",
            )
        if hole.least > self.fill.most:
            raise RequestError(
                f"{self.fill.about} needs {hole.least} tokens, and max_tokens is {self.fill.most}",
                hint="allow more tokens",
            )
        count = len(self.fill.base) + len(hole.before) + len(hole.heal)
        raise PromptTooLong(
            f"{count} tokens stand before the hole, a canvas has {self.canvas}, the model's context "
            f"{self.context_length}",
            hint="shorten the text before the hole, or what the hole must hold",
        )

    def run(self) -> Filler:
        """Fill hole after hole; several are written once more, each with all of the others filled. Gives the reply."""
        pieces, count = self.fill.pieces, len(self.fill.pieces) - 1
        holes, tokens, reasons = [""] * count, [list[int]()] * count, ["stop"] * count
        for again in range(1 + (count > 1)):
            for number in range(count):
                text = joined(pieces[: number + 1], holes)
                after = joined(pieces[number + 1 :], holes[number + 1 :]) if again else pieces[number + 1]
                hole = self._hole(text, after, last=bool(again) or number + 1 == count)
                if not self._lengths(hole):  # what the other holes hold leaves the context no room for more
                    reasons[number] = "length"
                    continue
                written = yield from self._write(hole)
                if written is None:
                    return self._reply(holes, tokens, "cancelled")
                holes[number], tokens[number], reasons[number] = written
        for hole_text in holes:
            yield Text(0, hole_text)
        return self._reply(holes, tokens, "length" if "length" in reasons else "stop")

    def _reply(self, holes: list[str], tokens: list[list[int]], reason: FinishReason) -> Reply:
        written, sums = [token for each in tokens for token in each], self._usage
        usage = replace(
            sums,
            prompt_tokens=len(self.fill.base) + sum(len(self.seams.encode(piece)) for piece in self.fill.pieces),
            completion_tokens=len(written),
            tokens_per_forward=len(written) / sums.forwards if sums.forwards else 0.0,
        )
        invalid = "the answer was cancelled before its holes were filled" if reason == "cancelled" else None
        whole = joined(self.fill.pieces, holes)
        return Reply("".join(holes), written, reason, usage, invalid=invalid, holes=tuple(holes), whole=whole)

    def _hole(self, text: str, following: str, *, last: bool) -> Hole:
        """The hole between two texts. last: the whole text ends with the second."""
        before, heal = self.seams.before(text)
        seam, after = self.seams.after(following)
        middle = self.seams.region(heal, self.fill.hole, seam)
        old = None if self.fill.old is None else self.seams.encode(self.fill.old)
        return Hole(before, heal, seam, after, last, middle, old)

    def _write(self, hole: Hole) -> Generator[Round | Text, list[Outcome], tuple[str, list[int], str] | None]:
        """A hole, canvas by canvas: its text, its tokens, and how it ended; None: cancelled."""
        while True:
            length = yield from self._find_length(hole)
            if length is None:
                return None
            layout = self._layout(hole, length)
            made, request = self._request(hole, layout)
            (outcome,) = yield Round([request], shown=True)
            assert outcome.reply is not None
            self._count(outcome)
            if outcome.reply.finish_reason == "cancelled":
                return None
            inside, states = made.split(outcome.reply.tokens)
            ahead = layout.end == "open" or not hole.seam  # what stands after the hole may not be on the canvas
            here = len(inside) - len(hole.starts) - len(hole.seam)
            full = hole.old is None and here >= self._room(hole)
            if ahead:
                ended = len(layout.before) + len(inside) < len(outcome.reply.tokens)
                full = outcome.reply.finish_reason == "length" and not ended
            region = [*hole.kept, *inside]
            used_up = len(region) - len(hole.heal) - len(hole.seam) >= self.fill.most
            kept = len(inside) if ahead else (len(inside) - len(hole.seam)) // 2
            if full and kept > 0 and not (used_up and layout.end != "open"):
                later = hole.after_canvas(inside[:kept], states[kept])
                if self._lengths(later):
                    hole = later
                    continue
            return *self._between(hole, region), "length" if full or used_up else "stop"

    def _between(self, hole: Hole, region: list[int]) -> tuple[str, list[int]]:
        """The text of a region without that of its seams, and the tokens that hold some of it."""
        pieces = [self.seams.pieces[token] or b"" for token in region]
        ends = [0, *accumulate(map(len, pieces))]
        first = sum(len(self.seams.pieces[token] or b"") for token in hole.heal)
        last = ends[-1] - sum(len(self.seams.pieces[token] or b"") for token in hole.seam)
        tokens = [token for token, (a, b) in zip(region, pairwise(ends), strict=True) if max(a, first) < min(b, last)]
        return b"".join(pieces)[first:last].decode("utf-8"), tokens

    def _find_length(self, hole: Hole) -> Generator[Round | Text, list[Outcome], int | None]:
        """The length at which the canvas, after one step, has the text after the hole in its place; None: cancelled."""
        lengths, scores = self._lengths(hole), dict[int, float]()
        tried = [length for length in FIRST_LENGTHS if length in lengths] or lengths[:1]
        tried = sorted({*tried, lengths[-1]} if hole.old is None else {*lengths[:: max(1, len(lengths) // FINER)]})
        while len(lengths) > 1 and tried:
            layouts = [self._layout(hole, length) for length in tried]
            outcomes = yield Round([self._request(hole, each, trial=True)[1] for each in layouts], shown=False)
            for layout, outcome in zip(layouts, outcomes, strict=True):
                self._count(outcome)
                if outcome.step is None or outcome.reply is None or outcome.reply.finish_reason == "cancelled":
                    return None
                scores[layout.length] = how_well(layout, outcome.step)
            best = max(scores, key=lambda length: (scores[length], -length))
            known = sorted(scores)
            place = known.index(best)
            between = [
                n for n in lengths if known[max(0, place - 1)] < n < known[min(place + 1, len(known) - 1)] and n != best
            ]
            tried = between[:: max(1, -(-len(between) // FINER))]
            if not tried and scores[best] < FITS:
                tried = [n for n in lengths if n <= ALL and n not in scores]
        if not scores or (not hole.seam and max(scores.values()) < FITS):
            return lengths[-1]
        return max(scores, key=lambda length: (scores[length], -length))

    def _room(self, hole: Hole) -> int:
        """The most tokens that one canvas has for the hole itself."""
        view = min(len(hole.after) + hole.last, max(1, self.canvas // VIEW))
        room = self.canvas - len(hole.heal) - len(hole.seam) - view
        return min(room, self.fill.most - self._added(hole))

    def _added(self, hole: Hole) -> int:
        """How many tokens earlier canvases have added to the hole."""
        return max(0, len(hole.kept) - len(hole.heal))

    def _lengths(self, hole: Hole) -> list[int]:
        """The lengths that have room, in ascending order."""
        room, fits = self._room(hole), self.context_length - self.canvas
        if hole.least > room and hole.old is None:  # one canvas does not suffice: this one is a part of the hole
            enough = hole.least <= self.fill.most - self._added(hole)
            whole = len(self.fill.base) + len(hole.before) + len(hole.kept) + hole.least
            return [self.canvas] if enough and whole <= fits else []
        lengths = range(hole.least or not hole.seam, room + 1)
        if hole.old is not None:
            count = len(hole.old)
            more = max(2, count // 4)
            lengths = range(max(lengths.start, count - more), min(lengths.stop, count + more + 1))
            if count >= lengths.stop:
                return []
        return [n for n in lengths if self._context(hole, n) <= fits]

    def _context(self, hole: Hole, length: int) -> int:
        return len(self.fill.base) + self._layout(hole, length).context

    def _layout(self, hole: Hole, length: int) -> HoleLayout:
        given, heal = [*hole.before, *hole.kept], hole.starts
        if length == self.canvas:
            draft = dict(enumerate(heal))
            return HoleLayout(length - len(heal), len(given), [], length, [], "open", length, draft, {})
        region = len(heal) + length + len(hole.seam)
        room = self.canvas - region
        end: End = "stop" if hole.last else "free"
        need = len(hole.after) + hole.last
        if need > room:
            end, need = "cut", room
        after = hole.after[:need]
        tail = min(len(given), room - need)
        before = given[len(given) - tail :]
        places = [*before, *heal, *[None] * length, *hole.seam, *after]
        stop = len(places)
        if end == "stop" and hole.seam:
            places += [self.fill.stop_ids[0]] * (self.canvas - stop)
        first = len(before) + len(heal)
        draft = {place: token for place, token in enumerate(places) if token is not None}
        noise = dict[int, float]()
        for place, token in enumerate((hole.old or ())[:length]):
            draft[first + place], noise[first + place] = token, self.fill.noise
        left = self._room(hole) - length
        limit = self.canvas if end == "cut" else min(self.canvas, stop + (end == "stop") + left)
        return HoleLayout(length, len(given) - tail, before, region, after, end, limit, draft, noise)

    def _request(self, hole: Hole, layout: HoleLayout, *, trial: bool = False) -> tuple[Filling, Request]:
        """The request of a canvas. trial: one free step, which says how well the length fits."""
        fill, state, made = self.fill, None, None
        sampling = fill.sampling.with_(steps=1) if trial else fill.sampling
        if not trial:
            least, more, after = None, None, hole.after[: self.canvas]
            if layout.end == "cut":
                most = len(layout.before) + layout.region - layout.length + self._room(hole)
                least = min(len(layout.after), max(1, self.canvas - most))
            elif layout.end == "open":
                least, more = 0, fill.most - self._added(hole) - layout.length + len(hole.seam)
            ends: Literal["stop", "free"] = "stop" if hole.last else "free"
            made = filling(hole.middle, hole.state, layout.before, after, ends, fill.stop_ids, least, more)
            state = ConstraintState(Constraint(made.automaton, fill.about))
            state.state = made.start
        limit = self.canvas if trial else layout.limit
        prompt = [*fill.base, *[*hole.before, *hole.kept][: layout.context]]
        row = SequenceState(
            0,
            prompt,
            fill.seed,
            stop_ids=() if trial else fill.stop_ids,
            canvas_length=self.canvas,
            room=self.canvas,
            max_tokens=limit,
            constraint=state,
            given=Given(draft={i: token for i, token in layout.draft.items() if i < limit}, noise=layout.noise),
        )
        return made, Request(row, sampling)  # type: ignore[return-value]  # a trial has no use for the automaton

    def _count(self, outcome: Outcome) -> None:
        if outcome.reply is not None:
            one, sums = outcome.reply.usage, self._usage
            self._usage = replace(
                sums,
                canvases=sums.canvases + one.canvases,
                steps=sums.steps + one.steps,
                forwards=sums.forwards + one.forwards,
            )
