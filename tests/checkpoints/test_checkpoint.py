"""One door to a checkpoint, whatever its form: a directory, a GGUF file, a directory that holds one."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

import blockpress
from blockpress.checkpoints import Checkpoint, load_network, open_checkpoint
from blockpress.config import ModelConfig
from blockpress.errors import BlockpressError, CheckpointError, DamagedFile, MissingWeights, ModelNotFound
from blockpress.model.layers import packed_weights
from tests.builders.checkpoints import Copied
from tests.builders.files import figures
from tests.builders.gguf_files import wide, write_gguf

MODELS = Path(blockpress.__file__).parent / "models"


def test_a_gguf_file_is_opened_as_a_checkpoint(tiny: ModelConfig, tmp_path: Path) -> None:
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


def test_a_directory_is_opened_as_a_checkpoint() -> None:
    checkpoint = open_checkpoint("sudoku-nano")
    assert checkpoint.gguf is None
    assert checkpoint.config == blockpress.load("sudoku-nano").config
    assert checkpoint.tokenizer() is not None


def test_an_open_checkpoint_loads_without_its_path(single: Path, tiny: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", wide(tiny), Type.Q8_0)
    for place in (single, tmp_path / "x.gguf"):
        opened = open_checkpoint(place)
        assert opened.tokenizer() is opened.tokenizer()
        assert bool(opened.tokenizer()) == opened.has_tokenizer
        one, other, third = blockpress.load(opened).network, blockpress.load(place).network, load_network(place)
        assert one.config == other.config == third.config == opened.config
        assert torch.equal(figures(one), figures(other)) and torch.equal(figures(one), figures(third))
    longer = replace(opened.config, context_length=512)
    assert load_network(opened, config=longer).config is longer


def test_opening_reads_lazily(copied: Copied, single: Path) -> None:
    """What is damaged is said by who needs it: a config, while the weights are gone, and the other way round."""
    folder = copied()
    (folder / "model.safetensors").unlink()
    opened = open_checkpoint(folder)
    assert opened.config == open_checkpoint(single).config
    with pytest.raises(MissingWeights, match="there are no weights"):
        blockpress.load(opened)
    (folder / "config.json").unlink()
    assert opened.config.vocab_size == 64, "it is what it was when it was opened"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(path=folder).checked()


ODD = [b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b"true", b'"x"', b'"\\ud800"', b"[" * 5000, b"9" * 30, b"\xff"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
def test_whatever_is_in_a_file_is_read_or_refused_by_name(data: st.DataObject, name: str) -> None:
    """Cut, a byte changed, a value of another kind, a key renamed."""
    whole = (MODELS / "sudoku-nano" / name).read_bytes()
    values = list(re.finditer(rb'(?<=[:\[,]) *("[^"]*"|-?[\d.e-]+|true|false|null)', whole))
    at, value = data.draw(st.integers(0, len(whole))), data.draw(st.sampled_from(values))
    changed = data.draw(
        st.sampled_from([
            whole[:at],
            whole[:at] + data.draw(st.binary(min_size=1, max_size=1)) + whole[at + 1 :],
            whole[: value.start()] + data.draw(st.sampled_from(ODD)) + whole[value.end() :],
            whole.replace(data.draw(st.sampled_from([b'"t_m', b'_token"', b'size"', b'layers"'])), b'"zz'),
        ])
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(MODELS / "sudoku-nano", folder, dirs_exist_ok=True)
        (Path(folder) / name).write_bytes(changed)
        with contextlib.suppress(BlockpressError):
            checkpoint = Checkpoint(path=Path(folder)).checked()
            assert checkpoint.tokenizer() is not None and checkpoint.config.num_heads > 0


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ['{"bos_token": "\\ud800"}', "[" * 100_000])
def test_text_that_no_vocabulary_holds_is_a_damaged_file(name: str, text: str, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "sudoku-nano", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    (tmp_path / "model" / name).write_text(text)
    with pytest.raises(DamagedFile, match=r"bos_token|is not JSON"):
        blockpress.load(tmp_path / "model")


def test_what_torch_says_of_values_is_said_of_the_tensor(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("self.stride(-1) must be 1\nException raised from ...")

    monkeypatch.setattr("blockpress.checkpoints.safetensors.load._take", refuse)
    with pytest.raises(DamagedFile, match=r"^the tensor \S+ cannot be read: self.stride\(-1\) must be 1 \(hint"):
        blockpress.load(single)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_is_named_at_every_access(name: str, copied: Copied) -> None:
    folder = copied()
    (folder / name).write_text("{")
    opened = Checkpoint(path=folder)
    for _ in range(2):
        with pytest.raises(DamagedFile, match=name) as caught:
            blockpress.load(opened)
        assert "fetch the file again" in caught.value.hint


def test_neither_directory_nor_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing-like-it"):
        open_checkpoint("nothing-like-it")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_checkpoint(tmp_path)
