"""Chat models for tests: a network that writes what it is told, one that does what it is asked, and a random one that sees."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tokenizers
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from blockpress.chat import ChatTemplate
from blockpress.chat.tool_calls import write_call
from blockpress.checkpoints import save_checkpoint
from blockpress.checkpoints.safetensors import vision as weights_vision
from blockpress.config import PRESETS, GenerationConfig
from blockpress.errors import EngineError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Cache, Network
from blockpress.text import Tokenizer
from tests import chat_tokenizer
from tests.chat_tokenizer import TOKENIZER, VOCABULARY, ids
from tests.conftest import make_random_network

VOCAB, CANVAS, EOS = len(VOCABULARY), 12, 1
CONFIG = replace(PRESETS["tiny"](), vocab_size=VOCAB, hidden_size=VOCAB, canvas_length=CANVAS, context_length=4096)
LOREM = "abcdefghijklmnopqrstuvwxyz" * 8
PICTURE_TOKENS = ["<|image>", "<image|>", "<|video|>"]


@dataclass(frozen=True)
class Told(Cache):
    """A context that also remembers its tokens."""

    history: tuple[tuple[int, ...], ...] = ()

    def select(self, rows: Tensor) -> Told:
        chosen = super().select(rows)
        return Told(chosen.layers, chosen.lengths, tuple(self.history[row] for row in rows.tolist()))


Script = Callable[[str, int], str]


class Scripted(Network):
    """Writes `script(text behind the prompt, attempt)`, cut or filled to a canvas; where that is banned, an "x"."""

    def __init__(self, script: Script) -> None:
        super().__init__(CONFIG)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed_tokens.weight.copy_(torch.eye(VOCAB))
        self.requires_grad_(False)
        self.script = script
        self.begun: Counter[str] = Counter()

    def told(self, text: str, attempt: int) -> str:
        """What comes next after the whole text of a context."""
        return self.script(text.rpartition("<|turn>model\n")[2], attempt)

    def padding(self, told: str) -> list[int]:
        """What follows in the canvas; empty: more text."""
        return []

    def empty_cache(self, batch: int) -> Told:
        plain = super().empty_cache(batch)
        return Told(plain.layers, plain.lengths, ((),) * batch)

    def read(
        self, tokens: Tensor, cache: Cache, counts: Tensor | None = None, images: Any = None
    ) -> tuple[Tensor, Cache]:
        assert isinstance(cache, Told) and counts is not None
        hidden, grown = super().read(tokens, cache, counts)
        rows = zip(cache.history, tokens.tolist(), counts.tolist(), strict=True)
        history = tuple((*old, *row[:count]) for old, row, count in rows)
        return hidden, Told(grown.layers, grown.lengths, history)

    def denoise(self, canvas: Tensor, cache: Cache, signal: Tensor | None) -> Tensor:
        assert isinstance(cache, Told)
        written = []
        for history, length in zip(cache.history, cache.lengths.tolist(), strict=True):
            assert len(history) == length
            text = TOKENIZER.decode(history, skip_special=False)
            self.begun[text] += signal is None
            told = self.told(text, self.begun[text] - 1)
            written.append((ids(told) + (self.padding(told) or ids(LOREM)))[:CANVAS])
        best = F.one_hot(torch.tensor(written), VOCAB).float() * 100
        return best + 30 * F.one_hot(torch.tensor(ids("x")), VOCAB)


def whole(text: str) -> Script:
    """A turn that goes on as `text` does, wherever its canvases end; what a budget closed it leaves."""
    return lambda behind, attempt: (text + LOREM).removeprefix(behind.removeprefix("<|channel>thought\n<channel|>"))


class Obedient(Scripted):
    """Does what the last message of a user says, and thinks "I think." first, where it is asked to think.

    | message | answer |
    |---|---|
    | say TEXT | TEXT |
    | call NAME {...} & NAME {...} | the calls with these arguments; once results are there: NAME said RESULT |
    | recall | all turns so far, as [role] text |
    | count N | 1 2 3 ... N |
    | wait TEXT | TEXT, after 0.1 s in each forward |
    | fail TEXT | the first canvas of TEXT; then the network fails |
    | else | You said: ... |
    """

    def __init__(self) -> None:
        super().__init__(lambda behind, attempt: "")

    def told(self, text: str, attempt: int) -> str:
        asked, _, behind = text.rpartition("<|turn>user\n")[2].partition("<turn|>\n<|turn>model\n")
        behind, results = behind.rpartition("<tool_response|>")[2], behind.rpartition("<tool_response|>")[0]
        if "<|think|>" in text and not results:
            thought = "<|channel>thought\nI think.\n<channel|>"
            if "<channel|>" not in behind:
                return thought[len(behind) :] + self._answer(text, asked, results)
        behind = behind.rpartition("<channel|>")[2]
        answer = self._answer(text, asked, results)
        if asked.startswith("fail ") and behind:
            raise EngineError("the network failed", hint="it was asked to")
        calls = answer.count("<tool_call|>")
        if calls and behind.count("<tool_call|>") == calls:  # held to a schema, they may be longer than it was told
            return "<turn|>"
        return answer[len(behind) :]

    def padding(self, told: str) -> list[int]:
        """Only stop ids follow the end of a turn, as in networks that are trained: under a constraint they count."""
        return [EOS] * CANVAS if told.endswith("<turn|>") else []

    def _answer(self, text: str, asked: str, results: str) -> str:
        verb, _, what = asked.partition(" ")
        if verb == "call":
            if results:
                found = re.findall(r'response:([\w.-]+)\{value:(?:<\|"\|>)?(.*?)(?:<\|"\|>)?\}', results, re.S)
                return "; ".join(f"{name} said {said}" for name, said in found) + "<turn|>"
            calls = [call.strip().partition(" ") for call in what.split("&")]
            return (
                "".join(
                    f"<|tool_call>{write_call(name, json.loads(given or '{}'))}<tool_call|>" for name, _, given in calls
                )
                + "<turn|>"
            )
        if verb == "wait":
            time.sleep(0.1)
        if verb == "recall":
            turns = re.findall(r"<\|turn>(\w+)\n(.*?)<turn\|>", text, re.S)
            return " ".join(f"[{role}] {said}" for role, said in turns) + "<turn|>"
        if verb == "count":
            return " ".join(map(str, range(1, int(what) + 1))) + "<turn|>"
        return (what if verb in ("say", "wait", "fail") else f"You said: {asked}") + "<turn|>"


def scripted_model(script: Script, stop_ids: tuple[int, ...] = (EOS,)) -> LM:
    return _model(Scripted(script), stop_ids)


def obedient_model() -> LM:
    return _model(Obedient(), (EOS,))


def _model(network: Network, stop_ids: tuple[int, ...]) -> LM:
    return LM(
        path=Path("scripted"),
        network=network,
        generation=GenerationConfig(stop_ids=stop_ids),
        tokenizer=TOKENIZER,
        answer=run_reference,
    )


def save_seeing(folder: Path, context_length: int = 2048) -> None:
    """A random chat checkpoint that sees: its tower has 48 positions, so that a video's frames fit it too."""
    backend = chat_tokenizer.backend()
    backend.add_special_tokens([tokenizers.AddedToken(p, special=True, normalized=False) for p in PICTURE_TOKENS])
    numbers = {name: backend.token_to_id(name) for name in ("<|image|>", *PICTURE_TOKENS)}
    tiny = PRESETS["tiny"]()
    with patch.dict(weights_vision.MINIMAL_TOWER, {"position_embedding_size": 48}):
        tower, tensors = weights_vision.minimal_vision(0, tiny.hidden_size)
    config = replace(
        tiny,
        vocab_size=backend.get_vocab_size(),
        image_id=numbers["<|image|>"],
        vision=tower,
        context_length=context_length,
        source={
            "boi_token_id": numbers["<|image>"],
            "eoi_token_id": numbers["<image|>"],
            "text_config": {"use_bidirectional_attention": "vision"},
        },
    )
    template = ChatTemplate.own().source
    tokenizer = Tokenizer(backend, config={"bos_token": "<bos>", "eos_token": "<eos>"}, chat_template=template)
    network = make_random_network(config, seed=5)
    save_checkpoint(folder, network, generation=GenerationConfig(), tokenizer=tokenizer, kept=tensors)


def picture(size: tuple[int, int] = (60, 60)) -> str:
    """An image as base64 of a PNG file."""
    noise = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
