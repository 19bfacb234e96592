"""What several commands share: options, and opening a model.

Invariant: everything that can be checked without the weights is checked before they are read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from blockpress.checkpoints import Checkpoint
    from blockpress.config import AutoregressiveSampling, GenerationConfig, Sampling
    from blockpress.lm import LM

SHIPPED = "sudoku-nano"

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Pull MODEL without asking, if it is not on this machine.")]
Fast = Annotated[bool, typer.Option("--fast", help="Show the canvas at full speed, without a pause a step.")]
Device = Annotated[str, typer.Option(help="Where the network runs: cpu, cuda or cuda:N.", metavar="DEVICE")]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Of the weights in memory: float32, bfloat16 or float16. Default: the model's."),
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Of the arithmetic: auto, float32, bfloat16, float16, or int8, which rounds what layers multiply. "
        "Default: auto, --dtype or what is faster here.",
    ),
]
Record = Annotated[
    str | None,
    typer.Option(metavar="FILE.svg", help="Write the canvas, step by step, to a picture that a browser plays."),
]
Steps = Annotated[
    int | None, typer.Option(help="Most denoising steps a canvas. Default: the model's own, usually 48.", metavar="N")
]


MaxRepairs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Most times that places of a settled canvas are denoised again which the causal pass finds unlikely. "
        "Default: 0.",
    ),
]
RepairBelow = Annotated[
    float | None,
    typer.Option(metavar="P", help="Below this probability in the causal pass a place is repaired. Default: 0.01."),
]
TopK = Annotated[int | None, typer.Option(metavar="N", help="Draw from the N likeliest tokens only; 0: from all.")]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Draw from the likeliest tokens only that together hold this probability."),
]
Edit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=JSON",
        help="Edit the logits: min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5, "
        'repeat_last_n=64, logit_bias={"5":-100}, suppress_tokens=[5], allowed_token_ids=[5,6]; repeatable.',
    ),
]
Regex = Annotated[
    str | None, typer.Option(metavar="R", help="The whole answer matches this regular expression (Python's syntax).")
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="A,B", help="The answer is one of these texts. Repeated: each is one text, commas and all."),
]
SchemaFile = Annotated[
    str | None, typer.Option("--schema", metavar="FILE", help="The answer is JSON that this JSON schema allows.")
]
GrammarFile = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE", help="The answer is a text of this grammar, in Lark's syntax."),
]


def constraint(regex: str | None, choice: list[str] | None, schema: str | None, grammar: str | None) -> dict[str, Any]:
    """The constraint of an answer as arguments of `LM.generate`.

    Raises:
        RequestError: more than one is given, or the file of the schema or the grammar cannot be read.
    """
    given = {"--regex": regex, "--choice": choice or None, "--schema": schema, "--grammar": grammar}
    for option, value in given.items():
        if value is not None:
            refuse(option, {name: other for name, other in given.items() if name != option})
    if schema is not None:
        try:
            return {"schema": json.loads(_text("--schema", schema, "a JSON schema"))}
        except ValueError as error:
            raise RequestError(f"--schema is {schema!r}: {error}", hint="give a file that holds JSON") from error
    if grammar is not None:
        return {"grammar": _text("--grammar", grammar, "a grammar in Lark's syntax")}
    return {"regex": regex, "choice": (choice[0].split(",") if len(choice) == 1 else choice) if choice else None}


def _text(option: str, file: str, what: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RequestError(f"{option} is {file!r}: {error}", hint=f"give a file that holds {what}") from error


def positive(value: int | None, option: str) -> None:
    """Raises RequestError: a count below 1."""
    if value is not None and value < 1:
        raise RequestError(f"{option} is {value}", hint=f"{option} takes a whole number of at least 1")


def refuse(option: str, others: Mapping[str, Any]) -> None:
    """Raises RequestError: one of the `others` is given (not None), and means nothing together with `option`."""
    for name, value in others.items():
        if value is not None:
            raise RequestError(f"{name} is given with {option}", hint=f"leave out {name} or {option}")


def open_model(
    name: str,
    changes: dict[str, Any],
    *,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    device: str = "cpu",
) -> tuple[LM, Sampling]:
    """The model of that name, which must have a canvas, and its sampling with the `changes` that are not None.

    Raises:
        BlockpressError: the model, its files, a sampling field, the types or the device.
    """
    from blockpress.config import Sampling

    def check(checkpoint: Checkpoint) -> None:
        if not checkpoint.config.has_canvas:
            raise RequestError(
                f"{checkpoint.path.name} is of the family {checkpoint.config.family}, which has no canvas",
                hint="give a model that has one, or ask this one by `blockpress run`",
            )

    lm, sampling = open_in_mode(
        name, None, changes, check=check, dtype=dtype, compute_dtype=compute_dtype, device=device
    )
    assert isinstance(sampling, Sampling)
    return lm, sampling


def open_in_mode(
    name: str,
    mode: str | None,
    changes: Mapping[str, Any],
    *,
    check: Callable[[Checkpoint], None] | None = None,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    device: str = "cpu",
    max_running: int = 32,
) -> tuple[LM, Sampling | AutoregressiveSampling]:
    """The model of that name, and its sampling in the mode (None: its default) with the `changes` that are not None.

    Args:
        changes: fields of either sampling; one that the mode's sampling lacks is refused by the name of its option.
        check: called with the checkpoint before its weights are read; raises to refuse it.
        max_running: most prompts answered at once, for which memory is reserved.

    Raises:
        BlockpressError: the model, its files, the mode, a sampling field, the types or the device.
    """
    from blockpress.checkpoints import open_checkpoint
    from blockpress.lm import load
    from blockpress.lm.arguments import check_mode

    checkpoint = open_checkpoint(name)
    if check is not None:
        check(checkpoint)
    sampling = _sampling(checkpoint.generation, check_mode(mode, checkpoint.config), changes)
    lm = load(checkpoint, dtype=dtype, compute_dtype=compute_dtype, device=device, max_running=max_running)
    return lm, sampling


def _sampling(generation: GenerationConfig, mode: str, changes: Mapping[str, Any]) -> Sampling | AutoregressiveSampling:
    from blockpress.config import AutoregressiveSampling
    from blockpress.config.sampling import DEFAULT_MAX_VERIFICATIONS

    defaults = generation.autoregressive if mode == "autoregressive" else generation.sampling
    given = {field: value for field, value in changes.items() if value is not None}
    given |= _edits(given.pop("edit", ()))
    for field in given:
        if field not in defaults.__dataclass_fields__:
            option, other = _option(field), "diffusion" if mode == "autoregressive" else "autoregressive"
            hint = f", or give --mode {other}" if generation.has_canvas else ": there is no canvas"
            raise RequestError(f"{option} is given in the mode {mode}", hint=f"leave out {option}{hint}")
    if mode == "verified" and given.setdefault("max_verifications", DEFAULT_MAX_VERIFICATIONS) == 0:
        raise RequestError("--max-verifications is 0 in the mode verified", hint="give at least 1, or --mode diffusion")
    if given.get("top_k") == 0:
        given["top_k"] = None
    chosen = defaults.with_(**given)
    if isinstance(chosen, AutoregressiveSampling) and chosen.temperature == 0:
        for field in [field for field in ("top_k", "top_p", "min_p") if field in given]:
            raise RequestError(
                f"{_option(field)} is given with a temperature of 0, which takes the likeliest token",
                hint=f"leave out {_option(field)}, or give a --temperature above 0",
            )
    return chosen


def _edits(given: Sequence[str]) -> dict[str, Any]:
    """The fields of `LogitEdits` that --edit gives. Raises RequestError: it gives none, or one twice."""
    from blockpress.config import LogitEdits

    edits: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        field = name.strip().replace("-", "_")
        if field not in LogitEdits.__dataclass_fields__ or field in edits:
            fields = ", ".join(LogitEdits.__dataclass_fields__)
            raise RequestError(f"--edit is {text!r:.200}", hint=f"give FIELD=JSON, each once, of the fields {fields}")
        try:
            edits[field] = json.loads(value)
        except ValueError as error:
            raise RequestError(
                f"--edit is {text!r:.200}: {error}", hint=f"give {field}= and a value in JSON"
            ) from error
    if isinstance(edits.get("logit_bias"), dict):  # JSON has no other keys than texts
        edits["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in edits["logit_bias"].items()}
    return edits


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def renamed_option(old: str, given: Any, new: str, value: Any) -> Any:
    """The value of the option `new`, which may be given by its older name, with a word on stderr.

    Raises:
        RequestError: both are given.
    """
    if given is None:
        return value
    refuse(old, {new: value})
    print(f"blockpress: {old} is now {new}", file=sys.stderr)
    return given


def check_device(device: str) -> None:
    """Raises RequestError: no such device on this machine."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise RequestError(
            f"--device is {device!r}, which this machine does not offer", hint=f"it has {', '.join(devices)}"
        ) from error


def print_json(value: dict[str, Any]) -> None:
    """Print one object on one line, flushed at once even into a pipe."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)
