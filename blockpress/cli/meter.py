"""The figures of a run in progress: steps, entropy, tokens per forward, milliseconds per forward.

Autoregressive decoding has no steps and no entropies, so they are left out.

Invariant: the milliseconds are the model's. The time that a viewer takes between two events (drawing, pausing,
printing) does not count, nor does that of the first event, which includes the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Committed, Denoised, Done, Event
from blockpress.diffusion import Schedule

BARS = "▁▂▃▄▅▆▇█"


class Meter:
    """Counts and times of one row from its events. Call `see` with each event and `go_on` before the next."""

    def __init__(
        self, sampling: Sampling | AutoregressiveSampling, stop_ids: Collection[int], canvas_length: int
    ) -> None:
        self.step = self.accepted = self.forwards = 0
        self.length = canvas_length
        self.entropies: list[float] = []
        self.tokens_per_forward = 0.0
        self.seconds = 0.0
        self._stop_ids = stop_ids
        self._schedule: Schedule | None = None
        if isinstance(sampling, Sampling):
            self._schedule = Schedule.of(sampling)
        self._committed = 0
        self._resumed: float | None = None

    def see(self, event: Event) -> None:
        """Count an event, and the time since `go_on`."""
        if self._resumed is not None:
            self.seconds += time.perf_counter() - self._resumed
        if isinstance(event, Denoised):
            self._denoised(event)
        elif isinstance(event, Committed):
            self._committed_canvas(event)
        elif isinstance(event, Done):
            self.forwards = event.reply.usage.forwards
            self.tokens_per_forward = event.reply.usage.tokens_per_forward

    def go_on(self) -> None:
        """Start counting the model's time again."""
        self._resumed = time.perf_counter()

    @property
    def milliseconds(self) -> float | None:
        """Mean time of a forward in milliseconds; None after fewer than two."""
        return 1000 * self.seconds / (self.forwards - 1) if self.forwards > 1 else None

    def now(self) -> list[str]:
        """The state of the run, a short phrase for each figure."""
        speed = f"{self.tokens_per_forward:.1f} tokens per forward"
        if self._schedule is None:
            return [speed]
        return [
            f"step {self.step} of at most {self._schedule.steps}",
            f"temperature {float(self._schedule.temperature(max(1, self.step))):.2f}",
            f"accepted {self.accepted} of {self.length}",
            self.entropy(),
            speed,
        ]

    def result(self) -> list[str]:
        """The same for a finished run."""
        milliseconds = [] if self.milliseconds is None else [f"{self.milliseconds:.1f} ms per forward"]
        entropy = [] if self._schedule is None else [self.entropy()]
        return [*milliseconds, f"{self.tokens_per_forward:.1f} tokens per forward", *entropy]

    def entropy(self) -> str:
        """The mean entropy of the last step, and a bar for each step of the canvas, the highest one full."""
        if not self.entropies:
            return "mean entropy not known yet"
        top = max(*self.entropies, 1e-9)
        bars = "".join(BARS[round(value / top * (len(BARS) - 1))] for value in self.entropies[-24:])
        return f"mean entropy {self.entropies[-1]:.4f} nats {bars}"

    def _denoised(self, event: Denoised) -> None:
        if event.step == 1:
            self.entropies = []
        self.step = event.step
        self.accepted = int(event.accepted.sum())
        self.entropies.append(float(event.entropy.mean()))
        # A canvas after the first costs one more forward, the commit of the one before it; a retry of an empty canvas
        # does not; where a canvas is redone or repaired, that forward is the causal pass over it.
        again = event.verifications or event.repairs
        self.forwards += 2 if event.step == 1 and (again or (event.canvas and not event.retry)) else 1
        tokens = event.argmax.tolist()
        valid = next((i + 1 for i, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        self.tokens_per_forward = (self._committed + valid) / self.forwards

    def _committed_canvas(self, event: Committed) -> None:
        self._committed += len(event.tokens)
        if self._schedule is None:
            self.forwards += 1
            self.tokens_per_forward = self._committed / self.forwards
