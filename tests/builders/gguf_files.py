"""GGUF files for the tests, written by the `gguf` package, with the values that its own dequantiser reads from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from blockpress.checkpoints.gguf.load import load_gguf_network
from blockpress.checkpoints.gguf.names import FREQUENCIES, stored_halves, stored_names
from blockpress.config import LayerConfig, ModelConfig
from blockpress.errors import BlockpressError
from blockpress.model import Network
from tests.builders import files
from tests.conftest import make_random_network

ARCHITECTURE = "diffusion-gemma"

PIECES = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|turn>",
    "<turn|>",
    "<|tool_response>",
    "<|image|>",
    "<unused0>",
]
PIECES += ["\n", "\n\n", "▁", "▁▁", "a", "b", "c", "ab", "abc", "▁a", "<table>", "<0x41>"]
PIECES += [chr(number) for number in range(0x61 + 3, 0x61 + 26)]
PIECES += [f"<unused{number}>" for number in range(1, 64 - len(PIECES) + 1)]
MERGES = ["\n \n", "▁ ▁", "a b", "ab c", "▁ a"]
TYPES = [3] * 7 + [4, 3] + [1] * 12 + [6] + [1] * (64 - 22)
"""The types that llama.cpp's converter gives: the tool response is a control token that it calls user-defined."""


def wide(tiny: ModelConfig) -> ModelConfig:
    """The tiny preset with rows of 256 values, as K-quants need them, and experts enough to be run one by one."""
    return replace(
        tiny,
        num_experts=5,
        hidden_size=256,
        intermediate_size=256,
        expert_size=256,
        layers=(
            LayerConfig(kind="sliding_attention", head_dim=64, kv_heads=2),
            LayerConfig(kind="full_attention", head_dim=128, kv_heads=1),
        ),
        pad_id=0,
        eos_ids=(1, 6, 7),
        image_id=8,
        dtype="bfloat16",
    )


def narrow(tiny: ModelConfig) -> ModelConfig:
    """The smallest network whose rows are whole blocks of 32: its file has some 100 KiB."""
    return replace(wide(tiny), hidden_size=32, intermediate_size=32, expert_size=32, layers=tiny.layers)


def keys_of(config: ModelConfig) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes; what is no key of the architecture has its full name."""
    sliding, full = (next(x for x in config.layers if x.sliding == local) for local in (True, False))
    return {
        "block_count": len(config.layers),
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": [x.kv_heads for x in config.layers],
        "rope.freq_base": config.full_rope.theta,
        "rope.freq_base_swa": config.sliding_rope.theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.expert_size,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "final_logit_softcapping": config.softcap,
        "attention.sliding_window": config.sliding_window,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "attention.sliding_window_pattern": [x.sliding for x in config.layers],
        "attention.causal": False,
        "diffusion.canvas_length": config.canvas_length,
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-1000.0] * len(PIECES),
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
        "general.quantization_version": 2,
    }


def refusal(file: Path) -> BlockpressError:
    """The error that loading the file raises."""
    return files.refusal(file, load_gguf_network)


def write_gguf(
    file: Path,
    config: ModelConfig,
    kind: Type | Callable[[str], Type] = Type.F32,
    *,
    keys: Mapping[str, Any] | None = None,
    apart: bool = False,
    architecture: str = ARCHITECTURE,
    change: Callable[[dict[str, tuple[np.ndarray[Any, Any], Type]]], None] = lambda tensors: None,
    seed: int = 0,
) -> Network:
    """Write a random network and return the float32 network that the file stands for.

    Args:
        kind: of the matrices, or the kind by our tensor's name; all else is float32, as converters have it.
        keys: other values for keys; None leaves one out.
        apart: gate and up of the experts as two tensors.
        change: what to do to the tensors before they are written, by their names in the file.
    """
    network = make_random_network(config, seed)
    draw = np.random.default_rng(seed)
    tensors: dict[str, tuple[np.ndarray[Any, Any], Type]] = {}
    for ours, tensor in network.state_dict().items():
        wanted = Type.F32 if tensor.ndim < 2 else kind(ours) if callable(kind) else kind
        data = encode(tensor.numpy(), wanted, draw)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, wanted).copy()).view(tensor.shape))
        halves = stored_halves(ours) if apart else None
        if halves is None:
            tensors[stored_names(ours)[0]] = (data, wanted)
        else:
            for name, half in zip(halves, np.split(data, 2, axis=1), strict=True):
                tensors[name] = (half, wanted)
    half = next(x for x in config.layers if not x.sliding).head_dim // 2
    turning = int(half * config.full_rope.partial)
    tensors[FREQUENCIES] = (np.array([1.0] * turning + [1e30] * (half - turning), np.float32), Type.F32)
    change(tensors)
    write_file(file, {**keys_of(config), **(keys or {})}, tensors, architecture)
    return network


def write_file(
    file: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray[Any, Any], Type]],
    architecture: str = ARCHITECTURE,
) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in keys.items():
        if value is not None:
            _add(
                writer,
                key if key.startswith(("diffusion.", "tokenizer.", "general.", "split.")) else f"{ARCHITECTURE}.{key}",
                value,
            )
    for name, (data, wanted) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def encode(values: np.ndarray[Any, Any], kind: Type, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Values as the package stores them; of a kind that it cannot write, random blocks of about the same size."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(values), kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind, draw)


def random_blocks(shape: tuple[int, ...], kind: Type, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random bytes with float16 scales that make values of about 1/sqrt(columns)."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // count, size), dtype=np.uint8)
    root = shape[-1] ** -0.5
    # Where the float16 of a block lie, and how large the codes are that they multiply.
    places = {
        Type.Q4_K: {0: root / 190, 2: root / 25},
        Type.Q5_K: {0: root / 380, 2: root / 25},
        Type.Q6_K: {208: root / 1400},
        Type.Q2_K: {80: root / 16, 82: root / 16},
        Type.Q3_K: {108: root / 64},
        Type.IQ4_XS: {0: root / 1500},
    }[kind]
    for place, scale in places.items():
        scales = (scale * draw.uniform(0.5, 1.5, blocks.shape[:-1])).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def weights_of(network: Network) -> dict[str, Tensor]:
    """Every weight of a network as float32, packed ones too."""
    found = {name: tensor.float() for name, tensor in network.state_dict().items()}
    for owner, module in network.named_modules():
        for leaf, value in vars(module).items():
            if hasattr(value, "unpack"):
                found[f"{owner}.{leaf}"] = value.unpack(torch.float32)
    return found
