"""Commands called in this process, with what they printed; a stdout that is a terminal; models to call them on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockpress.cli.main import main
from blockpress.config import PRESETS, GenerationConfig
from blockpress.text.builder import write_digits_tokenizer
from blockpress.weights import save_checkpoint


@dataclass(frozen=True)
class Called:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


class Screen(io.StringIO):
    """A stdout that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


Call = Callable[..., Called]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("sudoku", "--random", 1, stdin="", screen=None)`; with a `Screen`, that is stdout."""

    def call(*arguments: object, stdin: str = "", screen: Screen | None = None) -> Called:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            if screen is not None:
                patch.setattr(sys, "stdout", screen)
            code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Called(code, printed.out if screen is None else screen.getvalue(), printed.err)

    return call


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 80 columns and 24 lines."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Screen()


@pytest.fixture(scope="session")
def untrained(workspace: Path, random_network: Callable[..., object]) -> Path:
    """A checkpoint of the shipped model's shape, with random weights."""
    path = workspace / "cli-untrained"
    save_checkpoint(path, random_network(PRESETS["sudoku-nano"]()), generation=GenerationConfig())  # type: ignore[arg-type]
    write_digits_tokenizer(path)
    return path
