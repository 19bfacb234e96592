"""One door to a checkpoint, whatever its form: a directory, a GGUF file, a directory that holds one."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

import blockpress
from blockpress.config import ModelConfig
from blockpress.errors import BlockpressError, CheckpointError, ModelNotFound
from blockpress.model.layers import packed_weights
from blockpress.weights import open_checkpoint

from .gguf_files import wide, write_gguf


def test_a_gguf_file_is_a_model(tiny: ModelConfig, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file, wide(tiny), Type.Q8_0, keys={"diffusion.eb_max_steps": 6})
    lm = blockpress.load(file)
    assert lm.path == file
    assert (lm.config, lm.generation.sampling.steps) == (open_checkpoint(file).config, 6)
    assert any(packed_weights(module) for module in lm.network.modules())
    replies = [lm.generate("abc ab<turn|>", max_tokens=20, seed=5)]
    # The directory that holds it alone goes by its name, too.
    replies.append(blockpress.load(tmp_path).generate("abc ab<turn|>", max_tokens=20, seed=5))
    assert replies[0] == replies[1] and 0 < len(replies[0].tokens) <= 20
    with pytest.raises(BlockpressError):
        lm.chat([{"role": "user", "content": [{"type": "image", "image": b""}]}])


def test_a_directory_is_a_model() -> None:
    checkpoint = open_checkpoint("sudoku-nano")
    assert checkpoint.gguf is None
    assert checkpoint.config == blockpress.load("sudoku-nano").config
    assert checkpoint.tokenizer() is not None


def test_what_is_neither_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing-like-it"):
        open_checkpoint("nothing-like-it")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_checkpoint(tmp_path)
