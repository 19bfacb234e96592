"""The network to measure: a model, or a shape with random weights, from the options of `blockpress bench`.

Invariant: exactly one network is named, and the device is checked before its weights are made.

Run it:  blockpress bench --preset tiny
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.terminal import waiting
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.bench.subject import Subject


@dataclass(frozen=True)
class SubjectOptions:
    """The options of `blockpress bench` that describe the network."""

    model: str | None
    preset: str | None
    config: Path | None
    seed: int
    dtype: str | None
    compute_dtype: str | None
    threads: int | None

    @property
    def given(self) -> list[str]:
        """The options that name a network."""
        named = {"MODEL": self.model, "--preset": self.preset, "--config": self.config}
        return [name for name, value in named.items() if value is not None]

    @property
    def named(self) -> list[str]:
        """All options that mean nothing if no network is run."""
        rest = {"--dtype": self.dtype, "--compute-dtype": self.compute_dtype, "--threads": self.threads}
        return [*self.given, *(name for name, value in rest.items() if value is not None)]


def open_subject(chosen: SubjectOptions, device: str, yes: bool = False) -> Subject:
    """The one network that is named; `yes` pulls one of the hub. Raises RequestError: none, or two."""
    given = chosen.given
    if len(given) != 1:
        text = f"{given[1]} is given with {given[0]}" if given else "no model is given"
        raise RequestError(text, hint="give one of MODEL, --preset NAME and --config FILE")
    options.check_device(device)
    import torch

    from blockpress.bench import subject

    options.positive(chosen.threads, "--threads")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    types = {"dtype": chosen.dtype, "compute_dtype": chosen.compute_dtype}
    if (model := chosen.model) is not None:

        def load() -> Subject:
            with waiting(f"loading {model}"):
                return subject.loaded(model, **types, device=device)

        return opened_or_pulled(load, model, yes)
    shape = subject.shape_in(chosen.config) if chosen.config is not None else subject.shape_named(chosen.preset or "")
    name = str(chosen.preset or chosen.config)
    with waiting("drawing random weights"):
        return subject.randomised(name, shape, **types, device=device, seed=chosen.seed)
