"""Commands called in this process, with what they printed; a stdout that is a terminal; models to call them on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers

from blockpress.chat import ChatTemplate
from blockpress.checkpoints import save_checkpoint
from blockpress.checkpoints.safetensors import vision as weights_vision
from blockpress.cli.main import main
from blockpress.config import PRESETS, GenerationConfig, Sampling
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer

from .. import chat_tokenizer


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


class Screen(io.StringIO):
    """A stdout that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


Call = Callable[..., Ended]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("sudoku", "--random", 1, stdin="", screen=None)`; with a `Screen`, that is stdout."""

    def call(*arguments: object, stdin: str = "", screen: Screen | None = None) -> Ended:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            if screen is not None:
                patch.setattr(sys, "stdout", screen)
            code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(code, printed.out if screen is None else screen.getvalue(), printed.err)

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


@pytest.fixture(scope="session")
def seeing(workspace: Path, random_network: Callable[..., Any]) -> Path:
    """A checkpoint that chats and sees, with random weights, whose answers end early."""
    path, tiny = workspace / "cli-seeing", PRESETS["tiny"]()
    backend, names = chat_tokenizer.backend(), ["<|image>", "<image|>", "<|video|>"]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    ids = {name: backend.token_to_id(name) for name in ("<|image|>", *names)}
    with patch.dict(weights_vision.MINIMAL_TOWER, {"position_embedding_size": 48}):
        tower, tensors = weights_vision.minimal_vision(0, tiny.hidden_size)
    config = replace(
        tiny,
        vocab_size=backend.get_vocab_size(),
        canvas_length=8,
        image_id=ids["<|image|>"],
        vision=tower,
        context_length=2048,
        source={
            "boi_token_id": ids["<|image>"],
            "eoi_token_id": ids["<image|>"],
            "text_config": {"use_bidirectional_attention": "vision"},
        },
    )
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = Tokenizer(backend, config=special, chat_template=ChatTemplate.own().source)
    generation = GenerationConfig(sampling=Sampling(steps=3), stop_ids=(1, *range(40, 60)))
    save_checkpoint(path, random_network(config, seed=5), generation=generation, tokenizer=tokenizer, kept=tensors)
    return path
