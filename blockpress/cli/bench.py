"""`blockpress bench`: how fast a model is on this machine, against its roofline and other programs.

Invariant: random weights are labelled as random, and every figure was measured in this process.

Run it:  blockpress bench --preset bench-4k --batch 4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from blockpress.cli import options
from blockpress.cli.subject import SubjectOptions, open_subject
from blockpress.cli.sweep import CARDS, FORMATS, counts
from blockpress.cli.sweep import sweep as draw_sweep
from blockpress.cli.terminal import waiting
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.bench.subject import Subject
    from blockpress.bench.workload import Workload
    from blockpress.costs import Device

ROUNDS = 3

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A model with its own weights; or give --preset or --config.")
]
Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A shape with random weights, such as bench-4k, bench-262k or bench-wide."),
]
Config = Annotated[Path | None, typer.Option(metavar="FILE", help="The shape of a config.json, with random weights.")]
Batch = Annotated[int | None, typer.Option(metavar="N", help="Requests that run at once. Default: 1.")]
PromptLen = Annotated[int | None, typer.Option(metavar="N", help="Tokens of a prompt, random ones. Default: 64.")]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Most tokens of an answer. Default: two canvases, one of a sudoku.")
]
Mode = Annotated[
    str | None, typer.Option(metavar="M", help="diffusion, autoregressive or verified. Default: diffusion.")
]
Steps = Annotated[
    str, typer.Option(metavar="N", help="Denoising steps of every canvas, or `adaptive`: until it settles.")
]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="P", help="random or sudoku. Default: sudoku where the model writes cells as tokens."),
]
Requests = Annotated[
    int | None, typer.Option(metavar="N", help="Requests in all. Default: one batch; online 16, or 4 a user.")
]
Rate = Annotated[float | None, typer.Option(metavar="R", help="Online: requests that arrive a second, at random.")]
Concurrency = Annotated[
    int | None, typer.Option(metavar="N", help="Online: users, each of whom asks again once answered.")
]
Seconds = Annotated[float | None, typer.Option(metavar="S", help="Online: no request arrives later than this.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Of weights, prompts, noise and arrivals.")]
Soft = Annotated[str | None, typer.Option("--soft-embedding", metavar="E", help="exact or sparse. Default: exact.")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Threads of torch. Default: torch's choice.")]
Against = Annotated[
    str | None,
    typer.Option(metavar="P", help="transformers, or reference (the reference loop), in turns with the engine."),
]
AgainstDtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="That transformers runs in, on the same values. Default: that of the weights."),
]
Rounds = Annotated[int | None, typer.Option(metavar="N", help="Rounds of --against. Default: 3.")]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Throughput against users, diffusion and token by token, drawn to --out.")
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="The SVG of --sweep, which needs the extra bench.")]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; --sweep also draws h100, h200 and rtx5090, by the roofline, and takes several.",
    ),
]
Form = Annotated[str | None, typer.Option("--format", metavar="F", help=f"Of the roofline: {', '.join(FORMATS)}.")]
Users = Annotated[str | None, typer.Option(metavar="LIST", help="Of --sweep. Default: 1,2,4,...,64, of cards to 256.")]


def bench(
    model: Model = None,
    preset: Preset = None,
    config: Config = None,
    batch: Batch = None,
    prompt_len: PromptLen = None,
    max_tokens: MaxTokens = None,
    mode: Mode = None,
    steps: Steps = "adaptive",
    prompts: Prompts = None,
    requests: Requests = None,
    rate: Rate = None,
    concurrency: Concurrency = None,
    seconds: Seconds = None,
    soft_embedding: Soft = None,
    against: Against = None,
    against_dtype: AgainstDtype = None,
    rounds: Rounds = None,
    sweep: Sweep = False,
    out: Out = None,
    users: Users = None,
    form: Form = None,
    seed: Seed = 0,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: Devices = None,
    threads: Threads = None,
    json: options.Json = False,
    yes: options.Yes = False,
) -> None:
    """Measure speed and memory.

    Offline a batch is answered, online requests arrive while others run. Floors are what this machine's memory and
    arithmetic, measured at the start, would need for the same forwards.

    \b
    Examples:
      blockpress bench sudoku-nano --batch 32
      blockpress bench --preset bench-262k --steps 8 --soft-embedding sparse
      blockpress bench --preset bench-4k --rate 2 --seconds 30
      blockpress bench --preset bench-4k --steps 4 --against transformers
      blockpress bench --preset bench-wide --sweep --device cpu --device h200 --out sweep.svg
    """
    shape = SubjectOptions(model, preset, config, seed, dtype, compute_dtype, threads)
    fixed, devices = _steps(steps), device or ["cpu"]
    chosen = _not_none(
        prompt_len=prompt_len, max_tokens=max_tokens, mode=mode, batch=batch, requests=requests, rate=rate,
        concurrency=concurrency, seconds=seconds,
    )  # fmt: skip
    rival = {"--against": against, "--against-dtype": against_dtype, "--rounds": rounds}
    if sweep:
        others = rival | {"--prompts": prompts, "--soft-embedding": soft_embedding}
        options.refuse("--sweep", {f"--{name.replace('_', '-')}": value for name, value in chosen.items()} | others)
        draw_sweep(shape, devices, counts(users), fixed, one_of("--format", form or "fp8", FORMATS), out, json)
        return
    _without_sweep({"--out": out, "--users": users, "--format": form})
    soft = cast(Literal["exact", "sparse"], one_of("--soft-embedding", soft_embedding or "exact", ("exact", "sparse")))
    work = _workload(chosen, fixed, seed, rival, prompts)
    subject = open_subject(shape, _only_device(devices), yes)
    if against is not None:
        _compare(subject, _fitted(subject, work, "random", chosen), rival, soft, json)
    else:
        _measure(subject, _fitted(subject, work, prompts, chosen), soft, json)


def _not_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _only_device(devices: list[str]) -> str:
    if len(devices) != 1 or devices[0] in CARDS:
        raise RequestError(f"--device is {', '.join(devices)}", hint="give one device of this machine; see --sweep")
    return devices[0]


def _without_sweep(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise RequestError(f"{name} is given without --sweep", hint=f"leave out {name}, or give --sweep")


def _workload(
    chosen: dict[str, Any], steps: int | None, seed: int, rival: Mapping[str, Any], prompts: str | None
) -> Workload:
    from blockpress.bench.workload import Workload

    work = Workload(**chosen, steps=steps, seed=seed)
    if work.online:
        options.refuse("--rate or --concurrency", {"--batch": chosen.get("batch")})
    _check_rival(work, rival, prompts, chosen.get("requests"))
    return work


def _check_rival(work: Workload, rival: Mapping[str, Any], prompts: str | None, requests: int | None) -> None:
    """Raises RequestError: an option that means nothing with --against, or without it."""
    if rival["--against"] is None:
        for name, value in rival.items():
            if value is not None:
                raise RequestError(f"{name} is given without --against", hint=f"leave out {name}, or give --against")
        return
    from blockpress.bench.against import check_comparable

    options.positive(rival["--rounds"], "--rounds")
    options.refuse("--against", {"--prompts": prompts, "--requests": requests})
    check_comparable(work, rival["--against"], rival["--against-dtype"])


def _measure(subject: Subject, work: Workload, soft: Literal["exact", "sparse"], json: bool) -> None:
    from blockpress.bench.measure import run_bench
    from blockpress.bench.report import report_lines

    with waiting(f"measuring {subject.name}"):
        report, machine = run_bench(subject, work, soft_embedding=soft)
    if json:
        options.print_json(_about(subject, work) | {"soft_embedding": soft} | asdict(report) | _machine(machine))
    else:
        print("\n".join([_title(subject, work), *report_lines(report, machine)]))


def _compare(
    subject: Subject, work: Workload, rival: Mapping[str, Any], soft: Literal["exact", "sparse"], json: bool
) -> None:
    from blockpress.bench.against import compare_with

    name, rounds, dtype = rival["--against"], rival["--rounds"] or ROUNDS, rival["--against-dtype"]
    with waiting(f"taking turns with {name}"):
        comparison = compare_with(subject, work, name, rounds=rounds, dtype=dtype, soft_embedding=soft)
    if json:
        options.print_json(_about(subject, work) | {"soft_embedding": soft} | comparison.to_dict())
    else:
        print("\n".join([_title(subject, work), *comparison.lines()]))


def _fitted(subject: Subject, work: Workload, prompts: str | None, chosen: dict[str, Any]) -> Workload:
    """The workload with the defaults that depend on the model: kind of prompts, and length of an answer."""
    from blockpress.cli.canvas import one_token_a_cell

    takes_puzzles = subject.lm is not None and one_token_a_cell(subject.lm)
    default = "sudoku" if takes_puzzles and "prompt_len" not in chosen else "random"
    max_tokens = chosen.get("max_tokens")
    if one_of("--prompts", prompts or default, ("random", "sudoku")) == "sudoku":
        options.refuse("--prompts sudoku", {"--prompt-len": chosen.get("prompt_len")})
        if not takes_puzzles:
            text = f"--prompts is sudoku, and {subject.name} does not write a sudoku's cells as tokens"
            raise RequestError(text, hint="give --prompts random")
        return replace(work, puzzles=True, max_tokens=max_tokens or subject.config.canvas_length)
    length = subject.config.canvas_length if subject.config.has_canvas else 64
    room = subject.config.context_length - work.prompt_len
    return replace(work, max_tokens=max_tokens or max(1, min(2 * length, room)))


def _about(subject: Subject, work: Workload) -> dict[str, Any]:
    about = {"model": subject.name, "random_weights": subject.random, **subject.types}
    left_out = {"prompt_len"} if work.puzzles else set[str]()  # puzzles have their own length
    workload = {name: value for name, value in asdict(work).items() if value is not None and name not in left_out}
    return about | {"workload": workload}


def _title(subject: Subject, work: Workload) -> str:
    weights = "random weights, which write noise" if subject.random else "its own weights"
    prompts = "puzzles" if work.puzzles else f"prompts of {work.prompt_len} random tokens"
    steps = "" if work.mode == "autoregressive" else f", {work.steps or 'adaptive'} steps"
    return f"{subject.name} in {subject.in_types}, {weights}; {prompts}, {work.max_tokens} tokens, {work.mode}{steps}"


def _machine(device: Device) -> dict[str, Any]:
    return {"machine": {"name": device.name, "bytes_per_second": device.bandwidth, "flops": dict(device.rates)}}


def _steps(text: str) -> int | None:
    if text == "adaptive":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--steps is {text}", hint="--steps takes a whole number of at least 1, or adaptive")
    return int(text)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise RequestError(f"{option} is {value!r}", hint=f"{option} takes {', '.join(allowed)}")
    return value
