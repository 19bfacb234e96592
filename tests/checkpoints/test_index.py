"""Safetensors files that are cut short, changed, doubled or gone: an error of ours, or the same weights as before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpress.checkpoints import load_config, load_network
from blockpress.checkpoints.index import read_index
from blockpress.errors import BlockpressError, CheckpointError, DamagedFile, MissingWeights
from tests.builders.checkpoints import Copied
from tests.builders.files import INDEX, SINGLE, change_json, refusal, same, snapshot, tensors_of

FIRST = "model-00001-of-{:05}.safetensors"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_every_tensor_is_listed_once(single: Path, sharded: Path) -> None:
    assert len(shards(sharded)) > 2
    for folder in (single, sharded):
        found, real = read_index(folder), tensors_of(folder)
        assert found.keys() == real.keys()
        for name, stored in found.items():
            assert (stored.shape, stored.bytes) == (tuple(real[name].shape), real[name].nbytes)
            assert name in load_file(stored.file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_byte_counts_follow_from_types(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, 5, dtype=dtype)}, tmp_path / SINGLE)
    assert read_index(tmp_path)["x"].bytes == 15 * dtype.itemsize


def test_a_single_file_takes_precedence_over_shards(copied: Copied, single: Path) -> None:
    folder = copied(in_shards=True)
    (folder / SINGLE).write_bytes((single / SINGLE).read_bytes())
    assert {stored.file.name for stored in read_index(folder).values()} == {SINGLE}


@pytest.mark.parametrize("name", [SINGLE, "config.json", "model.gguf"])
def test_a_pointer_of_git_lfs_is_named_as_one(name: str, copied: Copied, tmp_path: Path) -> None:
    file = (tmp_path if name == "model.gguf" else copied()) / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    error = refusal(file if name == "model.gguf" else file.parent)
    assert type(error) is DamagedFile and "git lfs pull" in error.hint and name in error.message


def test_json_may_begin_with_a_byte_order_mark(copied: Copied) -> None:
    file = copied() / "config.json"
    plain = load_config(file.parent)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(file.parent) == plain


def test_a_file_truncated_anywhere_is_refused(copied: Copied) -> None:
    file = copied() / SINGLE
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1}
    cuts |= {draw.randrange(len(whole)) for _ in range(20)}
    for cut in sorted(cuts):
        file.write_bytes(whole[:cut])
        error = refusal(file.parent)
        assert type(error) is DamagedFile, cut
        assert "is damaged or cut short" in error.message
        assert SINGLE in error.message
    file.write_bytes(whole + b"\0")
    assert type(refusal(file.parent)) is DamagedFile


def test_a_truncated_shard_is_named(copied: Copied) -> None:
    folder = copied(in_shards=True)
    last = shards(folder)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    error = refusal(folder)
    assert type(error) is DamagedFile
    assert last.name in error.message


@pytest.mark.slow
def test_a_changed_header_is_refused_or_harmless(copied: Copied, single: Path) -> None:
    file = copied() / SINGLE
    whole, weights = file.read_bytes(), dict(load_network(single).state_dict())
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(1)
    refused = 0
    for place in [*range(8), *(draw.randrange(8, header) for _ in range(120))]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            network = load_network(file.parent)
        except CheckpointError:
            refused += 1
        else:
            # A vision tensor's name, the metadata or the filling at the end: nothing that the network takes.
            assert same(dict(network.state_dict()), weights), place
    assert refused > 60


def remove_first(folder: Path) -> None:
    shards(folder)[0].unlink()


def double(folder: Path) -> None:
    first, second = shards(folder)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)


def move_a_tensor(folder: Path) -> None:
    first, second = shards(folder)[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors.pop(name)}, second)
    save_file(tensors, first)


def lose_a_tensor(folder: Path) -> None:
    first = shards(folder)[0]
    tensors = load_file(first)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, first)


def to_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / INDEX, change)


def to_first_place(value: object) -> Callable[[Path], None]:
    def change(data: dict[str, Any]) -> None:
        data["weight_map"][next(iter(data["weight_map"]))] = value

    return to_index(change)


BROKEN: dict[str, tuple[Callable[[Path], Any], type[BlockpressError], str]] = {
    "a shard that is not there": (remove_first, MissingWeights, r"the shard model-00001-of-\d+.safetensors is not in"),
    "no shard and no index": (
        lambda f: [path.unlink() for path in (*shards(f), f / INDEX)],
        MissingWeights,
        "there are no weights",
    ),
    "shards without their index": (lambda f: (f / INDEX).unlink(), MissingWeights, "there are no weights"),
    "a tensor in two shards": (double, DamagedFile, "is in both model-00001.* and model-00002"),
    "a tensor in another shard": (move_a_tensor, MissingWeights, "puts the tensor .* which does not hold it"),
    "a tensor in no shard": (lose_a_tensor, MissingWeights, "puts the tensor .* which does not hold it"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), DamagedFile, "is not JSON"),
    "an index that is a list": (lambda f: (f / INDEX).write_text("[]"), DamagedFile, "holds list"),
    "an index without a map": (to_index(lambda d: d.pop("weight_map")), DamagedFile, "has no weight_map"),
    "an index with an empty map": (to_index(lambda d: d.update(weight_map={})), DamagedFile, "has no weight_map"),
    "an index whose map is a list": (to_index(lambda d: d.update(weight_map=["x"])), DamagedFile, "has no weight_map"),
    "a shard that is a number": (to_first_place(3), DamagedFile, "into 3"),
    "a shard that is nothing": (to_first_place(None), DamagedFile, "into None"),
    "a shard that is a directory": (lambda f: (remove_first(f), (f / "d").mkdir()), MissingWeights, "is not in"),
    "a shard that is a web page": (lambda f: shards(f)[0].write_text("<html>"), DamagedFile, "is damaged"),
}


@pytest.mark.parametrize(("breaks", "kind", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_shards_that_do_not_belong_together_are_refused(
    breaks: Callable[[Path], Any], kind: type[BlockpressError], text: str, copied: Copied
) -> None:
    folder = copied(in_shards=True)
    load_network(folder)
    breaks(folder)
    error = refusal(folder)
    assert type(error) is kind
    with pytest.raises(kind, match=text):
        raise error


OUTSIDE = ["../outside.safetensors", "../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors"]
ODD = ["..\\x.safetensors", "C:x.safetensors", "a\0.safetensors", "..", "", ".", "x.bin", "config.json"]


@pytest.mark.parametrize("place", OUTSIDE + ODD)
def test_an_index_never_leads_out_of_the_directory(place: str, copied: Copied) -> None:
    folder = copied(in_shards=True)
    # Were it followed, the checkpoint would load: the shard is there, and whole.
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(shards(folder)[0].read_bytes())
    first = shards(folder)[0].name
    change_json(
        folder / INDEX,
        lambda d: d.update(weight_map={n: place if file == first else file for n, file in d["weight_map"].items()}),
    )
    before = snapshot(folder)
    error = refusal(folder)
    assert type(error) is DamagedFile
    assert repr(place) in error.message
    assert snapshot(folder) == before


def test_a_link_to_a_shard_is_followed(copied: Copied, sharded: Path) -> None:
    folder = copied(in_shards=True)
    first = shards(folder)[0]
    stored = folder / "blob-0a1b"
    first.rename(stored)
    # The Hub's own cache stores files under their hash and links them.
    first.symlink_to(stored)
    assert first.is_symlink()
    assert same(dict(load_network(folder).state_dict()), dict(load_network(sharded).state_dict()))


def test_other_formats_are_refused_by_name(copied: Copied) -> None:
    folder = copied()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert "safetensors only" in error.hint


def test_an_index_may_have_extra_keys_and_no_metadata(copied: Copied, sharded: Path) -> None:
    folder = copied(in_shards=True)
    data = json.loads((folder / INDEX).read_text())
    assert data.keys() > {"weight_map"}
    (folder / INDEX).write_text(json.dumps({"weight_map": data["weight_map"], "anything": 1}))
    assert same(dict(load_network(folder).state_dict()), dict(load_network(sharded).state_dict()))
