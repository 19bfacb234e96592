"""The requests of a benchmark: prompts, limits, decoding modes, and arrival times.

    offline    all requests are there at the start; `batch` of them run at once
    rate       a Poisson process: the time between two arrivals is exponential, whether the model keeps up or not
    closed     `concurrency` users, each of whom sends a new request as soon as the last is answered

Prompts are random tokens, or, for a model that writes a sudoku's cells as tokens, new puzzles: only on prompts like
those it was trained on does a model settle as early as in use.

Invariant: the same workload and seed give the same prompts, seeds and arrivals.
Run it:  python -m pytest tests/bench/test_drive.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from blockpress import sudoku
from blockpress.bench.subject import Subject
from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.config.sampling import DEFAULT_MAX_VERIFICATIONS
from blockpress.decoding import SequenceState
from blockpress.engine import Request
from blockpress.errors import RequestError

Mode = Literal["diffusion", "autoregressive", "verified"]
MODES: tuple[Mode, ...] = ("diffusion", "autoregressive", "verified")
GIVENS = 36


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests and how they arrive. Lengths in tokens.

    steps: denoising steps of every canvas; None: until it settles. puzzles: prompts are sudokus, answered to the stop.
    batch: how many run at once. rate: arrivals a second. concurrency: users. seconds: no request arrives later.
    """

    mode: Mode = "diffusion"
    prompt_len: int = 64
    max_tokens: int = 256
    steps: int | None = None
    puzzles: bool = False
    requests: int | None = None
    batch: int = 1
    rate: float | None = None
    concurrency: int | None = None
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "max_tokens", "steps", "requests", "batch", "concurrency"):
            value = getattr(self, name)
            _need(value is None or value >= 1, name, value, "a whole number of at least 1")
        for name in ("rate", "seconds"):
            value = getattr(self, name)
            _need(value is None or (math.isfinite(value) and value > 0), name, value, "a number above 0")
        _need(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        _need(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")
        if self.steps is not None and self.mode == "autoregressive":
            raise RequestError("--steps is given in the mode autoregressive", hint="leave out --steps: there are none")
        if self.rate is not None and self.concurrency is not None:
            raise RequestError("--concurrency is given with --rate", hint="requests come by one of the two")
        if self.seconds is not None and not self.online:
            raise RequestError("--seconds is given without --rate", hint="give --rate or --concurrency, or --requests")

    @property
    def online(self) -> bool:
        return self.rate is not None or self.concurrency is not None

    @property
    def count(self) -> int | None:
        """How many requests there are; None: as many as arrive in `seconds`."""
        if self.requests is None and self.seconds is None:
            return 4 * (self.concurrency or 4) if self.online else self.batch
        return self.requests

    @property
    def running(self) -> int:
        """Most requests in one forward."""
        return self.concurrency or (32 if self.rate else self.batch)


def _need(ok: bool, name: str, value: object, what: str) -> None:
    if not ok:
        option = f"--{name.replace('_', '-')}"
        raise RequestError(f"{option} is {value}", hint=f"{option} takes {what}")


def sampling_of(subject: Subject, work: Workload) -> Sampling | AutoregressiveSampling:
    """The sampling of the requests: the model's own, with a fixed number of steps where one is given.

    Raises:
        RequestError: a mode with a canvas for a model that has none.
    """
    if work.mode == "autoregressive":
        return AutoregressiveSampling() if subject.lm is None else subject.lm.generation.autoregressive.with_(stop=())
    if not subject.config.has_canvas:
        raise RequestError(
            f"--mode is {work.mode}, and the family {subject.config.family} has no canvas",
            hint="give --mode autoregressive",
        )
    sampling = Sampling() if subject.lm is None else subject.lm.generation.sampling.with_(stop=())
    if work.steps is not None:
        # So that none settles: a mean entropy is below 0 only by rounding, and never after this many agreeing steps.
        sampling = sampling.with_(steps=work.steps, confidence=0.0, stability=work.steps)
    return sampling.with_(max_verifications=DEFAULT_MAX_VERIFICATIONS) if work.mode == "verified" else sampling


def requests(subject: Subject, work: Workload) -> Iterator[Request]:
    """The requests in order of arrival; an endless iterator where their number is not given.

    Raises:
        RequestError: a prompt and an answer do not fit the model's context.
    """
    config, sampling = subject.config, sampling_of(subject, work)
    canvas = config.canvas_length if isinstance(sampling, Sampling) else 1
    stops = subject.lm.generation.stop_ids if work.puzzles and subject.lm is not None else ()
    index = 0
    while work.count is None or index < work.count:
        prompt = _prompt(subject, work, index)
        room = config.context_length - len(prompt)
        if room < canvas or room < work.max_tokens:
            raise RequestError(
                f"--prompt-len is {len(prompt)} and --max-tokens {work.max_tokens}",
                hint=f"the model's context has {config.context_length} tokens: give fewer",
            )
        row = SequenceState(
            index,
            prompt,
            work.seed + index,
            stop_ids=stops,
            canvas_length=canvas,
            room=room,
            max_tokens=work.max_tokens,
        )
        yield Request(row=row, sampling=sampling)
        index += 1


def arrivals(work: Workload) -> Iterator[float]:
    """Arrival times in seconds from the start; all 0 without `rate`."""
    if work.rate is None:
        while True:
            yield 0.0
    draw, now = Random(f"blockpress.bench arrivals {work.seed}"), 0.0
    while True:
        now += draw.expovariate(work.rate)
        yield now


def puzzle_of(work: Workload, index: int) -> sudoku.Puzzle:
    """The puzzle of a request."""
    return sudoku.generate_puzzle(work.seed * 1_000_003 + index, GIVENS)


def _prompt(subject: Subject, work: Workload, index: int) -> list[int]:
    if work.puzzles:
        assert subject.lm is not None
        return subject.lm.encode(sudoku.layout(puzzle_of(work, index).puzzle))
    draw = Random(f"blockpress.bench prompt {work.seed} {index}")
    return [draw.randrange(subject.config.vocab_size) for _ in range(work.prompt_len)]
