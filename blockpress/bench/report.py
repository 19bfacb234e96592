"""What a run comes to: times, steps, tokens, memory, and the share of this machine's floors.

Invariant: every figure follows from what was recorded; shares are of ceilings that were measured in the same process,
over the operations and bytes of the rows that each forward had.
Run it:  blockpress bench --preset tiny --json
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockpress import costs, sudoku
from blockpress.bench.drive import BenchRun, RequestTrace
from blockpress.bench.subject import Subject, stored_formats, weight_bytes
from blockpress.bench.workload import Workload, puzzle_of


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, median and 95th percentile of some figures; all 0 where there are none."""

    mean: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """
        >>> Spread.of([4, 1, 3, 2])
        Spread(mean=2.5, p50=2, p95=4)
        """
        ordered = sorted(values)
        if not ordered:
            return cls(mean=0.0, p50=0.0, p95=0.0)
        return cls(mean=sum(ordered) / len(ordered), p50=_percentile(ordered, 0.5), p95=_percentile(ordered, 0.95))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest figure that so large a share of them does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The figures of a run; times in milliseconds unless the name says otherwise, memory in bytes.

    answered, failed, refused: requests. solved: answers that solve their puzzle; None where prompts are none. errors:
    what the failed ones said, each once. prefill_ms: of the forwards that
    read prompts, together; the last of them takes the first step, too. forward_ms: of all forwards. steps_per_canvas:
    all 0 token by token. tokens_per_forward: of a request, on average. tokens_per_second_user: of a request from its
    arrival to its end, on average. first_canvas_ms: from arrival to the first canvas, or token. peak_bytes: resident
    above the loaded model. page_bytes: most that requests held. step_bytes: what the largest forward asks for beside
    them, by `costs.engine_peak`. byte_share, arithmetic_share: of the time of all
    forwards, what reading each byte once, and what the operations alone, would take at this machine's ceilings;
    floor_share: part by part the longer of both.
    """

    answered: int
    failed: int
    refused: int
    errors: tuple[str, ...]
    solved: int | None
    seconds: float
    requests_per_second: float
    forwards: int
    canvases: int
    steps: int
    tokens: int
    prefill_ms: float
    forward_ms: Spread
    steps_per_canvas: Spread
    tokens_per_forward: float
    tokens_per_second: float
    tokens_per_second_user: float
    first_canvas_ms: Spread
    weight_bytes: int
    peak_bytes: int
    page_bytes: int
    step_bytes: int
    byte_share: float
    arithmetic_share: float
    floor_share: float


def report(subject: Subject, work: Workload, run: BenchRun, device: costs.Device, *, soft: bool = True) -> BenchReport:
    """The figures of a run on a machine that can do what `device` says.

    Args:
        soft: whether the soft embedding was a product over the whole vocabulary.
    """
    ended = [asked for asked in run.traces if asked.reply is not None]
    replies = [asked.reply for asked in ended if asked.reply is not None]
    steps = [float(count) for asked in ended for count in asked.steps if count]
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    shares = _shares(subject, run, device, soft)
    return BenchReport(
        answered=len(ended),
        failed=len(run.errors),
        refused=run.refused,
        errors=tuple(sorted({str(error) for error in run.errors})),
        solved=_solved(subject, work, ended),
        seconds=run.seconds,
        requests_per_second=len(ended) / run.seconds if run.seconds else 0.0,
        forwards=len(run.forwards),
        canvases=sum(reply.usage.canvases for reply in replies),
        steps=sum(reply.usage.steps for reply in replies),
        tokens=tokens,
        prefill_ms=1000 * sum(forward.seconds for forward in run.forwards if forward.prefill),
        forward_ms=Spread.of(1000 * forward.seconds for forward in run.forwards),
        steps_per_canvas=Spread.of(steps),
        tokens_per_forward=_mean(reply.usage.tokens_per_forward for reply in replies),
        tokens_per_second=tokens / run.seconds if run.seconds else 0.0,
        tokens_per_second_user=_mean(_speed(asked) for asked in ended),
        first_canvas_ms=Spread.of(1000 * (one.first - one.arrived) for one in ended if one.first is not None),
        weight_bytes=sum(weight_bytes(subject.network).values()),
        peak_bytes=run.peak_bytes,
        page_bytes=run.page_bytes,
        step_bytes=max((_step_bytes(subject, forward.rows) for forward in run.forwards), default=0),
        byte_share=shares[0],
        arithmetic_share=shares[1],
        floor_share=shares[2],
    )


def report_lines(found: BenchReport, device: costs.Device) -> list[str]:
    """The report for people, one figure a line."""
    first, forward, steps = found.first_canvas_ms, found.forward_ms, found.steps_per_canvas
    rates = ", ".join(f"{rate / 1e12:.2f} T {math}" for math, rate in device.rates.items())
    solved = "" if found.solved is None else f", {found.solved} of them solved"
    ends = f"{found.answered} answered{solved}" + "".join(
        f", {count} {what}" for what, count in (("failed", found.failed), ("refused", found.refused)) if count
    )
    memory = (
        f"{_mib(found.peak_bytes)} above {_mib(found.weight_bytes)} of weights: {_mib(found.page_bytes)} in pages, "
        f"{_mib(found.step_bytes)} a forward asks for"
    )
    said = [
        ("machine", f"{device.name}: {rates} operations a second, {device.bandwidth / 1e9:.1f} GB/s read"),
        ("requests", f"{ends} in {found.seconds:.2f} s: {found.requests_per_second:.2f} a second"),
        ("prefill", f"{found.prefill_ms:.1f} ms"),
        ("forward", f"{forward.mean:.2f} ms mean, {forward.p50:.2f} p50, {forward.p95:.2f} p95; {found.forwards}"),
        ("steps", f"{steps.mean:.1f} a canvas, {steps.p50:.0f} p50, {steps.p95:.0f} p95; {found.canvases} canvases"),
        ("tokens", f"{found.tokens}, {found.tokens_per_forward:.1f} a forward"),
        ("speed", f"{found.tokens_per_second_user:.1f} tokens/s a user, {found.tokens_per_second:.1f} in total"),
        ("first canvas", f"after {first.p50:.0f} ms p50, {first.p95:.0f} p95"),
        ("memory", memory),
        ("of floors", f"{found.byte_share:.1%} bytes, {found.arithmetic_share:.1%} arithmetic, "
                      f"{found.floor_share:.1%} part by part"),
    ]  # fmt: skip
    shown = [(name, text) for name, text in said if name != "steps" or found.steps]
    return [f"{name:13}{text}" for name, text in [*shown, *(("error", text) for text in found.errors)]]


def _shares(subject: Subject, run: BenchRun, device: costs.Device, soft: bool) -> tuple[float, float, float]:
    """The floors of all forwards over their time: bytes, operations, part by part."""
    stored = stored_formats(subject.network)
    taken = sum(forward.seconds for forward in run.forwards)
    totals = [0.0, 0.0, 0.0]
    for forward in run.forwards:
        parts = costs.forward(subject.config, stored, forward.rows, soft=soft)
        for place, floor in enumerate((costs.byte_seconds, costs.arithmetic_seconds, costs.floor_seconds)):
            totals[place] += floor(parts, device)
    return tuple(total / taken if taken else 0.0 for total in totals)  # type: ignore[return-value]


def _step_bytes(subject: Subject, rows: costs.BatchShape) -> int:
    """What a forward of the engine asks for at its peak; each canvas and each read as if behind the longest context."""
    behind = [*rows.canvases, *(context for context, _ in (*rows.reads, *rows.logit_rows))]
    tokens = sum(count for _, count in (*rows.reads, *rows.logit_rows))
    dtype = str(subject.network.dtype).removeprefix("torch.")
    return costs.engine_peak(subject.config, dtype, max(behind, default=0), len(rows.canvases), tokens)


def _solved(subject: Subject, work: Workload, ended: Sequence[RequestTrace]) -> int | None:
    """How many of the answers are the solution of their puzzle."""
    if not work.puzzles or subject.lm is None:
        return None
    wanted = [sudoku.layout(puzzle_of(work, asked.request.row.index).solution) for asked in ended]
    given = [subject.lm.decode(asked.reply.tokens) for asked in ended if asked.reply is not None]
    return sum(one == other for one, other in zip(wanted, given, strict=True))


def _speed(asked: RequestTrace) -> float:
    assert asked.reply is not None and asked.ended is not None
    took = asked.ended - asked.arrived
    return asked.reply.usage.completion_tokens / took if took > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
