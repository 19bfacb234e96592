"""The figures of a run: times, steps, tokens, memory, and the share of this machine's roofline.

Invariant: every figure follows from the recorded run; shares are of ceilings measured in the same process, over the
operations and bytes of the batch of each forward.
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
from blockpress.ops.cpu import bridge


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, median and 95th percentile; all 0 where there are no values."""

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
    """The smallest value that at least this share of all values does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The figures of a run; times in milliseconds unless the name says otherwise, memory in bytes.

    answered, failed, refused: requests. solved: answers that solve their puzzle; None where prompts are not puzzles.
    errors: the distinct messages of failed requests. prefill_ms: of all forwards that read prompts; the last of them
    also takes the first step. forward_ms: of all forwards. steps_per_canvas: all 0 in autoregressive decoding.
    tokens_per_forward: mean over requests. tokens_per_second_user: of a request from its arrival to its end, mean.
    first_canvas_ms: from arrival to the first canvas, or token. peak_bytes: resident above the loaded model.
    page_bytes: most that requests held. step_bytes: what the largest forward allocates besides, by `costs.engine_peak`.
    byte_share, arithmetic_share: the shares of the time of all forwards that reading each byte once, and that the
    operations alone, would take at this machine's ceilings; floor_share: part by part the longer of the two.
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
    """The figures of a run on a machine whose ceilings are `device`.

    Args:
        soft: whether the soft embedding was a product over the whole vocabulary.
    """
    ended = [trace for trace in run.traces if trace.reply is not None]
    replies = [trace.reply for trace in ended if trace.reply is not None]
    steps = [float(count) for trace in ended for count in trace.steps if count]
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
        tokens_per_second_user=_mean(_speed(trace) for trace in ended),
        first_canvas_ms=Spread.of(1000 * (trace.first - trace.arrived) for trace in ended if trace.first is not None),
        weight_bytes=sum(weight_bytes(subject.network).values()),
        peak_bytes=run.peak_bytes,
        page_bytes=run.page_bytes,
        step_bytes=max((_step_bytes(subject, forward.rows) for forward in run.forwards), default=0),
        byte_share=shares[0],
        arithmetic_share=shares[1],
        floor_share=shares[2],
    )


def report_lines(report: BenchReport, device: costs.Device) -> list[str]:
    """The report as text, one figure a line."""
    first, forward, steps = report.first_canvas_ms, report.forward_ms, report.steps_per_canvas
    rates = ", ".join(f"{rate / 1e12:.2f} T {math}" for math, rate in device.rates.items())
    solved = "" if report.solved is None else f", {report.solved} of them solved"
    ends = f"{report.answered} answered{solved}" + "".join(
        f", {count} {what}" for what, count in (("failed", report.failed), ("refused", report.refused)) if count
    )
    memory = (
        f"{_mib(report.peak_bytes)} above {_mib(report.weight_bytes)} of weights: {_mib(report.page_bytes)} in pages, "
        f"{_mib(report.step_bytes)} a forward asks for"
    )
    lines = [
        ("machine", f"{device.name}: {rates} operations a second, {device.bandwidth / 1e9:.1f} GB/s read"),
        ("requests", f"{ends} in {report.seconds:.2f} s: {report.requests_per_second:.2f} a second"),
        ("prefill", f"{report.prefill_ms:.1f} ms"),
        ("forward", f"{forward.mean:.2f} ms mean, {forward.p50:.2f} p50, {forward.p95:.2f} p95; {report.forwards}"),
        ("steps", f"{steps.mean:.1f} a canvas, {steps.p50:.0f} p50, {steps.p95:.0f} p95; {report.canvases} canvases"),
        ("tokens", f"{report.tokens}, {report.tokens_per_forward:.1f} a forward"),
        ("speed", f"{report.tokens_per_second_user:.1f} tokens/s a user, {report.tokens_per_second:.1f} in total"),
        ("first canvas", f"after {first.p50:.0f} ms p50, {first.p95:.0f} p95"),
        ("memory", memory),
        ("of floors", f"{report.byte_share:.1%} bytes, {report.arithmetic_share:.1%} arithmetic, "
                      f"{report.floor_share:.1%} part by part"),
    ]  # fmt: skip
    shown = [(name, text) for name, text in lines if name != "steps" or report.steps]
    return [f"{name:13}{text}" for name, text in [*shown, *(("error", text) for text in report.errors)]]


def _shares(subject: Subject, run: BenchRun, device: costs.Device, soft: bool) -> tuple[float, float, float]:
    """The roofline time of all forwards over their time: by bytes, by operations, part by part."""
    stored = stored_formats(subject.network)
    seconds = sum(forward.seconds for forward in run.forwards)
    totals = [0.0, 0.0, 0.0]
    for forward in run.forwards:
        parts = costs.forward_cost(subject.config, stored, forward.rows, soft=soft)
        for index, floor in enumerate((costs.byte_seconds, costs.arithmetic_seconds, costs.floor_seconds)):
            totals[index] += floor(parts, device)
    return tuple(total / seconds if seconds else 0.0 for total in totals)  # type: ignore[return-value]


def _step_bytes(subject: Subject, rows: costs.BatchShape) -> int:
    """Peak allocation of a forward of the engine; every canvas and every read as if after the longest context."""
    contexts = [*rows.canvases, *(context for context, _ in (*rows.prefills, *rows.logit_rows))]
    tokens = sum(count for _, count in (*rows.prefills, *rows.logit_rows))
    dtype = str(subject.network.dtype).removeprefix("torch.")
    tiles = subject.network.device.type == "cpu" and bridge.has_tiles()
    return costs.engine_peak(subject.config, dtype, max(contexts, default=0), len(rows.canvases), tokens, tiles=tiles)


def _solved(subject: Subject, work: Workload, ended: Sequence[RequestTrace]) -> int | None:
    """How many of the answers are the solution of their puzzle."""
    if not work.puzzles or subject.lm is None:
        return None
    solutions = [sudoku.layout(puzzle_of(work, trace.request.row.index).solution) for trace in ended]
    answers = [subject.lm.decode(trace.reply.tokens) for trace in ended if trace.reply is not None]
    return sum(solution == answer for solution, answer in zip(solutions, answers, strict=True))


def _speed(trace: RequestTrace) -> float:
    assert trace.reply is not None and trace.ended is not None
    took = trace.ended - trace.arrived
    return trace.reply.usage.completion_tokens / took if took > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
