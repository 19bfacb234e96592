"""The rows of a forward: every token of every work once, in the order kv_only, with_logits, canvases."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpress.engine.batch import Batch
from blockpress.engine.request import Request
from blockpress.engine.scheduler import ScheduledRequest

from .simulator import PAGE, ask

SHARES = st.tuples(st.integers(1, 20), st.booleans(), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))


def made(shares: list[tuple[int, bool, int, int, int]]) -> list[ScheduledRequest]:
    """Parts of contexts, some to the end, of canvases and of single tokens, some with a proposal that is judged."""
    found = []
    for length, diffusion, *ends, asked in shares:
        request = ask([10 + i for i in range(length)], "diffusion" if diffusion else "autoregressive")
        start, stop = sorted(min(end, length) for end in ends)
        if stop == length and asked % 2:
            request.num_draft_tokens = min(asked, stop - start)
        canvas = stop == length and diffusion and not request.num_draft_tokens
        if canvas or stop > start or (stop == length and not diffusion):  # the last: its token is chosen once more
            heard = min(request.num_logit_tokens, stop - start) if stop == length else 0
            found.append(ScheduledRequest(request, start, stop, canvas, heard))
    return found


def wanted(work: ScheduledRequest) -> dict[str, list[int]]:
    """The positions of a work's rows by kind."""
    request = work.request
    last = request.num_logit_tokens if work.stop == len(request.context) else 0
    heard = [at for at in range(work.start, work.stop) if at >= work.stop - last]
    return {
        "kv_only": [at for at in range(work.start, work.stop) if at not in heard],
        "with_logits": heard,
        "canvases": list(range(work.stop, work.stop + PAGE)) if work.canvas else [],
    }


@given(st.lists(SHARES, min_size=1, max_size=5))
def test_every_token_has_one_row(shares: list[tuple[int, bool, int, int, int]]) -> None:
    works = made(shares)
    batch = Batch.of(works, PAGE)
    positions = batch.positions(torch.device("cpu"))[0].tolist() if batch.num_rows else []
    found: dict[tuple[Request, str], list[int]] = {}
    row = 0
    for kind in ("kv_only", "with_logits", "canvases"):
        parts: tuple[Any, ...] = getattr(batch, kind)
        for part in parts:
            assert (part.start, part.canvas) == (row, kind == "canvases") and part.stop > row
            row = part.stop
            assert (part.request, kind) not in found, "one part a request and kind"
            found[part.request, kind] = positions[part.start : part.stop]
            if not part.canvas:
                assert part.tokens == [10 + at for at in positions[part.start : part.stop]]
        ends = {"kv_only": batch.num_kv_only, "with_logits": batch.num_causal, "canvases": batch.num_rows}
        assert row == ends[kind]
    expected = {(work.request, kind): at for work in works for kind, at in wanted(work).items() if at}
    assert found == expected
    assert batch.causal(torch.device("cpu")).tolist() == [at < batch.num_causal for at in range(batch.num_rows)]
