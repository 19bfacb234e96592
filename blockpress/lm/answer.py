"""Requests of one call, answered: by an engine of their own, or, slowly and plainly, by the poem.

    answer    an engine, driven by whoever asks for the next event: rows that are finished leave at once, and where
              there are more than `AT_ONCE`, the next ones take their places
    recite    `generate`, `verified` or `autoregress`, all rows together from the first canvas to the last

Invariant: both give the same events, row by row.
Run it:  python -m pytest tests/test_lm.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from blockpress.autoregress import autoregress
from blockpress.config import AutoregressiveSampling
from blockpress.engine import Core, EngineOptions, Request
from blockpress.generate import generate
from blockpress.model import Network
from blockpress.reply import Cancel, Event, Failed
from blockpress.verify import verified

AT_ONCE = 32
Answer = Callable[[Network, Sequence[Request], Cancel | None], Iterator[Event]]


def answer(network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
    """The events of all requests, in the order of time.

    Args:
        cancel: asked before every forward; once it is set, every request still under way ends as "cancelled".

    Raises:
        EngineError: a forward that failed, or that gave no numbers.
    """
    if not requests:
        return
    core = Core(network, EngineOptions(max_running=min(len(requests), AT_ONCE), max_waiting=len(requests)))
    for request in requests:
        core.submit(request)
    while core.busy:
        if cancel is not None and cancel.is_set():
            for request in requests:
                core.cancel(request)
        for _, event in core.step():
            if isinstance(event, Failed):
                raise event.error
            yield event


def recite(network: Network, requests: Sequence[Request], cancel: Cancel | None) -> Iterator[Event]:
    """The same by the poem; the requests must be of one sampling."""
    if not requests:
        return iter(())
    rows, sampling = [request.row for request in requests], requests[0].sampling
    assert all(request.sampling == sampling for request in requests)
    if isinstance(sampling, AutoregressiveSampling):
        return autoregress(network, rows, sampling, cancel)
    looked_at = sampling.checks > 0 or rows[0].logprobs is not None
    return (verified if looked_at else generate)(network, rows, sampling, cancel)
