"""`blockpress run`: a prompt goes in, text comes out.

Invariant: stdout holds the answer's text, or JSON, and nothing else; text is printed once it is final.

Run it:  blockpress run sudoku-nano "$(blockpress sudoku --random 1 --puzzle-only)"
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.terminal import console, is_terminal, note, waiting
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.config import Sampling
    from blockpress.lm import LM
    from blockpress.reply import Event, Reply

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model, or a checkpoint's directory.")]
Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="The text to answer; - or nothing reads standard input, without its last line end."
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Most tokens to return. Default: until a stop or the context's end.")
]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of all random draws: the same seed, the same answer.")]
Bound = Annotated[
    float | None, typer.Option(metavar="NATS", help="Entropy that the tokens accepted in one step may hold together.")
]
TMin = Annotated[float | None, typer.Option(metavar="T", help="Temperature after the last step.")]
TMax = Annotated[float | None, typer.Option(metavar="T", help="Temperature at the first step.")]
Stability = Annotated[
    int | None, typer.Option(metavar="N", help="Steps in a row that must agree before a canvas may settle.")
]
Confidence = Annotated[float | None, typer.Option(metavar="NATS", help="Mean entropy below which a canvas may settle.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")]
Events = Annotated[bool, typer.Option("--events", help="Print one JSON object an event: step, commit, text, done.")]


def run(
    model: Model = options.SHIPPED,
    prompt: Prompt = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    steps: options.Steps = None,
    entropy_bound: Bound = None,
    t_min: TMin = None,
    t_max: TMax = None,
    stability: Stability = None,
    confidence: Confidence = None,
    stop: Stop = None,
    json: options.Json = False,
    events: Events = False,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    fast: options.Fast = False,
) -> None:
    """Answer a prompt.

    On a terminal the canvas is shown while it settles. Otherwise text goes to standard output as soon as it is final,
    and what it cost to standard error. Sampling options default to the model's generation_config.json.

    \b
    Examples:
      blockpress run sudoku-nano "$(blockpress sudoku --random 1 --puzzle-only)"
      blockpress run ./my-checkpoint "Once upon a time" --max-tokens 100 --seed 3
      blockpress run sudoku-nano --json < puzzle.txt
    """
    options.positive(max_tokens, "--max-tokens")
    if events:
        options.refuse("--events", {"--json": json or None})
    changes: dict[str, Any] = {"steps": steps, "entropy_bound": entropy_bound, "t_min": t_min, "t_max": t_max}
    changes |= {"stability": stability, "confidence": confidence, "stop": tuple(stop) if stop else None}
    text = _prompt(prompt)
    with waiting(f"loading {model}"):
        lm, sampling = options.open_model(model, changes, dtype=dtype, device=device)
    if not (json or events) and is_terminal(sys.stdout):
        _show(lm, text, max_tokens, seed, sampling, fast)
    elif events:
        for event in lm.stream(text, max_tokens, seed, sampling):
            options.print_json(event_to_dict(lm, event))
    elif json:
        options.print_json(reply_to_dict(lm.generate(text, max_tokens, seed, sampling)))
    else:
        _print(lm, text, max_tokens, seed, sampling)


def reply_to_dict(reply: Reply) -> dict[str, Any]:
    """The reply as JSON has it."""
    return {
        "text": reply.text,
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        "usage": vars(reply.usage),
    }


def event_to_dict(lm: LM, event: Event) -> dict[str, Any]:
    """The event as JSON has it; entropies in nats, one number or truth value for each position of the canvas."""
    from blockpress.reply import Committed, Denoised, Done

    if isinstance(event, Denoised):
        return {
            "event": "step",
            "canvas": event.canvas,
            "step": event.step,
            "text": None if lm.tokenizer is None else lm.decode(event.argmax),
            "tokens": event.argmax.tolist(),
            "accepted": event.accepted.tolist(),
            "changed": event.changed.tolist(),
            "entropy": [round(value, 4) for value in event.entropy.tolist()],
            "settled": event.settled,
        }
    if isinstance(event, Committed):
        return {"event": "commit", "canvas": event.canvas, "tokens": event.tokens, "steps": event.steps}
    if isinstance(event, Done):
        return {"event": "done", **reply_to_dict(event.reply)}
    return {"event": "text", "text": event.text}


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        note("Type the prompt; end it with Ctrl-D on a line of its own.")
    try:
        text = sys.stdin.read().removesuffix("\n")
    except (UnicodeDecodeError, AttributeError) as error:
        raise RequestError("standard input holds no text", hint="pipe the prompt in, or give it as PROMPT") from error
    if not text:
        raise RequestError("the prompt is empty", hint="give PROMPT behind the model's name, or pipe it in")
    return text


def _show(lm: LM, prompt: str, max_tokens: int | None, seed: int, sampling: Sampling, fast: bool) -> None:
    from blockpress.cli.canvas import TextView, shown
    from blockpress.reply import Done

    view = TextView(lm, sampling)
    with shown(console(sys.stdout), view, fast) as watch:
        for event in lm.stream(prompt, max_tokens, seed, sampling):
            watch(event)
            if isinstance(event, Done):
                view.finish(ended(event.reply))


def _print(lm: LM, prompt: str, max_tokens: int | None, seed: int, sampling: Sampling) -> None:
    from blockpress.cli.meter import Meter
    from blockpress.reply import Done, Text

    meter = Meter(sampling, lm.generation.stop_ids, lm.config.canvas_length)
    for event in lm.stream(prompt, max_tokens, seed, sampling):
        meter.see(event)
        if isinstance(event, Text):
            print(event.text, end="", flush=True)
        elif isinstance(event, Done):
            if event.reply.text and not event.reply.text.endswith("\n"):
                print(flush=True)
            note("   ".join([ended(event.reply), *meter.result()]))
        meter.go_on()


def ended(reply: Reply) -> str:
    """How a reply ended, in words."""
    why = {"stop": "stopped", "length": "at its length", "cancelled": "cancelled"}[reply.finish_reason]
    usage = reply.usage
    canvases = f"{usage.canvases} canvas" + ("" if usage.canvases == 1 else "es")
    return f"{why} after {usage.completion_tokens} tokens: {canvases}, {usage.steps} steps"
