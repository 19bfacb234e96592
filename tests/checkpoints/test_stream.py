"""Streamed safetensors files: what the library reads is what was written, however it was cut and sharded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from blockpress.checkpoints.index import read_index
from blockpress.checkpoints.safetensors.stream import CODES, Slot, StreamReader, streamed
from blockpress.errors import DamagedFile, RequestError
from tests.builders.files import INDEX, SINGLE, same, tensors_of

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


@given(
    kinds=st.lists(st.tuples(SHAPES, st.sampled_from(sorted(CODES, key=str))), min_size=1, max_size=8),
    shard_bytes=st.integers(1, 4000),
    order=st.randoms(use_true_random=False),
)
def test_safetensors_reads_what_was_written(
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
    shard_bytes: int,
    order: object,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    tensors = {f"t{i}": drawn(shape, dtype, i) for i, (shape, dtype) in enumerate(kinds)}
    slots = [Slot(name=name, code=CODES[t.dtype], shape=tuple(t.shape)) for name, t in tensors.items()]
    with streamed(folder, slots, shard_bytes) as writer:
        names = list(tensors)
        order.shuffle(names)  # type: ignore[attr-defined]
        for name in names:
            tensor = tensors[name]
            for piece in tensor.split(2) if tensor.ndim else [tensor]:
                writer.write(name, piece)
    assert same(tensors_of(folder), tensors)
    assert set(read_index(folder)) == set(tensors)
    for name, stored in read_index(folder).items():
        with StreamReader(stored.file) as reader:
            assert same({name: reader.read(name)}, {name: tensors[name]})
            if stored.shape and stored.shape[0] > 1:
                assert same({name: reader.read(name, 1, 3)}, {name: tensors[name][1:3]})
    files = sorted(folder.glob("*.safetensors"))
    assert (folder / INDEX).is_file() == (len(files) > 1) == (not (folder / SINGLE).is_file())
    for file in files:
        header = file.read_bytes()
        size = int.from_bytes(header[:8], "little")
        entries = {n: e for n, e in json.loads(header[8 : 8 + size]).items() if n != "__metadata__"}
        total = sum(tensors[name].nbytes for name in entries)
        assert total <= shard_bytes or len(entries) == 1
        for name, entry in entries.items():
            start = 8 + size + entry["data_offsets"][0]
            assert start % tensors[name].itemsize == 0, "readers that map a file need aligned values"
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_writing_too_few_or_too_many_bytes_is_an_assertion(tmp_path: Path) -> None:
    slots = [Slot(name="a", code="F32", shape=(4,))]
    with pytest.raises(AssertionError, match="a among them"), streamed(tmp_path, slots) as writer:
        writer.write("a", torch.ones(3))
    with pytest.raises(AssertionError, match="more bytes"), streamed(tmp_path, slots) as writer:
        writer.write("a", torch.ones(5))


@pytest.mark.parametrize("shard_bytes", [0, -1])
def test_an_invalid_shard_size_is_refused(shard_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="shard_bytes"), streamed(tmp_path, [], shard_bytes):
        pass


def test_a_file_that_is_cut_short_under_the_reader_is_an_error(tmp_path: Path) -> None:
    many = 1 << 18  # more than a reader may hold in a buffer of its own
    with streamed(tmp_path, [Slot(name="a", code="F32", shape=(many,))]) as writer:
        writer.write("a", torch.ones(many))
    with StreamReader(tmp_path / SINGLE) as reader:
        with (tmp_path / SINGLE).open("rb+") as file:
            file.truncate((tmp_path / SINGLE).stat().st_size - 4)
        assert bool((reader.read("a", 0, many - 1) == 1).all())
        with pytest.raises(DamagedFile, match="lacks rows of a"):
            reader.read("a")
