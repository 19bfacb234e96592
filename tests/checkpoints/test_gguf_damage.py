"""Damaged GGUF files: an error of ours or the same weights, never a crash, a hang or a gigabyte."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from blockpress.checkpoints.gguf.header import read_bytes, read_header
from blockpress.checkpoints.gguf.load import open_gguf
from blockpress.config import ModelConfig
from blockpress.errors import CheckpointError, ConfigError, DamagedFile
from tests.builders.gguf_files import narrow, write_gguf
from tests.forks import python

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tiny: ModelConfig, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "x.gguf", narrow(tiny), lambda ours: Type.F32 if "norm" in ours else Type.Q8_0)
    return tmp_path / "x.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's address-space limit")
def test_random_damage_is_refused_or_harmless(file: Path) -> None:
    done = subprocess.run(
        [*python(), "-m", "tests.builders.gguf_breaker", str(file), "60", "1"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert found.keys() <= {"refused", "loaded"}, found
    assert len(found["refused"]) > 100


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", DamagedFile, "the header ends within the magic number"),
        (b"PK\3\4" * 9, DamagedFile, "does not begin with GGUF"),
        (b"GGUF\1\0\0\0" + bytes(16), CheckpointError, "version 1"),
        (b"GGUF\0\0\0\3" + bytes(16), CheckpointError, "version 50331648"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, DamagedFile, "announces"),
    ],
)
def test_other_file_formats_are_refused(data: bytes, error: type[CheckpointError], words: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(error) as caught:
        open_gguf(tmp_path / "x.gguf")
    assert type(caught.value) is error
    assert words in caught.value.message


def test_a_file_that_shrinks_while_it_is_read_is_refused(file: Path) -> None:
    header = read_header(file)
    last = max(header.tensors.values(), key=lambda tensor: tensor.start)
    with file.open("r+b") as stream:
        stream.truncate(last.start + 1)
        with pytest.raises(DamagedFile, match=f"ends within the tensor {last.name}"):
            read_bytes(stream, last, file)


def test_a_file_cut_short_is_refused_by_its_header(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: max(tensor.start for tensor in read_header(file).tensors.values())])
    with pytest.raises(DamagedFile, match=r"ends at byte \d+ of \d+"):
        open_gguf(file)


def test_tensors_must_be_contiguous(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.index(b"blk.1.attn_k.weight") + len(b"blk.1.attn_k.weight") + 4 + 2 * 8 + 4
    data[place + 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"the tensor blk\.1\.attn_k\.weight is at \d+, where"):
        open_gguf(file)


def test_an_absurd_layer_count_is_refused_at_once(tiny: ModelConfig, tmp_path: Path) -> None:
    keys = {"block_count": 1_000_000, "attention.sliding_window_pattern": 6, "attention.head_count_kv": 1}
    write_gguf(tmp_path / "x.gguf", narrow(tiny), keys=keys)
    with pytest.raises(ConfigError, match="block_count is 1000000"):
        open_gguf(tmp_path / "x.gguf")


def test_a_false_length_names_its_key(file: Path) -> None:
    """What sends the package's own reader to allocate without end."""
    data = bytearray(file.read_bytes())
    place = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    data[place + 5] = 1
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"the header ends within tokenizer\.ggml\.scores"):
        open_gguf(file)
