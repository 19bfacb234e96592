"""What several commands take and do alike: their options, and opening a model.

Invariant: all that can be checked without the weights is checked before they are read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.config import Sampling
    from blockpress.lm import LM

SHIPPED = "sudoku-nano"

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Fast = Annotated[bool, typer.Option("--fast", help="Show the canvas at full speed, without a pause a step.")]
Device = Annotated[str, typer.Option(help="Where the network runs: cpu, cuda or cuda:N.", metavar="DEVICE")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Of the weights in memory: float32, bfloat16 or float16. Default: the model's."),
]
Steps = Annotated[
    int | None, typer.Option(help="Most denoising steps a canvas. Default: the model's own, usually 48.", metavar="N")
]


def positive(value: int | None, option: str) -> None:
    """Raises RequestError: a count below 1."""
    if value is not None and value < 1:
        raise RequestError(f"{option} is {value}", hint=f"{option} takes a whole number of at least 1")


def refuse(option: str, others: dict[str, Any]) -> None:
    """Raises RequestError: one of the `others` is given (not None), and means nothing beside `option`."""
    for name, value in others.items():
        if value is not None:
            raise RequestError(f"{name} is given with {option}", hint=f"leave out {name} or {option}")


def open_model(
    name: str, changes: dict[str, Any], *, dtype: str | None = None, device: str = "cpu"
) -> tuple[LM, Sampling]:
    """The model of that name, and its own sampling with the `changes` that are not None.

    Raises:
        BlockpressError: the model, its files, a sampling field, the type or the device.
    """
    from blockpress.lm import load
    from blockpress.weights import load_config, load_generation, resolve

    path = resolve(name)
    generation = load_generation(path, load_config(path))
    sampling = generation.sampling.with_(**{field: value for field, value in changes.items() if value is not None})
    return load(path, dtype=dtype, device=device), sampling


def check_device(device: str) -> None:
    """Raises RequestError: no such device on this machine."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise RequestError(
            f"--device is {device!r}, which this machine does not offer", hint=f"it has {', '.join(found)}"
        ) from error


def print_json(value: dict[str, Any]) -> None:
    """One object on one line, shown at once even in a pipe."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)
