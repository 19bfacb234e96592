"""The metadata of a GGUF file becomes the configurations that the file was made from, or is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from blockpress.checkpoints.gguf.header import Header, StoredBlocks
from blockpress.checkpoints.gguf.load import load_gguf_network, open_gguf
from blockpress.checkpoints.gguf.metadata import read_config, read_generation
from blockpress.checkpoints.gguf.names import stored_names
from blockpress.checkpoints.gguf.types import ggml_type
from blockpress.config import PRESETS, ModelConfig, Rope, Sampling
from blockpress.errors import ConfigError, ShapeMismatch
from blockpress.model import Network
from tests.builders.gguf_files import PIECES, keys_of, narrow, refusal, write_gguf


@pytest.fixture(scope="module")
def small(tiny: ModelConfig) -> ModelConfig:
    return narrow(tiny)


def test_metadata_gives_back_its_config(small: ModelConfig, tmp_path: Path) -> None:
    for made in (small, replace(small, full_rope=Rope(theta=5e5, kind="proportional", partial=0.5), canvas_length=9)):
        write_gguf(tmp_path / "x.gguf", made, Type.Q8_0)
        assert open_gguf(tmp_path / "x.gguf").config == made
    write_gguf(tmp_path / "x.gguf", small, Type.F32)
    assert open_gguf(tmp_path / "x.gguf").config == replace(small, dtype="float32")


def test_the_published_header_is_the_published_model() -> None:
    """The metadata and the 692 tensor names of the published Q8_0 file, as its header was dumped."""
    published = PRESETS["diffusiongemma-26B-A4B"]()
    tokens = [str(number) for number in range(262_144)]
    for number, piece in {106: "<turn|>", 50: "<|tool_response>", 258_880: "<|image|>"}.items():
        tokens[number] = piece
    keys = {**keys_of(published), "tokenizer.ggml.tokens": tokens}
    metadata = {
        key if key.startswith(("tokenizer.", "diffusion.")) else f"diffusion-gemma.{key}": np.array(value)
        if isinstance(value, list) and key != "tokenizer.ggml.tokens"
        else value
        for key, value in keys.items()
    }
    with torch.device("meta"):
        ours = Network(published).state_dict()
    kind = ggml_type(8, "")
    tensors = {
        stored_names(name)[0]: StoredBlocks(
            name=stored_names(name)[0], shape=tuple(tensor.shape), kind=kind, start=0, bytes=0
        )
        for name, tensor in ours.items()
    }
    assert len(tensors) + 1 == 692, "and rope_freqs.weight"
    header = Header(
        file=Path("x.gguf"), metadata={**metadata, "general.architecture": "diffusion-gemma"}, tensors=tensors
    )
    frequencies = torch.tensor([1.0] * 64 + [1e30] * 192)
    assert read_config(header, frequencies) == published
    assert read_generation(header, published).stop_ids == (1, 106, 50)


def test_config_json_round_trips_gguf_metadata(small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small, Type.Q8_0)
    read = open_gguf(tmp_path / "x.gguf").config
    assert ModelConfig.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"attention.sliding_window_pattern": 2}, {}),
        ({"attention.head_count_kv": 2, "attention.head_count_kv_full": 1}, {}),
        ({"attention.head_count": [4, 4], "feed_forward_length": [32, 32]}, {}),
        ({"diffusion.canvas_length": None, "canvas_length": 7}, {"canvas_length": 7}),
        ({"vocab_size": 64, "attention.scale": 1.0, "general.name": "other", "some.key": [1, 2]}, {}),
        ({"tokenizer.ggml.eot_token_id": 9}, {"eos_ids": (1, 9, 6, 7)}),
        ({"rope.freq_base": None, "rope.freq_base_swa": None}, {}),
    ],
)  # fmt: skip
def test_alternative_metadata_keys_are_read(
    keys: dict[str, Any], expected: dict[str, Any], small: ModelConfig, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", small, Type.Q8_0, keys=keys)
    assert open_gguf(tmp_path / "x.gguf").config == replace(small, **expected)


@pytest.mark.parametrize(
    ("key", "field", "default"),
    [
        ("final_logit_softcapping", "softcap", 30.0),  # missing where `transformers` wrote the config
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
        ("attention.sliding_window", "sliding_window", 512),
        ("context_length", "context_length", 131_072),
        ("diffusion.canvas_length", "canvas_length", 256),
        ("rope.freq_base", "full_rope", Rope(theta=1e6, kind="proportional", partial=0.25)),
        ("rope.freq_base_swa", "sliding_rope", Rope(theta=1e4)),
        ("tokenizer.ggml.padding_token_id", "pad_id", 0),
        ("tokenizer.ggml.bos_token_id", "bos_id", 2),
        ("tokenizer.ggml.eos_token_id", "eos_ids", (1, 6, 7)),
    ],
)
def test_a_missing_key_has_the_reference_s_default(
    key: str, field: str, default: Any, small: ModelConfig, tmp_path: Path
) -> None:
    other = replace(small, softcap=20.0, rms_norm_eps=1e-5, sliding_window=9, context_length=99, canvas_length=5)
    write_gguf(tmp_path / "x.gguf", other, Type.Q8_0, keys={key: None})
    assert open_gguf(tmp_path / "x.gguf").config == replace(other, **{field: default})
    load_gguf_network(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("attention.sliding_window_pattern", [(8, 2), (16, 1)]),  # each sixth layer is full, and the last
        ("attention.key_length_swa", [(256, 2), (16, 1)]),
        ("attention.head_count_kv", [(8, 4), (16, 4)]),
    ],
)
def test_missing_sizes_of_layers_are_the_reference_s(
    key: str, sizes: list[tuple[int, int]], small: ModelConfig, tmp_path: Path
) -> None:
    derived = ("attention.value_length", "rope.dimension_count")
    keys = {key: None} | {f"{name}{suffix}": None for name in derived for suffix in ("", "_swa")}
    write_gguf(tmp_path / "x.gguf", small, Type.Q8_0, keys=keys)
    read = open_gguf(tmp_path / "x.gguf").config
    assert [(layer.head_dim, layer.kv_heads) for layer in read.layers] == sizes
    if read != small:
        assert isinstance(refusal(tmp_path / "x.gguf"), ShapeMismatch), "the tensors have other sizes"


def test_sampler_and_stop_ids_are_read(small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small)
    generation = open_gguf(tmp_path / "x.gguf").generation
    assert (generation.sampling, generation.stop_ids) == (Sampling(), (1, 6, 7))
    keys = {
        "diffusion.eb_max_steps": 12, "diffusion.eb_t_min": 0.3, "diffusion.eb_t_max": 0.7, "diffusion.eb_entropy_bound": 0.2,
        "diffusion.eb_stability_threshold": 2, "diffusion.eb_confidence_threshold": 0.01,
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", small, keys=keys)
    assert open_gguf(tmp_path / "x.gguf").generation.sampling == Sampling(
        steps=12, t_min=0.3, t_max=0.7, entropy_bound=0.2, stability=2, confidence=0.01
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        *(({key: None}, f"{key} is missing") for key in (
            "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "expert_count",
            "expert_used_count", "expert_feed_forward_length")),
        ({"attention.shared_kv_layers": 1}, "attention.shared_kv_layers is 1"),
        ({"embedding_length_per_layer_input": 64}, "embedding_length_per_layer_input is 64"),
        ({"attention.causal": True}, "attention.causal is True"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"attention.value_length": 8}, "attention.value_length is 8"),
        ({"rope.dimension_count_swa": 4}, "rope.dimension_count_swa is 4"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"attention.sliding_window_pattern": [True]}, "sliding_window_pattern is array"),
        ({"attention.head_count_kv": [2, 1, 1]}, "head_count_kv is array"),
        ({"attention.head_count": [4, 8]}, "attention.head_count is array"),
        ({"feed_forward_length": "wide"}, "intermediate_size is 'wide'"),
        ({"diffusion.eb_t_min": -1.0}, "diffusion.eb_*: sampling field t_min is -1.0"),
        ({"tokenizer.ggml.tokens": PIECES[:-1]}, "vocabulary is"),
        ({"split.count": [1, 2]}, "is not understood"),
    ],
)  # fmt: skip
def test_invalid_metadata_is_refused(keys: dict[str, Any], words: str, small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small, keys=keys)
    error = refusal(tmp_path / "x.gguf")
    assert isinstance(error, ConfigError)
    assert words in error.message


def test_another_architecture_is_refused(small: ModelConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", small, architecture="llama")
    error = refusal(tmp_path / "x.gguf")
    assert "general.architecture is 'llama'" in error.message
    assert "diffusion-gemma" in error.hint
