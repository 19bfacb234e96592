"""GGUF files: every layout runs as the values that the `gguf` package reads; what does not fit is refused by name."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from blockpress.checkpoints import load_picture_settings, load_vision
from blockpress.checkpoints.files import find_gguf
from blockpress.checkpoints.gguf import header, load
from blockpress.checkpoints.gguf.load import load_gguf_network, open_gguf
from blockpress.config import LayerConfig, ModelConfig
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    ConfigError,
    MissingWeights,
    RequestError,
    ShapeMismatch,
    UnexpectedWeights,
)
from blockpress.lm import LM
from blockpress.model.layers import packed_weights
from tests.builders.files import check_runs_as, figures
from tests.builders.gguf_files import encode, narrow, refusal, weights_of, wide, write_gguf
from tests.forks import python

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def config(tiny: ModelConfig) -> ModelConfig:
    return wide(tiny)


@pytest.fixture(scope="module")
def small(tiny: ModelConfig) -> ModelConfig:
    return narrow(tiny)


@pytest.mark.parametrize(
    "kind",
    [
        Type.F32,
        Type.Q8_0,
        Type.Q4_K,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                Type.F16,
                Type.BF16,
                Type.Q4_0,
                Type.Q4_1,
                Type.Q5_0,
                Type.Q5_1,
                Type.Q5_K,
                Type.Q6_K,
            )
        ),
    ],
    ids=lambda kind: kind.name,
)
def test_a_gguf_network_computes_what_its_values_compute(kind: Type, config: ModelConfig, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "x.gguf", config, kind)
    network = load_gguf_network(tmp_path / "x.gguf", dtype="float32")
    ours, theirs = weights_of(network), truth.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    check_runs_as(network, truth)
    packed = kind not in (Type.F32, Type.F16, Type.BF16)
    assert bool(packed_weights(network.embed_tokens)) == packed
    assert set(packed_weights(network.layers[0].experts)) == ({"gate_up_proj", "down_proj"} if packed else set())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.IQ4_XS], ids=lambda kind: kind.name)
def test_other_types_are_unpacked_by_the_package(kind: Type, config: ModelConfig, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "x.gguf", config, kind)
    network = load_gguf_network(tmp_path / "x.gguf", dtype="float32")
    assert all(torch.equal(value, truth.state_dict()[name]) for name, value in weights_of(network).items())
    check_runs_as(network, truth)


@pytest.mark.slow
def test_without_the_package_its_extra_is_named(config: ModelConfig, tmp_path: Path) -> None:
    """Layouts of our own need no package; the others say which extra to install."""
    write_gguf(tmp_path / "ours.gguf", config, Type.Q4_K)
    write_gguf(tmp_path / "other.gguf", config, Type.IQ4_XS)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from blockpress.checkpoints.gguf.load import load_gguf_network\n"
        "load_gguf_network(sys.argv[1]); print('loaded')\n"
        "load_gguf_network(sys.argv[2])"
    )
    done = subprocess.run(
        [*python(), "-c", code, str(tmp_path / "ours.gguf"), str(tmp_path / "other.gguf")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "loaded\n"
    assert "CheckpointError: the tensor token_embd.weight has the type 23" in done.stderr
    assert "pip install 'blockpress[gguf]'" in done.stderr


def test_types_are_mixed_as_in_published_files(config: ModelConfig, tmp_path: Path) -> None:
    """Q4_K_M of the published model: Q6_K embedding, float32 router, Q5_0 and Q8_0 where rows are no K blocks."""

    def kind(ours: str) -> Type:
        table = {"embed": Type.Q6_K, "router": Type.F32, "experts.down": Type.Q5_0, "mlp.down": Type.Q8_0}
        return next((found for part, found in table.items() if part in ours), Type.Q4_K)

    truth = write_gguf(tmp_path / "x.gguf", config, kind)
    network = load_gguf_network(tmp_path / "x.gguf", dtype="float32")
    check_runs_as(network, truth)
    assert isinstance(network.layers[0].router.proj.weight, torch.nn.Parameter)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_gate_and_up_may_be_stored_apart(kind: Type, config: ModelConfig, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "x.gguf", config, kind, apart=True)
    network = load_gguf_network(tmp_path / "x.gguf", dtype="float32")
    assert all(torch.equal(value, truth.state_dict()[name]) for name, value in weights_of(network).items())


def test_gate_and_up_may_be_of_different_types(config: ModelConfig, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = "blk.1.ffn_up_exps.weight"
        tensors[name] = (encode(tensors[name][0], Type.Q8_0, np.random.default_rng()), Type.Q8_0)

    truth = write_gguf(tmp_path / "x.gguf", config, Type.F32, apart=True, change=change).layers[1].experts.gate_up_proj
    ours = load_gguf_network(tmp_path / "x.gguf", dtype="float32").layers[1].experts.gate_up_proj
    gate, up = ours.chunk(2, dim=1)
    assert torch.equal(gate, truth.chunk(2, dim=1)[0])
    torch.testing.assert_close(up, truth.chunk(2, dim=1)[1], rtol=0, atol=0.002)


def test_a_split_gguf_file_is_refused(small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small, keys={"split.count": 3})
    error = refusal(tmp_path / "x.gguf")
    assert "one of 3 parts" in error.message
    assert "--merge" in error.hint


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def cut(name: str, rows: int) -> Change:
    return lambda tensors: tensors.update({name: (tensors[name][0][:rows], tensors[name][1])})


def put(name: str, like: str, plus: float = 0.0) -> Change:
    return lambda tensors: tensors.update({name: (tensors[like][0] + np.float32(plus), tensors[like][1])})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (drop("blk.1.attn_norm.weight"), MissingWeights, "lacks the tensor blk.1.attn_norm.weight"),
        (drop("blk.0.ffn_gate_up_exps.weight"), MissingWeights, "lacks the tensor blk.0.ffn_gate_up_exps.weight"),
        (drop("blk.0.layer_output_scale.weight"), MissingWeights, "blk.0.layer_output_scale.weight"),
        (drop("token_embd.weight"), MissingWeights, "token_embd.weight"),
        (cut("blk.0.attn_q.weight", 16), ShapeMismatch, r"blk.0.attn_q.weight has the shape [16, 32]"),
        (cut("blk.0.ffn_down_exps.weight", 4), ShapeMismatch, "blk.0.ffn_down_exps.weight"),
        (put("blk.1.attn_v.weight", "blk.1.attn_k.weight"), UnexpectedWeights, "blk.1.attn_v.weight"),
        (put("v.patch", "blk.1.attn_k.weight"), UnexpectedWeights, "v.patch"),
        (put("output.weight", "token_embd.weight", 1), UnexpectedWeights, "output.weight differs"),
        (put("rope_freqs.weight", "rope_freqs.weight", 1), ConfigError, "rope_freqs.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Change, error: type[BlockpressError], words: str, small: ModelConfig, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", small, change=change)
    found = refusal(tmp_path / "x.gguf")
    assert type(found) is error
    assert words in found.message


@pytest.mark.parametrize(
    "change", [put("output.weight", "token_embd.weight"), drop("rope_freqs.weight")], ids=["tie", "rope"]
)
def test_redundant_tensors_are_optional(change: Change, small: ModelConfig, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "x.gguf", small, change=change)
    assert torch.equal(figures(load_gguf_network(tmp_path / "x.gguf")), figures(truth))


def test_missing_causal_scalars_default_to_the_canvas_scalars(small: ModelConfig, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "x.gguf", small, change=drop("blk.0.enc_layer_output_scale.weight"))
    layer = load_gguf_network(tmp_path / "x.gguf").layers[0]
    assert torch.equal(layer.causal_scalar, truth.layers[0].layer_scalar)
    assert not torch.equal(layer.causal_scalar, truth.layers[0].causal_scalar)


def test_scalars_may_be_named_without_weight(small: ModelConfig, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "output_scale" in name]:
            tensors[name.removesuffix(".weight")] = tensors.pop(name)

    truth = write_gguf(tmp_path / "x.gguf", small, change=change)
    assert torch.equal(figures(load_gguf_network(tmp_path / "x.gguf")), figures(truth))


def test_load_arguments_are_checked(small: ModelConfig, tmp_path: Path) -> None:
    file, seen = tmp_path / "x.gguf", []
    write_gguf(file, small, Type.Q8_0)
    network = load_gguf_network(str(file), progress=lambda done, total: seen.append((done, total)))
    assert network.dtype == torch.bfloat16
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(size for _, size in [seen[-1]])
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    with pytest.raises(RequestError, match="dtype is 'int8'"):
        load_gguf_network(file, dtype="int8")
    with pytest.raises(RequestError, match="cannot be used"):
        load_gguf_network(file, device="abacus")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_gguf_network(tmp_path / "absent.gguf")


def test_out_of_memory_names_the_size(small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    write_gguf(tmp_path / "x.gguf", small, Type.Q8_0)
    monkeypatch.setattr(load, "put", refuse)
    found = refusal(tmp_path / "x.gguf")
    assert type(found) is RequestError
    assert "no room for the weights, which take 0.0 GiB" in found.message


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.BF16])
def test_memory_is_checked_for_what_is_allocated(
    dtype: str, compute: str, kind: Type, small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    write_gguf(tmp_path / "x.gguf", small, kind)
    monkeypatch.setattr(load, "room_for", lambda size, device: asked.append(size) or nullcontext())
    network = load_gguf_network(tmp_path / "x.gguf", dtype=dtype, compute_dtype=compute)
    packed = sum(weight.nbytes for module in network.modules() for weight in packed_weights(module).values())
    assert asked == [packed + sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])]


def test_a_read_error_is_an_error_of_ours(small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    write_gguf(tmp_path / "x.gguf", small)
    monkeypatch.setattr(load, "read_bytes", fail)
    assert "cannot be read: [Errno 5]" in refusal(tmp_path / "x.gguf").message


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_head_that_differs_from_the_embedding_is_refused(
    place: int, small: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        data, kind = tensors["token_embd.weight"]
        data = data.copy()
        data.reshape(-1)[place] += 1
        tensors["output.weight"] = data, kind

    monkeypatch.setattr(header, "PIECE", 100)
    write_gguf(tmp_path / "x.gguf", small, change=change)
    assert "output.weight differs" in refusal(tmp_path / "x.gguf").message


def test_pictures_are_refused_without_a_vision_tower(small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small)
    config = open_gguf(tmp_path / "x.gguf").config
    for opener in (load_vision, load_picture_settings):
        with pytest.raises(CheckpointError, match="no vision tower"):
            opener(tmp_path / "x.gguf", config=config)


def test_a_gguf_model_generates_text(small: ModelConfig, tmp_path: Path) -> None:
    """A whole answer from one file: weights, sampler, stop ids and vocabulary; packed as its floats give it."""
    truth = write_gguf(tmp_path / "x.gguf", small, Type.Q8_0, keys={"diffusion.eb_max_steps": 6})
    file = open_gguf(tmp_path / "x.gguf")
    network = load_gguf_network(tmp_path / "x.gguf", dtype="float32")
    replies = [
        LM(path=tmp_path, network=network, generation=file.generation, tokenizer=file.tokenizer()).generate(
            "abc ab<turn|>", max_tokens=30, seed=5
        )
        for network in (network, truth)
    ]
    assert replies[0].text == replies[1].text
    assert replies[0].tokens == replies[1].tokens
    assert 0 < len(replies[0].tokens) <= 30


def test_find_gguf_resolves_files_and_directories(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "absent") is None
    assert find_gguf("\0") is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=re.escape("2 GGUF files: a.gguf, b.gguf")):
        find_gguf(tmp_path)
    assert find_gguf(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None


def test_layers_of_a_kind_may_have_heads_of_their_own(small: ModelConfig, tmp_path: Path) -> None:
    sliding, full = small.layers
    made = replace(small, layers=(sliding, LayerConfig(kind="sliding_attention", head_dim=8, kv_heads=4), full))
    truth = write_gguf(tmp_path / "x.gguf", made)
    assert open_gguf(tmp_path / "x.gguf").config.layers == made.layers
    assert torch.equal(figures(load_gguf_network(tmp_path / "x.gguf")), figures(truth))
