"""`blockpress run`: answer a prompt, by the model's chat template where it has one.

Invariant: stdout holds the answer's text, or JSON, and nothing else, unless it is a terminal; text is printed once it
is final.

Run it:  blockpress run sudoku-nano "$(blockpress sudoku --random 1 --puzzle-only)"
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blockpress.cli import media, options
from blockpress.cli.animate import check_file
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.terminal import console, is_terminal, note, waiting
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from blockpress.checkpoints import Checkpoint
    from blockpress.cli.chat import ChatSession
    from blockpress.decoding import Event, Reply

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A shipped model, a checkpoint's directory, a GGUF file, or owner/name after a pull."
    ),
]
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
Mode = Annotated[
    Literal["diffusion", "verified", "autoregressive"] | None,
    typer.Option(
        help="Write canvas by canvas, the same checked by the causal pass, or token by token. Default: canvases, "
        "if the model has them."
    ),
]
MaxVerifications = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Most verifications of a settled canvas by the causal pass. Default: 0; if verified, 4."
    ),
]
Checks = Annotated[int | None, typer.Option(hidden=True)]  # until version 0.3
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="With --json or --events: log-probabilities of the tokens, and of the K best in each place."
    ),
]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="Token by token: divides the logits; 0 takes the likeliest token.")
]
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
Image = Annotated[list[str] | None, typer.Option(metavar="PATH", help="Show this image first; repeatable.")]
Video = Annotated[list[str] | None, typer.Option(metavar="PATH", help="Show this video, after the images; repeatable.")]
SoftTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Most tokens of an image or a video's frame: 70, 140, 280, 560 or 1120."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Give the model PROMPT as it is, even if it has a chat template for it.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="What the chat begins with: who the model shall be.")]
Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="Think before the answer. Default: no.", show_default=False),
]
Budget = Annotated[
    int | None, typer.Option(metavar="N", help="Think for at most N tokens, then answer; turns thinking on.")
]
Events = Annotated[
    bool, typer.Option("--events", help="Print one JSON object an event: step, commit, text, thought, call, done.")
]

_DENOISING = ("steps", "entropy_bound", "t_min", "t_max", "stability", "confidence")
_READING = ("max_verifications", "max_repairs", "repair_below")
FIELDS = frozenset((*_DENOISING, *_READING, "temperature", "top_k", "top_p", "edit", "stop"))
"""The options of `run` that are fields of a sampling."""
SHAPES = ("regex", "choice", "schema", "grammar")
"""Those that say what the answer must be."""


def run(
    model: Model = options.SHIPPED,
    prompt: Prompt = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    system: System = None,
    image: Image = None,
    video: Video = None,
    soft_tokens: SoftTokens = None,
    thinking: Thinking = None,
    thinking_budget: Budget = None,
    raw: Raw = False,
    mode: Mode = None,
    steps: options.Steps = None,
    entropy_bound: Bound = None,
    t_min: TMin = None,
    t_max: TMax = None,
    stability: Stability = None,
    confidence: Confidence = None,
    max_verifications: MaxVerifications = None,
    max_repairs: options.MaxRepairs = None,
    repair_below: options.RepairBelow = None,
    temperature: Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    edit: options.Edit = None,
    stop: Stop = None,
    logprobs: Logprobs = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    schema: options.SchemaFile = None,
    grammar: options.GrammarFile = None,
    json: options.Json = False,
    events: Events = False,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    fast: options.Fast = False,
    record: options.Record = None,
    checks: Checks = None,
    yes: options.Yes = False,
) -> None:
    """Answer a prompt.

    A model with a chat template is asked in its form; without PROMPT, a conversation begins on a terminal. There the
    canvas is shown while it settles. Otherwise text goes to standard output as soon as it is final, thoughts and what
    it cost to standard error. Sampling options default to the model's generation_config.json.

    With --record, what the canvases went through is written to an SVG that plays in a browser.

    \b
    Examples:
      blockpress run sudoku-nano "$(blockpress sudoku --random 1 --puzzle-only)"
      blockpress run ./my-checkpoint "Once upon a time" --raw --max-tokens 100 --seed 3
      blockpress run ./my-checkpoint "What is this?" --image photo.jpg --thinking-budget 500
      blockpress run ./my-checkpoint "Why is the sky blue?" --record sky.svg
    """
    changes = _changes(locals())
    chat = {"--system": system, "--thinking": thinking, "--thinking-budget": thinking_budget}
    shown = {"--image": image or None, "--video": video or None, "--soft-tokens": soft_tokens}
    limits = {name: value for name, value in locals().items() if name in (*SHAPES, "max_tokens", "seed", "logprobs")}
    given = model, mode, changes, chat, shown, limits, raw, check_file(record)
    _check(limits, thinking_budget, raw, json, events, chat | shown)
    text = None if prompt is None and _may_talk(raw or json or events or record is not None) else read_prompt(prompt)
    _answer(opened_or_pulled(lambda: _open(*given, dtype, compute_dtype, device), model, yes), text, json, events, fast)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sampling among the options of `run`."""
    old, new = given["checks"], given["max_verifications"]
    given |= {"max_verifications": options.renamed_option("--checks", old, "--max-verifications", new)}
    return {name: value for name, value in given.items() if name in FIELDS and value != []}


def _check(
    limits: dict[str, Any], budget: int | None, raw: bool, json: bool, events: bool, chat: dict[str, Any]
) -> None:
    """Put the constraint among the limits. Raises RequestError: a count below 1, or options that do not go together."""
    limits["constraint"] = options.constraint(*(limits.pop(name) for name in SHAPES))
    options.positive(limits["max_tokens"], "--max-tokens")
    options.positive(budget, "--thinking-budget")
    if raw:
        options.refuse("--raw", chat)
    if events:
        options.refuse("--events", {"--json": json or None})
    if limits["logprobs"] is not None and not (json or events):
        raise RequestError("--logprobs is given, and text has no place for them", hint="add --json or --events")


def _may_talk(otherwise: bool) -> bool:
    """Whether input and output are a terminal, so that a conversation is possible. Whether the model can chat is known
    once it is loaded, before the first question."""
    return not otherwise and sys.stdin is not None and sys.stdin.isatty() and is_terminal(sys.stdout)


def _open(
    model: str,
    mode: str | None,
    changes: dict[str, Any],
    chat: dict[str, Any],
    shown: dict[str, Any],
    limits: dict[str, Any],
    raw: bool,
    record: Path | None,
    dtype: str | None,
    compute_dtype: str | None,
    device: str,
) -> ChatSession:
    """The model and how it is prompted; `changes` to its sampling, `chat` and `shown` by their options, `limits` as
    fields of `ChatSession`; the rest as arguments of `load`."""
    parts = media.parts(shown["--image"] or (), shown["--video"] or (), shown["--soft-tokens"])

    def check(found: Checkpoint) -> None:
        from blockpress.lm.arguments import check_mode

        media.check_model(found, chat, shown)
        if record is not None and check_mode(mode, found.config) == "autoregressive":
            raise RequestError(
                f"--record is {str(record)!r}, and the mode autoregressive has no canvas",
                hint="leave out --record, or choose a model and a --mode that have canvases",
            )

    with waiting(f"loading {model}"):
        from blockpress.cli.chat import ChatSession
        from blockpress.cli.record import CanvasRecording
        from blockpress.config import Sampling

        how: dict[str, Any] = {"dtype": dtype, "compute_dtype": compute_dtype, "device": device}
        lm, sampling = options.open_in_mode(model, mode, changes, check=check, max_running=1, **how)
    budget, thinking = chat["--thinking-budget"], chat["--thinking"]
    recording = None
    if record is not None and isinstance(sampling, Sampling):
        recording = CanvasRecording(record, lm, sampling, model)
    return ChatSession(
        lm=lm,
        sampling=sampling,
        chat=not raw and lm.tokenizer is not None and lm.tokenizer.chat_template is not None,
        system=chat["--system"],
        thinking=budget is not None if thinking is None else thinking,
        thinking_budget=budget,
        shown=parts,
        soft_tokens=shown["--soft-tokens"],
        record=recording,
        **limits,
    )


def _answer(asking: ChatSession, text: str | None, json: bool, events: bool, fast: bool) -> None:
    """One answer in the requested form; without a text, a conversation, or the prompt from standard input."""
    from blockpress.cli.serialize import event_to_dict, reply_to_dict

    if text is None and asking.chat:
        return _converse(asking, fast)
    text = read_prompt(None) if text is None else text
    if events:
        for event in asking.stream(text):
            options.print_json(event_to_dict(asking.lm, event))
    elif json:
        options.print_json(reply_to_dict(_last(asking.stream(text)), chat=asking.chat))
    else:
        _tell(asking, text, fast)


def read_prompt(prompt: str | None) -> str:
    """The prompt as given; None or -: standard input. Raises RequestError: it holds none."""
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


def _converse(asking: ChatSession, fast: bool) -> None:
    """A conversation until the end of input; the model is given all texts so far, without thoughts and calls."""
    note("Type a message; an empty line or Ctrl-D ends the conversation.")
    said: list[dict[str, Any]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            return
        reply = _tell(asking, text, fast, said)
        said += [asking.message(text, first=not said), {"role": "assistant", "content": reply.text or ""}]


def _tell(asking: ChatSession, text: str, fast: bool, before: Sequence[dict[str, Any]] = ()) -> Reply:
    """One answer as it is written: on a terminal with its canvas, if it has one."""
    if asking.mode == "diffusion" and is_terminal(sys.stdout):
        return _last(_show(asking, asking.stream(text, before), fast))
    return _last(_print(asking, asking.stream(text, before)))


def _show(asking: ChatSession, events: Iterable[Event], fast: bool) -> Iterator[Event]:
    from blockpress.cli.canvas import shown
    from blockpress.cli.chat import ChatView
    from blockpress.cli.serialize import ended
    from blockpress.config import Sampling
    from blockpress.decoding import Done

    assert isinstance(asking.sampling, Sampling)
    view = ChatView(asking.lm, asking.sampling)
    with shown(console(sys.stdout), view, fast) as watch:
        for event in events:
            watch(event)
            if isinstance(event, Done):
                view.finish(ended(event.reply))
            yield event


def _print(asking: ChatSession, events: Iterable[Event]) -> Iterator[Event]:
    from blockpress.cli.chat import Stream
    from blockpress.cli.meter import Meter
    from blockpress.cli.serialize import ended
    from blockpress.decoding import Done

    lm, stream = asking.lm, Stream()
    meter = Meter(asking.sampling, lm.generation.stop_ids, lm.config.canvas_length)
    for event in events:
        meter.see(event)
        stream.see(event)
        if isinstance(event, Done):
            note("   ".join([ended(event.reply), *meter.result()]))
        meter.go_on()
        yield event


def _last(events: Iterable[Event]) -> Reply:
    """The reply at the end of the events."""
    from blockpress.decoding import Done

    (reply,) = [event.reply for event in events if isinstance(event, Done)]
    return reply
