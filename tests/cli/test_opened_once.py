"""A checkpoint is opened once: how often its files are read by `load`, by a chat with pictures, and by the commands.

What is counted are calls of the system's own doors: `open`, by which Python reads, and `safe_open` of safetensors, whose
file nobody else sees. Of a large file it is the header that counts, so a read at its first byte; weights are read from
wherever they lie.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blockpress
from blockpress.checkpoints import index as shards
from blockpress.checkpoints import load_network, save_checkpoint
from blockpress.config import ModelConfig
from blockpress.quantize.convert import convert_checkpoint
from blockpress.quantize.encoders import format_named
from blockpress.text import Tokenizer
from tests.builders.gguf_files import narrow, write_gguf

from .conftest import Call

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
MODELOPT, TOKENIZER = "hf_quant_config.json", "tokenizer_config.json"
WEIGHTS = (".safetensors", ".gguf")

Reads = Callable[[Path], Counter[str]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """`reads(path)`: reads so far of each file of a checkpoint by its name, of weights those of a header."""
    seen: Counter[Path] = Counter()

    class Weights(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == 0:
                seen[Path(os.path.abspath(self.raw.name))] += 1  # type: ignore[attr-defined]
            return super().read(size)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def open(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            if isinstance(file, str | os.PathLike) and mode.startswith("r"):
                if os.fspath(file).endswith(WEIGHTS):
                    return Weights(io.FileIO(file))
                seen[Path(os.path.abspath(file))] += 1
            return real(file, mode, *given, **named)

        return open

    def safe_open(file: Any, *given: Any, **named: Any) -> Any:
        seen[Path(os.path.abspath(file))] += 1
        return library(file, *given, **named)

    library = shards.safe_open
    monkeypatch.setattr(shards, "safe_open", safe_open)
    monkeypatch.setattr(io, "open", watched(io.open))
    monkeypatch.setattr(builtins, "open", watched(builtins.open))

    def so_far(path: Path) -> Counter[str]:
        return Counter({file.name: count for file, count in seen.items() if path in (file, file.parent)})

    return so_far


@pytest.fixture(scope="module")
def in_shards(seeing: Path, workspace: Path) -> Path:
    """The checkpoint that chats and sees, in shards."""
    path, network, generation = workspace / "once-sharded", load_network(seeing), blockpress.load(seeing).generation
    tokenizer = Tokenizer.from_directory(seeing)
    save_checkpoint(
        path, network, generation=generation, tokenizer=tokenizer, kept_from=seeing, shard_bytes=40_000
    )  # fmt: skip
    assert len(weights(path)) > 2
    return path


@pytest.fixture(scope="module")
def packed(seeing: Path, workspace: Path) -> Path:
    """The same in FP8, in shards."""
    path = workspace / "once-packed"
    convert_checkpoint(seeing, path, format_named("fp8"), shard_bytes=40_000)
    return path


@pytest.fixture(params=["seeing", "in_shards", "packed"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def gguf(tiny: ModelConfig, workspace: Path) -> Path:
    file = workspace / "once" / "x.gguf"
    file.parent.mkdir()
    write_gguf(file, narrow(tiny))
    return file


def weights(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.safetensors")]


def said_once(found: Counter[str], folder: Path, *, generation: int = 1, tokenizer: int = 1) -> None:
    """What says what the checkpoint is was read once: `found` are the reads."""
    assert (found[CONFIG], found[GENERATION], found[TOKENIZER]) == (1, generation, tokenizer)
    assert found[INDEX] == (folder / INDEX).is_file()
    assert found[MODELOPT] <= 1


def headers(found: Counter[str], folder: Path) -> set[int]:
    """How often the header of a file of weights was read; of several files, each number that there is."""
    return {found[name] for name in weights(folder)}


def test_load_opens_files_once(folder: Path, reads: Reads) -> None:
    blockpress.load(folder)
    said_once(reads(folder), folder)
    # Names and shapes, of all files before the first weight; and the library's own, when it opens a file to read it.
    assert headers(reads(folder), folder) == {2}


def test_load_opens_modelopt_files_once(packed: Path, tmp_path: Path, reads: Reads) -> None:
    """Its own file, in which it says how, is read once as well."""
    (tmp_path / MODELOPT).write_text('{"quantization": {"quant_algo": "FP8"}}')
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / CONFIG).read_text().replace('"quantization_config"', '"said_elsewhere"')
    (tmp_path / CONFIG).write_text(config)
    before = reads(tmp_path)
    blockpress.load(tmp_path)
    found = reads(tmp_path)
    found.subtract(before)
    said_once(found, tmp_path)
    assert found[MODELOPT] == 1


def test_pictures_open_files_once(folder: Path, reads: Reads) -> None:
    lm = blockpress.load(folder)
    loaded = reads(folder)
    picture = Image.fromarray(np.zeros((48, 48, 3), np.uint8))
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    for _ in range(2):
        lm.chat(talk, max_tokens=2, soft_tokens=70)
    said_once(reads(folder), folder)
    # The library opens the files that hold the tower once more.
    again = reads(folder)
    again.subtract(loaded)
    assert headers(again, folder) in ({1}, {0, 1})


def test_run_opens_files_once(folder: Path, call: Call, reads: Reads) -> None:
    done = call("run", folder, "Hi", "--system", "Be short.", "--max-tokens", 2)
    assert done.code == 0, done.err
    said_once(reads(folder), folder)
    assert headers(reads(folder), folder) == {2}


def test_show_opens_files_once(folder: Path, call: Call, reads: Reads) -> None:
    assert call("show", folder).code == 0
    said_once(reads(folder), folder, tokenizer=0)
    assert headers(reads(folder), folder) == {1}


@pytest.mark.parametrize("name", ["seeing", "in_shards"])
def test_quantize_opens_files_once(
    name: str, request: pytest.FixtureRequest, call: Call, reads: Reads, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    done = call("quantize", folder, tmp_path / "plain", "--format", "int8", "--no-report")
    assert done.code == 0, done.err
    # Generation and tokenizer are copied, and that is all.
    said_once(reads(folder), folder)
    # Names and shapes; and where each tensor lies, which the library does not say, so we read it ourselves.
    assert headers(reads(folder), folder) == {2}


def test_quantize_with_a_report_opens_files_once(seeing: Path, call: Call, reads: Reads, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("quantize", seeing, out, "--format", "int8", "--samples", 1)
    assert done.code == 0 and "step 1: KL" in done.out, done.err
    # Both are copied, and then read for the report, which loads the network: the library opens the weights once more.
    said_once(reads(seeing), seeing, generation=2, tokenizer=2)
    assert headers(reads(seeing), seeing) == {3}
    said_once(reads(out), out)
    assert headers(reads(out), out) == {2}


@pytest.mark.parametrize("command", ["load", "run", "show"])
def test_a_hub_model_s_files_are_opened_once(
    command: str, in_shards: Path, call: Call, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a download is whole is seen from its index, which is then handed on."""
    snapshot = tmp_path / "models--me--some-model" / "snapshots" / ("a" * 40)
    shutil.copytree(in_shards, snapshot)
    (tmp_path / "models--me--some-model" / "refs").mkdir()
    (tmp_path / "models--me--some-model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    before = reads(snapshot)
    if command == "load":
        blockpress.load("me/some-model")
    else:
        done = call(command, "me/some-model", *(("Hi", "--max-tokens", 2) if command == "run" else ()))
        assert done.code == 0, done.err
    found = reads(snapshot)
    found.subtract(before)
    said_once(found, snapshot, tokenizer=command != "show")


@pytest.mark.parametrize("command", ["load", "run", "chat", "show"])
def test_a_gguf_file_is_opened_once(command: str, gguf: Path, call: Call, reads: Reads) -> None:
    if command == "load":
        blockpress.load(gguf)
    else:
        options = {"run": ("run", gguf, "abc", "--raw"), "chat": ("run", gguf, "abc"), "show": ("show", gguf)}[command]
        more = ("--max-tokens", 2) if command != "show" else ()
        done = call(*options, *more)
        assert done.code == 0, done.err
    assert reads(gguf) == {"x.gguf": 1}
