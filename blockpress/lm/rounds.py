"""Answers that take several rounds of requests, several of them at once.

    filler 1   --requests-->  +-----------+  --outcomes-->  filler 1        a round: what all wait for, in one batch
    filler 2   --requests-->  |  engine   |  --outcomes-->  filler 2
                              +-----------+

Invariant: what one filler is answered does not depend on the others.
Run it:  python -m pytest tests/lm/test_infill.py
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from blockpress.decoding import Cancel, Denoised, Done, Event, Reply, Text
from blockpress.engine import Request
from blockpress.lm.arguments import is_integer
from blockpress.lm.execute import Answer
from blockpress.model import Network


@dataclass(frozen=True)
class Round:
    """Requests that are answered together. shown: whether their steps are events for the caller."""

    requests: list[Request]
    shown: bool


@dataclass
class Outcome:
    """What became of a request: its last step and its reply."""

    step: Denoised | None = None
    reply: Reply | None = None


Filler = Generator[Round | Text, list[Outcome], Reply]


def run_fills(answer: Answer, network: Network, fillers: Sequence[Filler], cancel: Cancel | None) -> Iterator[Event]:
    """The events of several fills, each a row: what they wait for in the same round is answered in one batch."""
    waiting = dict(enumerate(fillers))
    sent: dict[int, list[Outcome] | None] = dict.fromkeys(waiting)
    while waiting:
        rounds: dict[int, Round] = {}
        for row, filler in list(waiting.items()):
            while row not in rounds:
                try:
                    said = filler.send(sent.pop(row, None))  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as ended:
                    del waiting[row]
                    yield Done(row, ended.value)
                    break
                if isinstance(said, Round):
                    rounds[row] = said
                else:
                    yield replace(said, row=row)
        asked = [(row, request) for row, each in rounds.items() for request in each.requests]
        outcomes = [Outcome() for _ in asked]
        for index, (_, request) in enumerate(asked):
            request.row.index = index
        for event in answer(network, [request for _, request in asked], cancel) if asked else ():
            row, outcome = asked[event.row][0], outcomes[event.row]
            if isinstance(event, Denoised):
                outcome.step = event
                if rounds[row].shown:
                    yield replace(event, row=row)
            elif isinstance(event, Done):
                outcome.reply = event.reply
        for row in rounds:
            sent[row] = [outcome for (owner, _), outcome in zip(asked, outcomes, strict=True) if owner == row]


def replies_of(events: Iterator[Event], seed: object) -> Reply | list[Reply]:
    """The reply at the end of the events; a list of them if `seed` is no single number."""
    replies = {event.row: event.reply for event in events if isinstance(event, Done)}
    return replies[0] if is_integer(seed) else [replies[row] for row in sorted(replies)]
