"""`blockpress synthesize`: a checkpoint of random weights in a real shape, to measure speed and memory with.

Invariant: config.json and README.md of the checkpoint say that it is random.

Run it:  blockpress synthesize tiny ./random --format nvfp4
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpress.cli import options
from blockpress.cli.progress import bar
from blockpress.cli.units import format_bytes
from blockpress.errors import RequestError

PLAIN = "bf16"

Preset = Annotated[str, typer.Argument(metavar="PRESET", help="A shape, such as diffusiongemma-26B-A4B or tiny.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; a checkpoint in it is replaced.")]
Form = Annotated[str, typer.Option("--format", metavar="F", help="bf16, fp8, int8, nvfp4 or int4.")]
Seed = Annotated[int, typer.Option(metavar="S", help="The same seed gives the same weights.")]
Layers = Annotated[int | None, typer.Option(metavar="N", help="Only the first N layers. Default: all.")]


def synthesize(
    preset: Preset,
    out: Out,
    form: Form = PLAIN,
    seed: Seed = 0,
    layers: Layers = None,
    json: options.Json = False,
) -> None:
    """Write a checkpoint of random weights in the shape of a preset.

    It loads and runs like a real one of its format, in as much memory and time, and writes noise. There is no vision
    tower and no tokenizer: prompts are token ids.

    \b
    Examples:
      blockpress synthesize tiny ./random
      blockpress synthesize diffusiongemma-26B-A4B ./random --format nvfp4
      blockpress synthesize diffusiongemma-26B-A4B ./random --format fp8 --layers 6
    """
    from blockpress.quantize.encoders import FORMATS, format_named
    from blockpress.quantize.synthetic import synthesize as write

    if form != PLAIN and form not in FORMATS:
        raise RequestError(f"--format is {form!r}", hint=f"--format takes {', '.join((PLAIN, *FORMATS))}")
    chosen = None if form == PLAIN else format_named(form)
    with bar(f"writing {preset} in {form}") as progress:
        written = write(preset, out, chosen, seed=seed, layers=layers, progress=progress)
    if json:
        options.print_json({"preset": preset, "format": form, "seed": seed, "path": str(out), "bytes": written})
    else:
        print(f"{out}: {preset} in {form}, {format_bytes(written)} of random weights (seed {seed})")
