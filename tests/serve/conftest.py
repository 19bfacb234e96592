"""Servers that all tests here share: the shipped model, a model that does what it is told, and random ones.

| fixture | model | engine |
|---|---|---|
| nano | the shipped sudoku-nano | the real one |
| chatty | `tests.builders.chats.Obedient`: a user's message says what it answers | the reference loop |
| seeing | a random chat checkpoint with a vision tower and a token for each character | the real one |
| random | random weights under the published tokenizer, with our own chat template | the real one |

`serve(lm, name, options)` starts another one for a single test.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import blockpress
from blockpress.chat import ChatTemplate
from blockpress.config import PRESETS, GenerationConfig, Sampling
from blockpress.lm import LM
from blockpress.text import Tokenizer
from tests.builders.chats import obedient_model, picture, save_seeing
from tests.builders.server import Served, serving
from tests.conftest import make_random_network

Serve = Callable[..., Served]
PICTURE = picture()
"""A small image as base64 of a PNG file."""
SHORT = Sampling(steps=4, entropy_bound=1.0, confidence=0.4)


_default_context = cache(ssl.create_default_context)


@pytest.fixture(autouse=True)
def _certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's certificates are read once: each client of httpx would read them, which takes longer than an answer.

    In this room alone: the hub's client, which threads share, loses answers where it is made so quickly.
    """
    monkeypatch.setattr(ssl, "create_default_context", _default_context)


@pytest.fixture(scope="session")
def nano() -> Iterator[Served]:
    with serving(blockpress.load("sudoku-nano"), "sudoku-nano") as served:
        yield served


@pytest.fixture(scope="session")
def chatty() -> Iterator[Served]:
    with serving(obedient_model(), "chatty", reference=True) as served:
        yield served


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("seeing")
    save_seeing(folder)
    with serving(blockpress.load(folder), "seeing") as served:
        yield served


@pytest.fixture(scope="session")
def random(gemma: Tokenizer) -> Iterator[Served]:
    tokenizer = Tokenizer(gemma.backend, chat_template=ChatTemplate.own().source)
    config = replace(PRESETS["tiny"](), vocab_size=gemma.vocab_size, canvas_length=16, context_length=4096)
    generation = GenerationConfig(stop_ids=(1, 106), sampling=SHORT)
    network = make_random_network(config, seed=1)
    lm = LM(path=Path("random"), network=network, generation=generation, tokenizer=tokenizer)
    with serving(lm, "random") as served:
        yield served


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(lm, name, options, reference=False)`: a server that is stopped at the end of the test."""
    with ExitStack() as stack:

        def start(*args: Any, **options: Any) -> Served:
            return stack.enter_context(serving(*args, **options))

        yield start
