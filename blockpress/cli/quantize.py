"""`blockpress quantize`: a checkpoint in fewer bits, and its loss of fidelity.

Invariant: the checkpoint is complete before anything is measured on it; where no report can be made, a note says why
and the checkpoint stays.

Run it:  blockpress quantize sudoku-nano ./smaller --format int4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.progress import bar
from blockpress.cli.terminal import note, waiting
from blockpress.cli.units import format_bytes
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.checkpoints import Checkpoint
    from blockpress.evals.divergence import Recording
    from blockpress.lm import LM
    from blockpress.quantize.convert import Converted
    from blockpress.sudoku import Puzzle

RANDOM_LENGTH = 32
GIVENS = (30, 40)
SAMPLES = 8

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model, or a checkpoint's directory.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; a checkpoint in it is replaced.")]
Form = Annotated[str, typer.Option("--format", metavar="F", help="fp8, int8, nvfp4 or int4.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Linear layers to keep as they are, e.g. '*.self_attn.*'. Repeatable."),
]
Experts = Annotated[bool, typer.Option("--experts-only", help="Make the experts smaller and nothing else.")]
Group = Annotated[int | None, typer.Option(metavar="G", help="Columns under one scale, for int4: 32 by default.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Compare what both models write.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompts of the report, one a line. Default: random token ids.")
]
Samples = Annotated[
    int | None, typer.Option(metavar="N", help=f"Prompts of the report, where there is no FILE: {SAMPLES} by default.")
]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Of the report's prompts and noise: 0 by default.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Where the report is made: cpu (by default), cuda or cuda:N.")
]


def quantize(
    model: Model,
    out: Out,
    form: Form,
    keep: Keep = None,
    experts_only: Experts = False,
    group: Group = None,
    report: Report = True,
    prompts: Prompts = None,
    samples: Samples = None,
    seed: Seed = None,
    device: Device = None,
    json: options.Json = False,
    yes: options.Yes = False,
) -> None:
    """Write a model with its linear layers in fewer bits.

    The new checkpoint is in the layout of compressed-tensors, in which the published quantised ones are. Embedding,
    router, norms and vision stay as they are. However large the model, less than 1 GB of memory suffices; the report on
    what both models write needs each of them in memory in turn, and is left out where there is no room, or no canvas.

    Errors of the weights and the report stand in OUT/quantization.json.

    \b
    Examples:
      blockpress quantize sudoku-nano ./smaller --format int4
      blockpress quantize ./diffusiongemma ./smaller --format nvfp4 --experts-only
      blockpress quantize ./diffusiongemma ./smaller --format fp8 --prompts questions.txt
    """
    from blockpress.checkpoints import Checkpoint, find_checkpoint
    from blockpress.quantize.convert import add_to_report, convert_checkpoint
    from blockpress.quantize.encoders import format_named

    given = {"--prompts": prompts, "--samples": samples, "--seed": seed, "--device": device}
    _check_given(report, given)
    samples, seed, device = SAMPLES if samples is None else samples, seed or 0, device or "cpu"
    chosen = format_named(form, group)
    original = opened_or_pulled(lambda: find_checkpoint(model), model, yes)
    lines = None if prompts is None else _lines(prompts, original)
    if report:
        options.check_device(device)
    with bar(f"writing {model} in {form}") as progress:
        converted = convert_checkpoint(
            original, out, chosen, keep=keep or (), experts_only=experts_only, progress=progress
        )
    if not json:
        print("\n".join(_table(model, out, converted)))
    fidelity = _measure(original, Checkpoint(path=out), lines, samples, seed, device) if report else None
    if fidelity is not None:
        add_to_report(out, "report", fidelity)
    if json:
        options.print_json({"model": model, "path": str(out), **_short(converted), "report": fidelity})
    elif fidelity is not None:
        print("\n".join(_sentences(fidelity)))


def _check_given(report: bool, given: dict[str, Any]) -> None:
    """Raises RequestError: options of a report that is not made, or that exclude each other."""
    options.positive(given["--samples"], "--samples")
    if not report:
        options.refuse("--no-report", given)
    if given["--prompts"] is not None:
        options.refuse("--prompts", {"--samples": given["--samples"]})


def _measure(
    original: Checkpoint, smaller: Checkpoint, lines: list[str] | None, samples: int, seed: int, device: str
) -> dict[str, Any] | None:
    """Run the original, then the smaller model, on the same prompts; None without a canvas, or without the memory."""
    from blockpress.evals.divergence import compare_recordings

    reason = _no_canvas(original) or _too_large((original, smaller), device)
    if reason is not None:
        note(f"blockpress: no report: {reason}")
        return None
    recordings, solved, puzzles = [], [], None
    for name, checkpoint in (("original", original), ("smaller model", smaller)):
        with waiting(f"running the {name}"):
            recording, puzzles, count = _run(checkpoint, lines, samples, seed, device)
        recordings.append(recording)
        solved.append(count)
    kind = "given" if lines else "puzzles" if puzzles else "random token ids"
    fidelity = {"prompt_kind": kind, **asdict(compare_recordings(*recordings))}
    return fidelity | ({"solved_original": solved[0], "solved_changed": solved[1]} if puzzles else {})


def _run(
    checkpoint: Checkpoint, lines: list[str] | None, samples: int, seed: int, device: str
) -> tuple[Recording, list[Puzzle] | None, int]:
    """Load a model, run it, and release it: both are never in memory at once."""
    from blockpress.evals.divergence import record
    from blockpress.lm import load

    lm = load(checkpoint, device=device)
    puzzles = _puzzles(lm, samples, seed) if lines is None else None
    recording = record(lm, _ids(lm, lines, puzzles, samples, seed), seed)
    if puzzles is None:
        return recording, None, 0
    from blockpress.sudoku import layout

    answers = [lm.decode(answer) for answer in recording.answers]
    return recording, puzzles, sum(a == layout(p.solution) for a, p in zip(answers, puzzles, strict=True))


def _ids(
    lm: LM, lines: list[str] | None, puzzles: list[Puzzle] | None, samples: int, seed: int
) -> Sequence[Sequence[int]]:
    from blockpress.sudoku import layout

    if lines is not None:
        return [lm.encode(line) for line in lines]
    if puzzles is not None:
        return [lm.encode(layout(puzzle.puzzle)) for puzzle in puzzles]
    import torch

    generator = torch.Generator().manual_seed(seed)
    length = min(RANDOM_LENGTH, lm.config.context_length - lm.config.canvas_length)
    return torch.randint(0, lm.config.vocab_size, (samples, length), generator=generator).tolist()


def _puzzles(lm: LM, samples: int, seed: int) -> list[Puzzle] | None:
    """Puzzles for a model with the digits tokenizer and a canvas that fits a grid; None for any other."""
    from blockpress import sudoku
    from blockpress.errors import TextError

    if lm.tokenizer is None or lm.config.vocab_size != 16:
        return None
    try:
        fits = len(lm.encode(sudoku.layout("0" * 81))) <= lm.config.canvas_length
    except TextError:
        return None
    return sudoku.held_out(seed, samples, GIVENS) if fits else None


def _no_canvas(checkpoint: Checkpoint) -> str | None:
    """Why a model is not compared; None if it is."""
    config = checkpoint.checked().config
    return None if config.has_canvas else f"only models with a canvas are compared, and {config.family} has none"


def _too_large(checkpoints: Sequence[Checkpoint], device: str) -> str | None:
    from blockpress.hardware import compute_name, free_memory
    from blockpress.plan.memory import needed, survey

    free = free_memory().get("cuda:0" if device == "cuda" else device)
    for checkpoint in checkpoints:
        config = checkpoint.config
        compute = compute_name(config.dtype, device)
        need = needed(config, config.canvas_length, compute_dtype=compute, files=survey(checkpoint)).total
        if free is not None and need > free:
            return (
                f"{checkpoint.path} takes {format_bytes(need)} of memory, and {format_bytes(free)} are free on {device}"
            )
    return None


def _lines(file: Path, model: Checkpoint) -> list[str]:
    """The prompts of a file. Raises RequestError: it has none, or the model is not compared or has no tokenizer."""
    reason = _no_canvas(model)
    if reason is not None:
        raise RequestError(f"--prompts is given, and {reason}", hint="leave out --prompts")
    if not model.is_gguf and not model.has_tokenizer:
        raise RequestError(
            f"--prompts is given, and {model.path} has no tokenizer.json",
            hint="leave it out: random token ids are taken",
        )
    try:
        prompts = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--prompts {file} cannot be read: {error}", hint="give a text file, a prompt a line"
        ) from error
    if not prompts:
        raise RequestError(f"--prompts {file} holds no prompt", hint="write one a line")
    return prompts


def _short(converted: Converted) -> dict[str, Any]:
    """The conversion without its long lists, which are in OUT/quantization.json."""
    fields = ("format", "bytes_before", "bytes_after", "notes")
    kinds = {kind: asdict(error) for kind, error in converted.kinds.items()}
    return {name: getattr(converted, name) for name in fields} | {"kinds": kinds}


def _table(model: str, out: Path, converted: Converted) -> list[str]:
    share = converted.bytes_after / converted.bytes_before
    sizes = f"{format_bytes(converted.bytes_before)} -> {format_bytes(converted.bytes_after)} ({share:.1%})"
    rows = [f"{model} in {converted.format}: {sizes}, in {out}"]
    rows += ["", f"{'linear layers':20}{'weights':>16}{'rel. error':>12}{'cosine':>10}{'largest':>11}"]
    for kind, error in converted.kinds.items():
        rows.append(f"{kind:20}{error.values:16,}{error.relative:12.3%}{error.cosine:10.6f}{error.largest:11.3g}")
    rows += ["", "the largest relative errors"]
    rows += [f"  {tensor.error.relative:8.3%}  {tensor.name}" for tensor in converted.worst()]
    return rows + [f"note: {text}" for text in converted.notes]


def _sentences(report: dict[str, Any]) -> list[str]:
    prompts = f"{report['prompts']} prompts ({report['prompt_kind']})"
    rows = ["", f"{prompts}, {report['positions']} positions, seed {report['seed']}"]
    for name, step in (("step 1", report["first"]), ("step 2", report["second"])):
        rows.append(
            f"{name}: KL {step['kl']:.5f} nats (largest {step['kl_largest']:.4f}), same argmax {step['agreement']:.1%}"
            f", entropy {step['entropy_original']:.4f} -> {step['entropy_changed']:.4f} nats"
        )
    rows.append(
        f"by itself: {report['steps_original']:.2f} -> {report['steps_changed']:.2f} steps to settle, "
        f"{report['tokens_same']:.1%} of the tokens the same"
    )
    if "solved_original" in report:
        rows.append(f"puzzles solved: {report['solved_original']} -> {report['solved_changed']} of {report['prompts']}")
    return rows
