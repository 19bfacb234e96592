"""Saving: what is written, what is left alone, and that an older checkpoint is never half replaced."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from blockpress.checkpoints import load_config, load_network, minimal_vision, save_checkpoint
from blockpress.checkpoints.safetensors import save
from blockpress.checkpoints.safetensors.vision import PROJECTION
from blockpress.config import Family, GenerationConfig, LayerConfig, ModelConfig
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    MissingWeights,
    RequestError,
    ShapeMismatch,
    UnexpectedWeights,
)
from blockpress.model import Network
from blockpress.text import Tokenizer
from blockpress.text.builder import write_digits_tokenizer
from tests.builders.checkpoints import Copied
from tests.builders.files import INDEX, SINGLE, change_json, same, snapshot, tensors_of
from tests.conftest import RandomNetwork

GENERATION = GenerationConfig()
SHARD = 30_000


@pytest.fixture
def blind(tiny: ModelConfig, random_network: RandomNetwork) -> Network:
    """A network without a vision tower."""
    return random_network(tiny, 2)


@pytest.fixture
def network(seeing: ModelConfig, random_network: RandomNetwork) -> Network:
    return random_network(seeing, 2)


def test_a_small_network_is_one_file_marked_pt(blind: Network, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "model", blind, generation=GENERATION)
    folder = tmp_path / "new" / "model"
    assert sorted(snapshot(folder)) == ["config.json", "generation_config.json", SINGLE]
    with safe_open(folder / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(dict(load_network(folder).state_dict()), dict(blind.state_dict()))


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
def test_files_have_the_mode_of_the_umask(blind: Network, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_checkpoint(tmp_path, blind, generation=GENERATION, shard_bytes=SHARD)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("shard_bytes", [1, 10_000, SHARD])
def test_shards_respect_their_size_and_the_index_lists_all_tensors(
    shard_bytes: int, blind: Network, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, blind, generation=GENERATION, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    total = 0
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            sizes = {name: shard.get_tensor(name).nbytes for name in shard.keys()}  # noqa: SIM118
        assert {name for name, place in index["weight_map"].items() if place == file.name} == sizes.keys()
        assert sum(sizes.values()) <= shard_bytes or len(sizes) == 1
        total += sum(sizes.values())
    assert index["metadata"]["total_size"] == total
    assert same(dict(load_network(tmp_path).state_dict()), dict(blind.state_dict()))


def test_the_same_network_gives_the_same_bytes(blind: Network, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, blind, generation=GENERATION, shard_bytes=SHARD)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_a_network_in_training_is_saved_unchanged(blind: Network, tmp_path: Path) -> None:
    blind.train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in blind.state_dict().items()}
    save_checkpoint(tmp_path, blind, generation=GENERATION, dtype=torch.bfloat16)
    assert blind.training
    assert blind.norm.weight.requires_grad
    assert same(dict(blind.state_dict()), before)
    assert load_config(tmp_path).dtype == "bfloat16"


def test_shared_scalars_are_written_twice(blind: Network, tmp_path: Path) -> None:
    blind.layers[0].causal_scalar = blind.layers[0].layer_scalar
    save_checkpoint(tmp_path, blind, generation=GENERATION)
    assert torch.equal(load_network(tmp_path).layers[0].causal_scalar, blind.layers[0].layer_scalar)


def test_unknown_config_fields_are_kept(copied: Copied, tmp_path: Path) -> None:
    folder = copied()
    change_json(
        folder / "config.json", lambda d: (d.update(note="kept"), d["text_config"].update(dtype="float32", a=1))
    )
    network = load_network(folder, dtype="bfloat16")
    save_checkpoint(tmp_path / "again", network, generation=GENERATION, kept_from=folder)
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (data["note"], data["text_config"]["a"]) == ("kept", 1)
    assert (data["dtype"], data["text_config"]["dtype"]) == ("bfloat16", "bfloat16")


def test_layers_of_one_kind_may_differ(tiny: ModelConfig, random_network: RandomNetwork, tmp_path: Path) -> None:
    two = LayerConfig(kind="full_attention", head_dim=16, kv_heads=2)
    network = random_network(replace(tiny, layers=(two, *tiny.layers)), 2)
    save_checkpoint(tmp_path, network, generation=GENERATION)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())["text_config"]
    again = load_network(tmp_path)
    assert again.config == network.config
    assert same(dict(again.state_dict()), dict(network.state_dict()))


def test_tokenizer_and_image_processor_are_copied(network: Network, copied: Copied, tmp_path: Path) -> None:
    source = copied()
    write_digits_tokenizer(source)
    (source / "processor_config.json").write_text('{"image_seq_length": 280}')
    tokenizer = Tokenizer.from_directory(source)
    save_checkpoint(tmp_path / "out", network, generation=GENERATION, tokenizer=tokenizer, kept_from=source)
    written, expected = snapshot(tmp_path / "out"), snapshot(source)
    assert written.keys() == expected.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert written[name] == expected[name]
    assert Tokenizer.from_directory(tmp_path / "out").encode("53") == tokenizer.encode("53")


@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9], ids=["to shards", "to one file"])
@pytest.mark.parametrize("in_shards", [True, False], ids=["from shards", "from one file"])
def test_a_checkpoint_is_replaced_by_what_was_loaded_from_it(
    in_shards: bool, shard_bytes: int, copied: Copied, single: Path
) -> None:
    folder = copied(in_shards)
    (folder / "notes.txt").write_text("stays")
    network = load_network(folder)
    with torch.no_grad():
        network.norm.weight.add_(1)
    save_checkpoint(folder, network, generation=GENERATION, kept_from=folder, shard_bytes=shard_bytes)
    assert (folder / INDEX).exists() == (shard_bytes == SHARD)
    assert (folder / SINGLE).exists() == (shard_bytes != SHARD)
    assert (folder / "notes.txt").read_text() == "stays"
    assert not list(folder.glob(".saving-*"))
    expected = tensors_of(single)
    expected["model.decoder.norm.weight"] += 1
    assert same(tensors_of(folder), expected), "no shard of the old checkpoint is left"
    assert same(dict(load_network(folder).state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "interrupt"],
)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failed_save_leaves_the_old_checkpoint(
    call: int, error: BaseException, kind: type[BaseException], copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(in_shards=True)
    network, before = load_network(folder), snapshot(folder)
    real, calls = save.save_file, 0

    def break_off(tensors: dict[str, Tensor], path: Path, **rest: Any) -> None:
        nonlocal calls
        calls += 1
        real(tensors, path, **rest)
        if calls == call:
            path.write_bytes(path.read_bytes()[:100])
            raise error

    monkeypatch.setattr(save, "save_file", break_off)
    with pytest.raises(kind):
        save_checkpoint(folder, network, generation=GENERATION, kept_from=folder, shard_bytes=SHARD)
    assert calls == call
    assert snapshot(folder) == before


@pytest.mark.parametrize("call", [1, 3])
def test_a_save_cut_off_between_the_renames_is_no_checkpoint_and_can_be_finished_by_hand(
    call: int, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(in_shards=True)
    network = load_network(folder)
    with torch.no_grad():
        network.norm.weight.add_(1)
    real, calls = os.replace, 0

    def cut_off(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(CheckpointError, match="cannot be moved") as caught:
        save_checkpoint(folder, network, generation=GENERATION, kept_from=folder, shard_bytes=SHARD)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_network(folder)
    (staged,) = folder.glob(".saving-*")
    assert str(staged) in caught.value.hint
    for file in staged.iterdir():
        real(file, folder / file.name)
    assert same(dict(load_network(folder).state_dict()), dict(network.state_dict()))


def test_an_unwritable_path_is_named(blind: Network, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_checkpoint(path, blind, generation=GENERATION)
    assert (tmp_path / "file").read_text() == ""


VISION, KEPT = minimal_vision(0, 32)
WRONG: dict[str, tuple[dict[str, Any], type[BlockpressError], str]] = {
    "no vision tensors": ({}, MissingWeights, "no tensors for it"),
    "one missing": ({"kept": {n: t for n, t in KEPT.items() if n != PROJECTION}}, MissingWeights, PROJECTION),
    "one too many": ({"kept": KEPT | {PROJECTION + "2": torch.ones(1)}}, UnexpectedWeights, PROJECTION + "2"),
    "a weight of the stack": (
        {"kept": KEPT | {"model.decoder.norm.weight": torch.ones(32)}},
        UnexpectedWeights,
        "norm",
    ),
    "a wrong shape": ({"kept": KEPT | {PROJECTION: torch.ones(32, 9)}}, ShapeMismatch, r"\[32, 9\].*\[32, 8\]"),
    "two sources": ({"kept": KEPT, "kept_from": "x"}, RequestError, "both"),
    "a source that is none": ({"kept_from": "/nowhere"}, CheckpointError, "/nowhere"),
    "no bytes a shard": ({"kept": KEPT, "shard_bytes": 0}, RequestError, "shard_bytes is 0"),
    "a type that is none": ({"kept": KEPT, "dtype": "int4"}, RequestError, "'int4'"),
    "a type to run in that is none": ({"kept": KEPT, "run_dtype": torch.int8}, RequestError, "int8"),
}


@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG.values(), ids=WRONG.keys())
def test_invalid_arguments_are_refused_before_anything_is_written(
    arguments: dict[str, Any], kind: type[BlockpressError], text: str, network: Network, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        save_checkpoint(tmp_path / "out", network, generation=GENERATION, **arguments)
    assert not (tmp_path / "out").exists()


def test_vision_tensors_need_a_config_that_names_their_tower(blind: Network, single: Path, tmp_path: Path) -> None:
    for source in ({"kept": KEPT}, {"kept_from": single}):
        with pytest.raises(UnexpectedWeights, match="16 vision tensors"):
            save_checkpoint(tmp_path, blind, generation=GENERATION, **source)
    seeing = replace(blind.config, vision=VISION)
    save_checkpoint(tmp_path, blind, generation=GENERATION, kept_from=single, config=seeing)
    assert load_config(tmp_path).vision == seeing.vision and blind.config.vision is None


def test_a_text_only_copy_stays_text_only(network: Network, copied: Copied, tmp_path: Path) -> None:
    folder = copied()
    blind = load_network(folder, config=replace(network.config, vision=None))
    save_checkpoint(tmp_path / "blind", blind, generation=GENERATION)
    save_checkpoint(
        tmp_path / "again", load_network(tmp_path / "blind"), generation=GENERATION, kept_from=tmp_path / "blind"
    )
    assert not any("vision" in name for name in tensors_of(tmp_path / "again"))


@pytest.mark.parametrize("family", ["gemma4", "gemma4_text"])
def test_the_sibling_is_saved_under_its_own_names(
    family: Family, tiny: ModelConfig, random_network: Any, tmp_path: Path
) -> None:
    config = replace(tiny, family=family, canvas_length=1, image_id=None)
    network = random_network(config, seed=6)
    save_checkpoint(tmp_path, network, generation=GenerationConfig(has_canvas=False))
    again = load_network(tmp_path)
    assert again.config.family == family
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
