"""Two programs on the same weights in the same process, in turns (A B A B), so that a busy machine slows both.

    transformers   its own DiffusionGemma: the same checkpoint (saved and loaded), prompts and number of steps; in the
                   dtype of the weights, or in another, to which their values are widened or rounded
    reference      `generate`, the reference loop, on the same network

Both write whole canvases with a fixed number of steps. The forwards that `transformers` ran are counted and compared
with the number requested.

Invariant: the order is the same in all rounds; one round of each runs first, unmeasured.
Run it:  blockpress bench --preset bench-4k --steps 4 --against transformers
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from blockpress.bench.drive import drive
from blockpress.bench.steppers import EngineStepper, ReferenceStepper
from blockpress.bench.subject import Subject
from blockpress.bench.workload import Workload, requests, sampling_of
from blockpress.checkpoints import minimal_vision, save_checkpoint
from blockpress.checkpoints.build import DTYPES
from blockpress.config import GenerationConfig, Sampling
from blockpress.engine.options import SoftEmbedding
from blockpress.errors import RequestError

RIVALS = ("transformers", "reference")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of every round of both. steps: denoising steps in a round, each over all rows."""

    rival: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    steps: int

    @property
    def ratio(self) -> float:
        """How many times as long the rival takes, by the shortest rounds."""
        return min(self.theirs) / min(self.ours)

    def to_dict(self) -> dict[str, Any]:
        """The figures; milliseconds a step include the step's share of prefill and commits."""
        figures: dict[str, Any] = {"against": self.rival, "steps": self.steps, "ratio": self.ratio}
        figures["ratio_of_medians"] = median(self.theirs) / median(self.ours)
        for name, seconds in (("ours", self.ours), ("theirs", self.theirs)):
            figures[f"{name}_seconds"] = list(seconds)
            figures[f"{name}_step_ms"] = {
                "min": 1000 * min(seconds) / self.steps,
                "median": 1000 * median(seconds) / self.steps,
            }
        return figures

    def lines(self) -> list[str]:
        """The same as text."""
        figures = self.to_dict()
        times = [
            f"{name:13}{figures[key]['min']:.1f} ms a step at least, {figures[key]['median']:.1f} median"
            for name, key in (("blockpress", "ours_step_ms"), (self.rival.split()[0], "theirs_step_ms"))
        ]
        return [
            *times,
            f"{'ratio':13}{self.ratio:.2f} by the shortest of {len(self.ours)} rounds, "
            f"{figures['ratio_of_medians']:.2f} by the medians; {self.rival}",
        ]


def check_comparable(work: Workload, rival: str, dtype: str | None = None) -> None:
    """Raises RequestError: no such rival, or a workload or dtype that it cannot run."""
    if rival not in RIVALS:
        raise RequestError(f"--against is {rival!r}", hint=f"--against takes {' or '.join(RIVALS)}")
    if dtype is not None and rival == "reference":
        raise RequestError("--against-dtype is given with --against reference", hint="it runs the very same network")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"--against-dtype is {dtype!r}", hint=f"--against-dtype takes {', '.join(DTYPES)}")
    if work.online:
        raise RequestError("--against is given with --rate or --concurrency", hint="compare offline: give --batch")
    if work.mode != "diffusion" or work.steps is None:
        raise RequestError(
            f"--against is given with --mode {work.mode} and --steps {work.steps}",
            hint="both must run the same steps: give --mode diffusion and --steps N",
        )


def compare_with(
    subject: Subject,
    work: Workload,
    rival: str,
    *,
    rounds: int = 3,
    dtype: str | None = None,
    soft_embedding: SoftEmbedding = "exact",
) -> Comparison:
    """Run the workload's first batch with both programs, in turns.

    Args:
        dtype: in which `transformers` runs; None: that of the weights.

    Raises:
        RequestError: `check_comparable` refuses, the weights are packed, or `transformers` is not installed.
    """
    check_comparable(work, rival, dtype)
    work = replace(work, requests=work.batch, puzzles=False)
    canvases = -(-work.max_tokens // subject.config.canvas_length)
    steps = canvases * (work.steps or 0)

    def ours() -> None:
        stepper = EngineStepper(subject.network, running=work.batch, soft_embedding=soft_embedding)
        drive(stepper, work, requests(subject, work), subject.network.device).whole()

    def reference() -> None:
        drive(ReferenceStepper(subject.network), work, requests(subject, work), subject.network.device).whole()

    if rival == "reference":
        return _rounds("reference", ours, reference, rounds, steps)
    with _transformers(subject, work, canvases, dtype or subject.types["dtype"]) as (name, theirs):
        return _rounds(name, ours, theirs, rounds, steps)


def _rounds(rival: str, ours: Callable[[], None], theirs: Callable[[], None], count: int, steps: int) -> Comparison:
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(count + 1):
        for action, seconds in zip((ours, theirs), times, strict=True):
            started = time.perf_counter()
            action()
            if number:
                seconds.append(time.perf_counter() - started)
    return Comparison(rival=rival, ours=tuple(times[0]), theirs=tuple(times[1]), steps=steps)


@contextmanager
def _transformers(
    subject: Subject, work: Workload, canvases: int, dtype: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Its name, version and dtype, and a function that runs the workload on it."""
    try:
        import transformers
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )
    except ImportError as error:
        raise RequestError(
            f"--against transformers needs a transformers that has DiffusionGemma: {error}",
            hint="pip install 'transformers==5.23.0'",
        ) from error
    sampling = sampling_of(subject, work)
    assert isinstance(sampling, Sampling)
    settings = DiffusionGemmaGenerationConfig(
        max_new_tokens=canvases * subject.config.canvas_length,
        max_denoising_steps=sampling.steps,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=sampling.entropy_bound),
        t_min=sampling.t_min,
        t_max=sampling.t_max,
        stability_threshold=sampling.stability,
        confidence_threshold=1e-30,  # it takes no 0
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="dynamic",
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    network = subject.network
    prompts = torch.tensor([request.row.prompt for request in requests(subject, work)], device=network.device)
    with tempfile.TemporaryDirectory() as folder:
        _save(subject, Path(folder))
        theirs: Any = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=DTYPES[dtype])
    theirs.to(network.device).eval().requires_grad_(False)
    forwards: list[Tensor] = []
    theirs.model.decoder.register_forward_hook(lambda *given: forwards.append(torch.empty(0)))

    def run() -> None:
        forwards.clear()
        with torch.inference_mode():
            theirs.generate(input_ids=prompts, generation_config=settings)
        if len(forwards) != canvases * sampling.steps:
            raise RequestError(
                f"transformers ran {len(forwards)} steps, not {canvases * sampling.steps}",
                hint="its version may be another one: pip install 'transformers==5.23.0'",
            )

    yield f"transformers {transformers.__version__} in {dtype}", run


def _save(subject: Subject, folder: Path) -> None:
    """The network as a checkpoint, with the smallest vision tower: without one `transformers` makes a large one."""
    network, config = subject.network, subject.config
    generation = GenerationConfig() if subject.lm is None else subject.lm.generation
    if config.vision is not None and subject.lm is not None:
        save_checkpoint(folder, network, generation=generation, kept_from=subject.lm.path)
        return
    vision, tensors = minimal_vision(0, config.hidden_size)
    save_checkpoint(folder, network, generation=generation, kept=tensors, config=replace(config, vision=vision))
