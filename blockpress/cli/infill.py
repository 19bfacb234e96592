"""`blockpress infill` and `blockpress edit`: holes of a file, or of standard input, filled; spans written anew.

Invariant: what is outside of the holes stays as it is, to the byte: line ends, a byte order mark, no last line end, the
file's rights and the link that leads to it. Nothing is written before its changes were shown.

Run it:  printf 'a = <fill>\\n' | blockpress infill -
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpress.cli import options
from blockpress.cli.hub import opened_or_pulled
from blockpress.cli.terminal import is_terminal, note, waiting, without_controls
from blockpress.errors import RequestError

if TYPE_CHECKING:
    from blockpress.decoding import Reply
    from blockpress.lm import LM

MARK = "\ufeff"
PLACE = re.compile(r"(\d+):(\d+)(?:-(\d+):(\d+))?")

File = Annotated[str, typer.Argument(metavar="FILE", help="The text; - reads standard input.")]
Instruction = Annotated[str | None, typer.Argument(metavar="INSTRUCTION", help="What to do with the span.")]
At = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LINE:COL[-LINE:COL]",
        help="Where a hole is, or from where to where, its end not included; both count from 1. Repeatable.",
    ),
]
Span = Annotated[
    str, typer.Option("--at", metavar="LINE:COL-LINE:COL", help="From where to where, the end not included; from 1.")
]
Marker = Annotated[str, typer.Option(metavar="TEXT", help="What stands in the text where a hole is, without --at.")]
Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="As MODEL of `blockpress run`.")]
Asked = Annotated[str | None, typer.Option("--instruction", metavar="TEXT", help="What the text answers.")]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Most tokens that a hole may add. Default: four canvases.")
]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of all random draws: the same seed, the same text.")]
Noise = Annotated[float, typer.Option(metavar="X", help="How much of the old text noise replaces, from 0 to 1.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Write FILE, once its changes are shown and confirmed.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Write FILE, and pull MODEL, without asking.")]


@dataclass(frozen=True, kw_only=True)
class FilledText:
    """A text to be filled. raw: its bytes. path: None for standard input. text: with line ends of one character, if all
    in `raw` are of two (crlf), and without its byte order mark (marked)."""

    raw: bytes
    path: Path | None
    text: str
    crlf: bool
    marked: bool

    def as_stored(self, text: str) -> str:
        """A text as it is written to the file."""
        return (MARK if self.marked else "") + (text.replace("\n", "\r\n") if self.crlf else text)


def infill(
    file: File,
    at: At = None,
    marker: Marker = "<fill>",
    instruction: Asked = None,
    in_place: InPlace = False,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    steps: options.Steps = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    edit: options.Edit = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    schema: options.SchemaFile = None,
    grammar: options.GrammarFile = None,
    json: options.Json = False,
    model: Model = options.SHIPPED,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    yes: Yes = False,
) -> None:
    """Fill the holes of a text.

    Holes are where --at says, or where the text has the marker. The whole text goes to standard output, or with
    --in-place to FILE.

    \b
    Examples:
      printf 'a = <fill>\\n' | blockpress infill -
      blockpress infill notes.md --at 12:1-14:20 --in-place
    """
    _check(file, in_place, json, yes, max_tokens)
    limits = options.constraint(regex, choice, schema, grammar)
    source = _read(file)
    pieces = _at_places(source.text, at) if at else source.text.split(marker) if marker else []
    if len(pieces) < 2:
        raise RequestError(
            f"{file} has no {marker!r}", hint="put the marker where a hole is, or give --at, or another --marker"
        )
    changes = {"steps": steps, "top_k": top_k, "top_p": top_p, "edit": edit}
    how = {"dtype": dtype, "compute_dtype": compute_dtype, "device": device}
    lm, sampling = opened_or_pulled(lambda: _open(model, changes, how), model, yes)
    with waiting("filling"):
        reply = lm.infill(pieces, None, max_tokens, seed, instruction=instruction, sampling=sampling, **limits)
    _finish(source, reply, in_place, json, yes)


def edit(
    file: File,
    instruction: Instruction = None,
    at: Span = "",
    noise: Noise = 0.5,
    in_place: InPlace = False,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    steps: options.Steps = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    edit: options.Edit = None,
    json: options.Json = False,
    model: Model = options.SHIPPED,
    dtype: options.Dtype = None,
    compute_dtype: options.ComputeDtype = None,
    device: options.Device = "cpu",
    yes: Yes = False,
) -> None:
    """Write a span of a text anew, starting from what stands there.

    The whole text goes to standard output, or with --in-place to FILE.

    \b
    Examples:
      blockpress edit notes.md "Make it shorter." --at 12:1-14:20 --noise 0.7
      blockpress edit notes.md --at 3:1-3:40 --in-place
    """
    _check(file, in_place, json, yes, max_tokens)
    if not at:
        raise RequestError("--at is not given", hint="say what is to be edited: --at LINE:COL-LINE:COL")
    source = _read(file)
    ((start, stop),) = _spans(source.text, [at])
    changes = {"steps": steps, "top_k": top_k, "top_p": top_p, "edit": edit}
    how = {"dtype": dtype, "compute_dtype": compute_dtype, "device": device}
    lm, sampling = opened_or_pulled(lambda: _open(model, changes, how), model, yes)
    with waiting("editing"):
        reply = lm.edit(source.text, (start, stop), instruction, noise, seed, max_tokens=max_tokens, sampling=sampling)
    _finish(source, reply, in_place, json, yes)


def _open(model: str, changes: dict[str, Any], how: dict[str, Any]) -> tuple[LM, Any]:
    with waiting(f"loading {model}"):
        return options.open_model(model, changes, **how)


def _check(file: str, in_place: bool, json: bool, yes: bool, max_tokens: int | None) -> None:
    """Raises RequestError: options that mean nothing together."""
    options.positive(max_tokens, "--max-tokens")
    if not in_place:
        return
    if file == "-":
        raise RequestError("--in-place is given, and FILE is standard input", hint="leave out --in-place")
    options.refuse("--in-place", {"--json": json or None})
    if not yes and not (sys.stdin is not None and sys.stdin.isatty()):
        raise RequestError("--in-place asks before it writes, and there is no terminal", hint="add --yes")


def _read(file: str) -> FilledText:
    """Raises RequestError: it cannot be read, or is no UTF-8 text."""
    try:
        stdin: Any = getattr(sys.stdin, "buffer", sys.stdin)
        raw = stdin.read() if file == "-" else Path(file).read_bytes()
        raw = raw.encode("utf-8") if isinstance(raw, str) else raw
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError, AttributeError) as error:
        raise RequestError(f"{file} cannot be read as UTF-8 text: {error}", hint="give a text file") from error
    marked, text = text.startswith(MARK), text.removeprefix(MARK)
    crlf = "\r\n" in text and "\n" not in text.replace("\r\n", "")
    text = text.replace("\r\n", "\n") if crlf else text
    return FilledText(raw=raw, path=None if file == "-" else Path(file), text=text, crlf=crlf, marked=marked)


def _at_places(text: str, at: Sequence[str]) -> list[str]:
    """The pieces around the spans. Raises RequestError: they overlap."""
    pieces, before = list[str](), 0
    for start, stop in sorted(_spans(text, at)):
        if pieces and start <= before:
            raise RequestError(f"--at {' --at '.join(at)}: holes overlap or meet", hint="leave text between two holes")
        pieces.append(text[before:start])
        before = stop
    return [*pieces, text[before:]]


def _spans(text: str, at: Sequence[str]) -> list[tuple[int, int]]:
    """Positions in the text. Raises RequestError: a place outside of it, or none."""
    lines, spans = text.split("\n"), list[tuple[int, int]]()
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)

    def position(place: str, line: int, column: int) -> int:
        if not 1 <= line <= len(lines):
            raise RequestError(f"--at is {place!r}, and the text has {len(lines)} lines", hint="lines count from 1")
        if not 1 <= column <= len(lines[line - 1]) + 1:
            raise RequestError(
                f"--at is {place!r}, and line {line} has {len(lines[line - 1])} characters",
                hint=f"columns go from 1 to {len(lines[line - 1]) + 1}, after the last",
            )
        return starts[line - 1] + column - 1

    for place in at:
        found = PLACE.fullmatch(place)
        if found is None:
            raise RequestError(f"--at is {place!r}", hint="give LINE:COL or LINE:COL-LINE:COL, such as 12:1-14:20")
        first, second = found.group(1, 2), found.group(3, 4)
        start = position(place, *map(int, first))
        stop = start if second[0] is None else position(place, *map(int, second))
        if stop < start:
            raise RequestError(f"--at is {place!r}, which ends before it starts", hint="give the earlier place first")
        spans.append((start, stop))
    return spans


def _finish(source: FilledText, reply: Reply, in_place: bool, json: bool, yes: bool) -> None:
    """Print the whole text, or write it to the file."""
    from blockpress.cli.serialize import ended, reply_to_dict

    assert reply.whole is not None
    if json:
        holes = tuple(replace(source, marked=False).as_stored(hole) for hole in reply.holes)
        options.print_json(reply_to_dict(replace(reply, holes=holes, whole=source.as_stored(reply.whole))))
        return
    note(ended(reply))
    if not in_place:
        sys.stdout.flush()
        content, out = source.as_stored(reply.whole), getattr(sys.stdout, "buffer", None)
        if is_terminal(sys.stdout) or out is None:
            print(without_controls(content.replace("\r\n", "\n")), end="")
        else:
            out.write(content.encode("utf-8"))
        return
    assert source.path is not None
    changes = list(difflib.unified_diff(*_lines(source.text, reply.whole), str(source.path), str(source.path)))
    if not changes:
        return note("nothing has changed")
    for change in changes:
        line = change if change.endswith("\n") else f"{change}\n\\ No newline at end of file\n"
        print(without_controls(line) if is_terminal(sys.stdout) else line, end="")
    sys.stdout.flush()
    if yes or typer.confirm(f"Write {source.path}?", err=True):
        _write(source, source.as_stored(reply.whole).encode("utf-8"))


def _lines(before: str, after: str) -> tuple[list[str], list[str]]:
    return before.splitlines(keepends=True), after.splitlines(keepends=True)


def _write(source: FilledText, content: bytes) -> None:
    """Replace the file, or the one that a link leads to, at once. Raises RequestError: it has changed meanwhile."""
    assert source.path is not None
    target = source.path.resolve()
    if target.read_bytes() != source.raw:
        raise RequestError(f"{source.path} has changed meanwhile", hint="nothing was written; try again")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, name)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
