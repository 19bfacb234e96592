"""Where the tokens of a text stand in its recording: each where the finished text has it, so that nothing moves.

    finished    The sky is blue        A token that is longer than its place is cut, as " was" is in the place of " i"
    before      The ___ w… ____        would be; noise is as long as what will stand there.

Invariant: the pieces of the finished text, joined, are the answer with its control tokens spelled out.

Run it:  python -m pytest tests/cli/test_record.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size

from blockpress.cli.canvas import piece_of, text_cells
from blockpress.cli.grid import State
from blockpress.cli.terminal import without_controls
from blockpress.decoding import Committed, Denoised, Event, Reply
from blockpress.text.detokenizer import detokenizer_for

if TYPE_CHECKING:
    from blockpress.lm import LM

COLUMNS = 72


class DrawnCell(NamedTuple):
    """A token: its place in characters, its text on one line, its state (None: committed). Noise has no text."""

    column: int
    row: int
    width: int
    text: str
    state: State | None


class Page:
    """The places of an answer's tokens. `pieces`: the text of each, the stop left out."""

    def __init__(self, lm: LM, reply: Reply, events: Sequence[Event]) -> None:
        self._lm = lm
        self.pieces = final_pieces(lm, reply)
        self._tokens = reply.tokens[: len(self.pieces)]
        self._places = list(places(self.pieces))
        counts = [len(event.tokens) for event in events if isinstance(event, Committed)]
        self._starts = [min(start, len(self.pieces)) for start in accumulate(counts, initial=0)]
        self.canvases = len(counts)

    def finished(self) -> list[DrawnCell]:
        """The answer."""
        return [self._cell(number, token, None) for number, token in enumerate(self._tokens)]

    def canvas(self, event: Denoised, states: Sequence[State]) -> list[DrawnCell]:
        """What is committed, and a canvas with a state for each position.

        Positions that the answer will not have stand after those that it will have, a character each.
        """
        start, end = self._starts[event.canvas : event.canvas + 2]
        column, row, _ = self._places[end]
        cells = self.finished()[:start]
        for number, (token, state) in enumerate(text_cells(self._lm, event.argmax.tolist(), states), start):
            if number < end:
                cells.append(self._cell(number, token, state))
            else:
                down, right = divmod(max(column, 0) + number - end, COLUMNS)
                cells.append(_fitted(right, row + down, 1, piece_of(self._lm, token), state))
        return cells

    def _cell(self, number: int, token: int, state: State | None) -> DrawnCell:
        final, (column, row, width) = self.pieces[number], self._places[number]
        if state is State.NOISE:  # it leaves the space free that a word begins with
            indent = max(0, min(len(final) - len(final.lstrip(" ")), width - 1))
            return DrawnCell(column + indent, row, width - indent, "", state)
        return _fitted(column, row, width, final if token == self._tokens[number] else piece_of(self._lm, token), state)


def final_pieces(lm: LM, reply: Reply) -> list[str]:
    """The text of each token of the answer before its stop; joined, all of its text, control tokens spelled out."""
    tokens = list(takewhile(lambda token: token not in lm.generation.stop_ids, reply.tokens))
    if lm.tokenizer is None:
        return [piece_of(lm, token) for token in tokens]
    speller, pieces = detokenizer_for(lm.tokenizer.backend), [""] * len(tokens)
    chunks = [chunk for place, token in enumerate(tokens, 1) for chunk in speller.push(token, place)]
    for chunk in [*chunks, *speller.flush()]:
        pieces[chunk.token_index - 1] += chunk.text
    if reply.text and reply.finish_reason == "stop" and len(tokens) == len(reply.tokens):
        # A stop text ended it, which may begin inside of the last token.
        _, found, more = "".join(pieces).rpartition(reply.text)
        pieces[-1] = pieces[-1].removesuffix(more) if found else pieces[-1]
    return pieces


def places(pieces: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Column, row and width of each piece, and of what would follow them; lines break between words where they can.

    >>> [place[:2] for place in places(["a" * 70, " bcd", "efghi", "\\n", "j"])]
    [(0, 0), (-1, 1), (3, 1), (8, 1), (0, 2), (1, 2)]
    """
    column = row = 0
    for number, piece in enumerate(pieces):
        width = need = min(cell_len(spelled(piece)), COLUMNS)
        if number == 0 or piece[:1] == " " or pieces[number - 1][-1:] == "\n":
            rest = takewhile(lambda after: after[:1] not in (" ", "\n"), pieces[number + 1 : number + COLUMNS])
            word = width + sum(cell_len(spelled(after)) for after in rest)
            need = word if word <= COLUMNS else width
        if piece.strip("\n") and column + need > COLUMNS:
            column, row = (-1 if piece[:1] == " " else 0), row + 1  # the space before a word hangs out
        yield column, row, width
        column += width
        if lines := piece.count("\n"):
            column, row = 0, row + lines
    yield column, row, 0


def spelled(piece: str) -> str:
    """A piece on one line, its line ends as signs.

    >>> spelled("a\\n\\n")
    'a↵↵'
    """
    return without_controls(piece).replace("\n", "↵").replace("\t", "    ")


def _fitted(column: int, row: int, width: int, piece: str, state: State | None) -> DrawnCell:
    text = "" if state is State.NOISE else spelled(piece)
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "…" if width else ""
    return DrawnCell(column, row, width, text, state)
