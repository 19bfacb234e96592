"""A benchmark, from a subject and a workload to a report: warm up, measure the machine, run, measure it again, report.

Invariant: every reported figure was measured in this process after the warm-up.
Run it:  blockpress bench --preset bench-4k --batch 4
"""

from __future__ import annotations

from dataclasses import replace

from blockpress import costs
from blockpress.bench.ceilings import best_of, measure_device
from blockpress.bench.drive import drive
from blockpress.bench.report import BenchReport, report
from blockpress.bench.steppers import EngineStepper
from blockpress.bench.subject import Subject
from blockpress.bench.workload import Workload, requests
from blockpress.engine.options import SoftEmbedding
from blockpress.hardware import taken


def run_bench(
    subject: Subject,
    work: Workload,
    *,
    device: costs.Device | None = None,
    soft_embedding: SoftEmbedding = "exact",
) -> tuple[BenchReport, costs.Device]:
    """Run the workload on the engine; returns the report, and the roofline of the machine that it ran on.

    Raises:
        RequestError: a workload that this network cannot run. BlockpressError: no request was answered.
    """
    network = subject.network
    before = taken(network.device)
    warm(subject, work, soft_embedding)
    ceilings = [measure_device(network)] if device is None else [device]
    stepper = EngineStepper(network, running=work.running, soft_embedding=soft_embedding)
    run = drive(stepper, work, requests(subject, work), network.device, before)
    if len(run.errors) == len(run.traces):
        run.whole()
    if device is None:  # again after the run: on a busy machine either moment may have been a bad one
        ceilings.append(measure_device(network))
    ceiling = best_of(ceilings)
    return report(subject, work, run, ceiling, soft=soft_embedding == "exact"), ceiling


def warm(subject: Subject, work: Workload, soft_embedding: SoftEmbedding = "exact") -> None:
    """One short batch: the first run of a process pays for allocation, compilation and page faults of the weights."""
    short = replace(
        work,
        requests=work.running,
        batch=work.running,
        rate=None,
        concurrency=None,
        seconds=None,
        steps=None if work.mode == "autoregressive" else 2,
        max_tokens=min(work.max_tokens, 4 if work.mode == "autoregressive" else subject.config.canvas_length),
    )
    stepper = EngineStepper(subject.network, running=short.batch, soft_embedding=soft_embedding)
    drive(stepper, short, requests(subject, short), subject.network.device).whole()
