"""Where the disk is full, what is written is an error that names path and bytes, and the older file is as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpress.checkpoints import resolve, save_checkpoint
from blockpress.cli.animate import save
from blockpress.config import PRESETS, GenerationConfig
from blockpress.errors import BlockpressError
from blockpress.hardware import append_line, whole_file
from blockpress.quantize.convert import add_to_report, convert_checkpoint
from blockpress.quantize.encoders import format_named
from blockpress.quantize.synthetic import synthesize
from tests.conftest import FileLimit, RandomNetwork


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_text(path: Path) -> None:
    with whole_file(path / "file.txt", need=5000) as part:
        part.write_text("x" * 5000)


WRITERS: dict[str, Callable[[Path], object]] = {
    "quantize": lambda path: convert_checkpoint(resolve("sudoku-nano"), path, format_named("int4")),
    "synthesize": lambda path: synthesize("tiny", path, seed=1),
    "record": lambda path: save(path / "canvas.svg", "<svg>" * 2000),
    "any file": write_text,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_with_path_and_bytes(name: str, tmp_path: Path, file_limit: FileLimit) -> None:
    path = tmp_path / "out"
    for older in (False, True):
        if older:
            WRITERS[name](path)
        before = content(tmp_path)
        for room in (4000, 1):
            with file_limit(room), pytest.raises(BlockpressError) as caught:
                WRITERS[name](path)
            assert str(path) in caught.value.message
            said = caught.value.message
            assert re.search(r"cannot be written: .*; it takes [\d,]+ bytes, and [\d,]+ bytes are free there", said)
            assert content(tmp_path) == before and ("out" not in before or path.exists())


def test_a_checkpoint_that_fails_leaves_the_older_one(
    tmp_path: Path, file_limit: FileLimit, random_network: RandomNetwork
) -> None:
    network = random_network(PRESETS["tiny"]())
    save_checkpoint(tmp_path, network, generation=GenerationConfig())
    before = content(tmp_path)
    with file_limit(10_000), pytest.raises(BlockpressError, match=r"cannot be written: .*; it takes [\d,]+ bytes"):
        save_checkpoint(tmp_path, network, generation=GenerationConfig())
    assert content(tmp_path) == before


def test_a_report_is_added_as_a_whole(tmp_path: Path, file_limit: FileLimit) -> None:
    (tmp_path / "quantization.json").write_text('{"a": 1}')
    with file_limit(20), pytest.raises(BlockpressError, match=r"quantization\.json cannot be written"):
        add_to_report(tmp_path, "report", {"b": "x" * 100})
    assert (tmp_path / "quantization.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("room", [0, 3, 6, 9])
def test_a_line_is_appended_as_a_whole(room: int, tmp_path: Path, file_limit: FileLimit) -> None:
    file = tmp_path / "log"
    file.write_text("one\n")
    with file_limit(room), pytest.raises(BlockpressError, match="it takes 7 bytes"):
        append_line(file, "second")
    assert file.read_text() == "one\n"
    append_line(file, "second")
    assert file.read_text() == "one\nsecond\n"
