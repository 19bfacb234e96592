"""The page at `/`, its files, and the puzzles that it shows.

    /            the page, for a browser; a line of text for whatever else asks
    /page/...    its modules and style, as they lie in the package: nothing is built, nothing comes from elsewhere
    /v1/sudoku   a random puzzle, for a model that solves them

Invariant: the page runs no script and loads no style but its own (its content security policy says so), and needs no
key itself: only what it asks of the model does.
Run it:  blockpress serve
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from blockpress import sudoku
from blockpress.errors import PuzzleError, TextError
from blockpress.lm import LM
from blockpress.serve.errors import _FieldError
from blockpress.serve.fields import MOST_SEED
from blockpress.serve.service import Service

FILES = Path(__file__).with_name("page")
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}

router = APIRouter()


class PageFiles(StaticFiles):
    """The page's files, with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def page_files() -> PageFiles:
    """What is mounted at /page."""
    return PageFiles(directory=FILES)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(http: Request) -> Response:
    """The page, for a client that accepts HTML; others get the line that Ollama's clients expect here."""
    if "text/html" in http.headers.get("accept", ""):
        return FileResponse(FILES / "index.html", headers={**HEADERS, "Vary": "Accept"})
    return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})


@router.get("/v1/sudoku")
async def puzzle(
    http: Request,
    givens: Annotated[int, Query(ge=23, le=80)] = 40,
    seed: Annotated[int | None, Query(ge=0, le=MOST_SEED)] = None,
) -> dict[str, Any]:
    """A puzzle with one solution: 81 digits, row by row, 0 a blank. The same one for the same seed and givens."""
    service: Service = http.app.state.service
    if not solves_sudoku(service.lm):
        raise _FieldError("model", f"{service.name} does not solve puzzles", "serve sudoku-nano")
    number = random.getrandbits(32) if seed is None else seed
    try:
        made = await service.build(lambda: sudoku.generate_puzzle(number, givens))
    except PuzzleError as error:
        raise _FieldError("givens", error.message, error.hint or "") from error
    return {"puzzle": made.puzzle, "givens": made.givens, "seed": number}


def solves_sudoku(lm: LM) -> bool:
    """Whether the model's vocabulary is that of puzzles: each digit and line end is a token, and no letter is."""
    if lm.tokenizer is None:
        return False
    grid = sudoku.layout("123456789" * 9)
    try:
        if len(lm.tokenizer.encode(grid, add_special=False)) != len(grid):
            return False
        lm.tokenizer.encode("a")
    except TextError:
        return bool(lm.config.has_canvas and lm.config.canvas_length >= len(grid))
    return False
