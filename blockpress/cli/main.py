"""The command `blockpress`: its subcommands, and how a command ends.

Every error is reported in one helpful line, so a command ends in one of these ways and in no other:

    0     done                                  2     the caller's mistake: `blockpress: MESSAGE (hint: ...)` on stderr
    1     `doctor` found a fault; our mistake   130   Ctrl-C          141   the output pipe was closed; no message

Invariant: no traceback is shown unless BLOCKPRESS_TRACEBACK is set, and `--help` imports no torch: command modules
import heavy packages inside their functions.

Run it:  blockpress --help
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from blockpress import __version__
from blockpress.cli.bench import bench
from blockpress.cli.decide import decide
from blockpress.cli.doctor import doctor
from blockpress.cli.hub import ls, pull, rm
from blockpress.cli.infill import edit, infill
from blockpress.cli.launch import launch
from blockpress.cli.quantize import quantize
from blockpress.cli.run import run
from blockpress.cli.serve import serve
from blockpress.cli.show import show
from blockpress.cli.sudoku import sudoku
from blockpress.cli.synthesize import synthesize
from blockpress.cli.train import train
from blockpress.errors import BlockpressError, one_line

# typer exports only this subclass, and raises its base class too.
UsageError: Any = typer.BadParameter.__base__

EXAMPLES = """\b
Try:
  blockpress sudoku --random 1          a fresh puzzle, the canvas shown
  blockpress show sudoku-nano           what is in the model
  blockpress doctor                     whether this machine is ready
"""


class _Interrupted(Exception):
    """Ctrl-C, carried past typer, which would print its own message."""


class _ReaderGone(Exception):
    """A closed pipe, carried past typer."""


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None
        except BrokenPipeError:
            raise _ReaderGone from None


app = typer.Typer(
    name="blockpress",
    cls=_Commands,
    help="blockpress writes text in blocks: a block-diffusion language model, small enough to read.",
    epilog=EXAMPLES,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"blockpress {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for _command in (
    sudoku,
    run,
    infill,
    edit,
    decide,
    serve,
    launch,
    show,
    pull,
    ls,
    rm,
    quantize,
    synthesize,
    train,
    bench,
    doctor,
):
    app.command()(_command)


@cache
def _command_line() -> Any:
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's own) and return the exit code."""
    _print_anything()
    try:
        code = _command_line().main(
            list(sys.argv[1:] if argv is None else argv), prog_name="blockpress", standalone_mode=False
        )
        sys.stdout.flush()
    except BlockpressError as error:
        return _fail(error.message, error.hint)
    except UsageError as error:
        return _fail(error.format_message(), _usage_hint(error))
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        print("\nblockpress: interrupted", file=sys.stderr)
        return 130
    except (_ReaderGone, BrokenPipeError):
        _close_stdout()
        return 141
    except OSError as error:
        _show_traceback()
        return _fail(str(error), "check that path, its rights and the room on the disk")
    except Exception as error:
        _show_traceback()
        text = f"our own mistake, {one_line(error)}"
        return _fail(text, "please report it with what BLOCKPRESS_TRACEBACK=1 prints", code=1)
    return code if isinstance(code, int) else 0


def _fail(message: str, hint: str, code: int = 2) -> int:
    line = " ".join(f"blockpress: {message.rstrip('.')} (hint: {hint})".split())
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return code


def _usage_hint(error: Any) -> str:
    context = error.ctx
    path = "blockpress" if context is None else context.command_path
    if context is not None and isinstance(context.command, TyperGroup) and "command" in error.format_message():
        return f"commands: {', '.join(context.command.list_commands(context))}; see {path} --help"
    return f"see {path} --help"


def _print_anything() -> None:
    """Characters that the terminal's encoding lacks are replaced, not fatal."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _close_stdout() -> None:
    # Python flushes again at exit, and would report the closed pipe then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_traceback() -> None:
    if os.environ.get("BLOCKPRESS_TRACEBACK"):
        traceback.print_exc()
