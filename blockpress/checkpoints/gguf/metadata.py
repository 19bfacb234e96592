"""A GGUF file's metadata as configurations: `ModelConfig` and `GenerationConfig`.

    diffusion-gemma.*       the shape of the network, by llama.cpp's names (`attention.key_length_swa`, ...)
    diffusion.*             canvas length and sampler; the keys of the sampler are often left out
    tokenizer.ggml.*        ids of bos, eos and pad; the vocabulary gives the other stop ids

A key that is missing has the value that `transformers` gives its field; only sizes of matrices have none, which every
converter writes. A key with a value that would need maths that the stack does not have is refused by name; unknown keys
are tolerated, as in config.json. No key says how much of a full layer's head is rotated: `rope_freqs.weight` does,
whose entries divide the frequencies (1 for those that rotate, 1e30 for those that do not).

Invariant: the result is valid, and equals that of the config.json that the file was made from.

Run it:  python -m pytest tests/checkpoints/test_gguf_metadata.py
Source: llama.cpp's Gemma 4 converter (`conversion/gemma.py`, `Gemma4Model`), its pull request 24423, and the header of
the published files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from blockpress.checkpoints.gguf.header import Header
from blockpress.config import GenerationConfig, LayerConfig, ModelConfig, Rope, Sampling
from blockpress.config.families import CANVAS, GLOBAL_HEAD_DIM, PATTERN, SIZES, SOFTCAP
from blockpress.config.layers import FULL_ROPE, SLIDING_ROPE
from blockpress.errors import ConfigError, RequestError

ARCHITECTURE = "diffusion-gemma"

_STOPS = ("<turn|>", "<|tool_response>")
"""Control tokens that end an answer as eos does. GGUF has room for one eos; llama.cpp knows these by name too."""

_IMAGE = "<|image|>"

# Keys whose other values would need maths that the stack does not have, and the values that it implements.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (False,),
    "attention.scale": (1.0,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_length_per_layer_input": (0,),
    "expert_gating_func": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
_SAMPLER = {
    "max_steps": "steps",
    "entropy_bound": "entropy_bound",
    "t_min": "t_min",
    "t_max": "t_max",
    "stability_threshold": "stability",
    "confidence_threshold": "confidence",
}


def read_config(header: Header, frequencies: Tensor | None) -> ModelConfig:
    """The shape of the network.

    Args:
        frequencies: `rope_freqs.weight`, the divisors of a full layer's frequencies; None: the family's rotary
            embedding.

    Raises:
        ConfigError: a missing key, a value out of range or one that changes the maths.
    """
    for key, allowed in _NEUTRAL.items():
        value = _find(header, key)
        if value is not None and value not in allowed:
            raise _wrong(key, value, " or ".join(map(repr, allowed)))
    layers = _layers(header)
    return ModelConfig(
        vocab_size=_vocabulary(header),
        hidden_size=_need(header, "embedding_length"),
        intermediate_size=_alike(header, "feed_forward_length"),
        num_heads=_alike(header, "attention.head_count"),
        layers=layers,
        sliding_window=_find(header, "attention.sliding_window", SIZES["sliding_window"]),
        sliding_rope=Rope(theta=_find(header, "rope.freq_base_swa", SLIDING_ROPE.theta)),
        full_rope=_full_rope(header, layers, frequencies),
        num_experts=_need(header, "expert_count"),
        top_k_experts=_need(header, "expert_used_count"),
        expert_size=_need(header, "expert_feed_forward_length"),
        canvas_length=_find(header, "diffusion.canvas_length", CANVAS),
        context_length=_find(header, "context_length", SIZES["max_position_embeddings"]),
        rms_norm_eps=_find(header, "attention.layer_norm_rms_epsilon", SIZES["rms_norm_eps"]),
        softcap=_find(header, "final_logit_softcapping", SOFTCAP),
        pad_id=_token_id(header, "padding", "<pad>"),
        eos_ids=_stop_ids(header),
        bos_id=_token_id(header, "bos", "<bos>"),
        image_id=_id_of(header, _IMAGE),
        dtype=_dtype(header),
    )


def read_generation(header: Header, config: ModelConfig) -> GenerationConfig:
    """The sampler settings that the file gives, and the stop ids.

    Raises:
        ConfigError: an invalid value.
    """
    given = {ours: _find(header, f"diffusion.eb_{theirs}") for theirs, ours in _SAMPLER.items()}
    try:
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
    except RequestError as error:
        raise ConfigError(f"GGUF keys diffusion.eb_*: {error.message}", hint=error.hint) from error
    return GenerationConfig(sampling=sampling, stop_ids=config.eos_ids)


def check_architecture(header: Header) -> None:
    """Raises:
    ConfigError: the file holds another family of models.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"GGUF key general.architecture is {_short(architecture)} in {str(header.file)!r}",
            hint=f"blockpress runs {ARCHITECTURE!r}; other models are for llama.cpp",
        )


def _layers(header: Header) -> tuple[LayerConfig, ...]:
    """Kind and sizes of every layer: the window pattern says which are sliding; `_swa` keys are for those."""
    count = _need(header, "block_count")
    # A layer has tensors: a wrong count must not make us build that many layers.
    if not isinstance(count, int) or not 1 <= count <= len(header.tensors):
        raise _wrong("block_count", count, f"from 1 to {len(header.tensors)}, the number of tensors")
    sliding = _pattern(header, count)
    heads = _kv_heads(header, count, sliding)
    full_dim = _find(header, "attention.key_length", GLOBAL_HEAD_DIM)
    sliding_dim = _find(header, "attention.key_length_swa", SIZES["head_dim"])
    for key, size in (
        ("attention.value_length", full_dim),
        ("attention.value_length_swa", sliding_dim),
        ("rope.dimension_count", full_dim),
        ("rope.dimension_count_swa", sliding_dim),
    ):
        if _find(header, key, size) != size:
            raise _wrong(key, _find(header, key), f"{size}, the size of a head")
    return tuple(
        LayerConfig(
            kind="sliding_attention" if local else "full_attention",
            head_dim=sliding_dim if local else full_dim,
            kv_heads=number,
        )
        for local, number in zip(sliding, heads, strict=True)
    )


def _pattern(header: Header, count: int) -> list[bool]:
    key = "attention.sliding_window_pattern"
    pattern = _find(header, key)
    if pattern is None:
        return [(index + 1) % PATTERN != 0 and index + 1 < count for index in range(count)]
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
        # One number n means: every n-th layer is full.
        return [(index + 1) % pattern != 0 for index in range(count)]
    if not _is_list(pattern, count):
        raise _wrong(key, pattern, f"a list of {count} truth values")
    return [bool(local) for local in pattern]


def _kv_heads(header: Header, count: int, sliding: Sequence[bool]) -> list[Any]:
    """A number for each layer: from a list, or from one number for all and another for the full ones."""
    key = "attention.head_count_kv"
    heads = _find(header, key, SIZES["num_key_value_heads"])
    if isinstance(heads, int):
        full = _find(header, f"{key}_full", heads)
        return [heads if local else full for local in sliding]
    if not _is_list(heads, count):
        raise _wrong(key, heads, f"a whole number or a list of {count}")
    return list(heads.tolist())


def _full_rope(header: Header, layers: Sequence[LayerConfig], frequencies: Tensor | None) -> Rope:
    theta = _find(header, "rope.freq_base", FULL_ROPE.theta)
    dims = {layer.head_dim for layer in layers if not layer.sliding}
    if frequencies is None or len(dims) != 1:
        return Rope(theta=theta, kind="proportional", partial=FULL_ROPE.partial)
    half = dims.pop() // 2
    rotated = int((frequencies == 1).sum())
    rest = frequencies[rotated:]
    if frequencies.shape != (half,) or bool((frequencies[:rotated] != 1).any()) or bool((rest < 1e20).any()):
        raise ConfigError(
            f"the tensor rope_freqs.weight of shape {list(frequencies.shape)} is not {half} entries, 1 and then 1e30",
            hint="other rotary embeddings are not computed; is the file of this family?",
        )
    return Rope(theta=theta, kind="proportional", partial=rotated / half)


def _vocabulary(header: Header) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    embedding = header.tensors.get("token_embd.weight")
    counts = {
        "vocab_size": _find(header, "vocab_size"),
        "tokenizer.ggml.tokens": None if tokens is None else len(tokens),
        "token_embd.weight": None if embedding is None else embedding.shape[0],
    }
    sizes = {name: count for name, count in counts.items() if count is not None}
    if len(set(sizes.values())) != 1:
        raise ConfigError(
            f"the size of the vocabulary is {sizes}", hint="all must agree: convert or fetch the file again"
        )
    return next(iter(sizes.values()))


def _stop_ids(header: Header) -> tuple[int, ...]:
    """eos first, then end of turn and the other control tokens that end an answer."""
    named = [_find(header, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    ids = [_token_id(header, "eos", "<eos>"), *named, *(_id_of(header, piece) for piece in _STOPS)]
    known = tuple(dict.fromkeys(number for number in ids if number is not None))
    if not known:
        raise _missing("tokenizer.ggml.eos_token_id")
    return known


def _token_id(header: Header, name: str, piece: str) -> int | None:
    """A control token's id by its key, or by its piece where the file does not name it."""
    return _find(header, f"tokenizer.ggml.{name}_token_id", _id_of(header, piece))


def _id_of(header: Header, piece: str) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return tokens.index(piece) if isinstance(tokens, list) and piece in tokens else None


def _dtype(header: Header) -> str:
    """float32 where all of the file is, else bfloat16, in which the family is trained.

    Not float16 for a float16 file: the weights fit its range, the activations of such models do not.
    """
    return "float32" if all(tensor.kind.name == "F32" for tensor in header.tensors.values()) else "bfloat16"


def _find(header: Header, key: str, default: Any = None) -> Any:
    """The value of a key, with the architecture's prefix or, for `diffusion.` and `tokenizer.` keys, without."""
    metadata: Mapping[str, Any] = header.metadata
    names = [f"{ARCHITECTURE}.{key}", f"{ARCHITECTURE}.{key.removeprefix('diffusion.')}"]
    if key.startswith(("diffusion.", "tokenizer.")):
        names.insert(0, key)
    return next((metadata[name] for name in names if name in metadata), default)


def _need(header: Header, key: str) -> Any:
    value = _find(header, key)
    if value is None:
        raise _missing(key)
    return value


def _alike(header: Header, key: str) -> Any:
    """A number, given as one or as a list with the same number for every layer."""
    value = _need(header, key)
    if not isinstance(value, np.ndarray):
        return value
    if len(set(value.tolist())) != 1:
        raise _wrong(key, value, "the same for every layer")
    return value.tolist()[0]


def _is_list(value: Any, count: int) -> bool:
    return isinstance(value, np.ndarray) and len(value) == count


def _missing(key: str) -> ConfigError:
    return ConfigError(f"GGUF key {key} is missing", hint="it has no default: convert or fetch the file again")


def _wrong(key: str, value: Any, need: str) -> ConfigError:
    return ConfigError(f"GGUF key {key} is {_short(value)}", hint=f"{key} must be {need}")


def _short(value: Any) -> str:
    return f"{value!r:.80}"
