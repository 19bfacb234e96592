"""`blockpress decide`: typed questions about a text, answered by probabilities.

Invariant: stdout holds the answers, a line each, or one JSON object; questions are checked before the weights are read.

Run it:  blockpress decide ./my-checkpoint "My card was charged twice." --yes-no "Is it urgent?"
"""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.run import Model, read_prompt
from blockpress.cli.terminal import waiting, without_controls
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.decide.answers import Answered
    from blockpress.decide.questions import Question
    from blockpress.lm import LM

Context = Annotated[
    str | None,
    typer.Argument(
        metavar="CONTEXT", help="The text that is asked about; - or nothing reads standard input, or FILE has it."
    ),
]
QuestionsFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Questions as JSON: the body of OpenAI's /v1/decisions or of TypeSafe's /v1/systemone, whose model is not "
        "read, or its questions alone.",
    ),
]
YesNos = Annotated[
    list[str] | None, typer.Option("--yes-no", metavar="QUESTION", help="Ask whether it is so; repeatable.")
]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", metavar="QUESTION=A,B", help="Ask which of these; repeatable.")
]
Scores = Annotated[
    list[str] | None,
    typer.Option("--score", metavar="QUESTION=LOW,HIGH", help="Ask how much, from the lowest level; repeatable."),
]
Form = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="The canvas's text, {} for each answer; the options stand in it as they are, and CONTEXT is the prompt.",
    ),
]
Draws = Annotated[int | None, typer.Option(metavar="N", help="Draws of noise that are averaged. Default: 1.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Denoising steps; the last is read. Default: 1.")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Seed of the noise. Default: 0.")]

SHOWN = 5
"""Most options of a question that are shown."""


def decide(
    model: Model = options.SHIPPED,
    context: Context = None,
    questions: QuestionsFile = None,
    yes_no: YesNos = None,
    choice: Choices = None,
    score: Scores = None,
    form: Form = None,
    draws: Draws = None,
    steps: Steps = None,
    seed: Seed = None,
    json: options.Json = False,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    yes: options.Yes = False,
) -> None:
    """Answer typed questions about a text by probabilities, read from one denoising step.

    A line for each question: its answer, the shares of the likeliest options, the confidence (the answer's probability
    over the whole vocabulary) and the label mass (that of all options). With --json, the body that OpenAI's
    /v1/decisions answers with, or TypeSafe's /v1/systemone where FILE is of that shape.

    \b
    Examples:
      blockpress decide ./my-checkpoint "My card was charged twice." --yes-no "Is it urgent?"
      blockpress decide ./my-checkpoint "It broke." --choice "Which team?=returns,billing" --json
      blockpress decide ./my-checkpoint --questions request.json --draws 8
      blockpress decide sudoku-nano "12" --choice "What comes next?=3,4,5" --form "12{}"
    """
    from blockpress.decide import Decision
    from blockpress.decide.questions import check_questions
    from blockpress.decide.wire import format_decisions, format_systemone

    body = None if questions is None else _body(questions)
    systemone = body is not None and "state" in body
    asked, settings, about = _asked(yes_no or [], choice or [], score or []), dict[str, Any](), None
    if body is not None:
        asked, settings, about = _from_body(body, asked)
    if about is not None and context is not None:
        raise RequestError("CONTEXT is given, and --questions has one, too", hint="leave one of them out")
    given = {"draws": draws, "steps": steps, "seed": seed, "form": None if form is None else form.split("{}")}
    settings |= {name: value for name, value in given.items() if value is not None}
    checked = check_questions(asked)
    about = read_prompt(context) if about is None else about
    how = {"dtype": dtype, "compute_dtype": compute_dtype, "device": device}
    lm = opened_or_pulled(lambda: _open(model, how), model, yes)
    decision = lm.decide(about, checked, **settings)
    assert isinstance(decision, Decision)
    if json:
        options.print_json((format_systemone if systemone else format_decisions)(decision, model))
        return
    for question, answer in zip(checked, decision, strict=True):
        print(without_controls(_line(question, answer)))


def _open(model: str, how: dict[str, Any]) -> LM:
    with waiting(f"loading {model}"):
        lm, _ = options.open_model(model, {}, **how)
    return lm


def _body(file: str) -> dict[str, Any]:
    """The body in a file, or the one that its questions alone would stand in; an unset context is None."""
    try:
        read = json_text.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--questions is {file!r}: {error}", hint="give a file that holds JSON") from error
    if not (isinstance(read, dict) and "questions" in read):
        read = {"questions": read}
    if not isinstance(read["questions"], dict | list):
        raise RequestError(f"--questions is {file!r}, which holds no questions", hint="give a list or an object")
    return {"state" if isinstance(read["questions"], dict) else "input": None, **read}


def _from_body(body: dict[str, Any], more: list[Question]) -> tuple[list[Question], dict[str, Any], Any]:
    """The questions of a body and `more`, its settings, and its context, if it has one."""
    from blockpress.decide.wire import parse_decisions, parse_systemone

    where, parse = ("state", parse_systemone) if "state" in body else ("input", parse_decisions)
    unset = body[where] is None
    request = parse({**body, "model": "-", **({where: "-"} if unset else {})})
    return [*request.questions, *more], dict(request.options), None if unset else request.context


def _asked(yes_no: list[str], choices: list[str], scores: list[str]) -> list[Question]:
    """The questions of the options, in the order of their kinds."""
    from blockpress.decide import Choice, Score, YesNo

    return [
        *map(YesNo, yes_no),
        *(Choice(question, options=each) for question, each in map(_listed, choices)),
        *(Score(question, levels=each) for question, each in map(_listed, scores)),
    ]


def _listed(text: str) -> tuple[str, list[str]]:
    """A question and what may answer it: QUESTION=A,B, parted at the last equals sign."""
    question, parted, listed = text.rpartition("=")
    if not parted:
        raise RequestError(f"--choice or --score is {text!r:.80}, without an equals sign", hint="give QUESTION=A,B")
    return question, listed.split(",")


def _line(question: Question, answer: Answered) -> str:
    from blockpress.decide import YesNoAnswer

    if isinstance(answer, YesNoAnswer):
        shares: dict[Any, float] = {"yes": answer.probability, "no": 1 - answer.probability}
        value = "yes" if answer.value else "no"
    else:
        shares = dict(answer.probabilities)
        value = f"{answer.value:.2f}" if isinstance(answer.value, float) else str(answer.value)
    best = sorted(shares.items(), key=lambda each: -each[1])
    shown = ", ".join(f"{option} {share:.1%}" for option, share in best[:SHOWN]) + (", ..." if best[SHOWN:] else "")
    asked = question.name or question.question or "-"
    return f"{asked}: {value}  ({shown}; confidence {answer.confidence:.3f}, label mass {answer.label_mass:.3f})"
