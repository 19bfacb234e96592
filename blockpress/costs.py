"""What a network costs, part by part, from its config alone: parameters, bytes, and bytes of context a token.

Why: whether a model fits is asked before its weights are there. No torch here.

Invariant: `sum(parameters(config).values())` is the number of parameters of `Network(config)`; the two layer scalars of
a layer are buffers and not counted, nor is the vision tower, which the config alone does not describe.

Run it:  python -c "from blockpress import costs, config as c; print(costs.parameters(c.PRESETS['tiny']()))"
"""

from __future__ import annotations

from blockpress.config import LayerConfig, LayerKind, ModelConfig

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the text network. Norms of queries and keys count as attention.

    >>> from blockpress.config import PRESETS
    >>> published = parameters(PRESETS["diffusiongemma-26B-A4B"]())
    >>> [f"{part} {count / 1e9:.2f} B" for part, count in published.items()][:4]
    ['embedding 0.74 B', 'attention 1.11 B', 'dense MLP 0.54 B', 'experts 22.84 B']
    >>> round(sum(published.values()) / 1e9, 2)
    25.25
    """
    hidden, count = config.hidden_size, len(config.layers)
    gated = 3 * hidden * config.intermediate_size
    return {
        "embedding": config.vocab_size * hidden,
        "attention": sum(_attention(config, layer) for layer in config.layers),
        "dense MLP": count * gated,
        "experts": count * config.num_experts * expert_parameters(config),
        "router": count * (hidden * config.num_experts + hidden + config.num_experts),
        "self-conditioning": gated + hidden,
        "norms": (7 * count + 1) * hidden,
    }


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert of one layer."""
    return 3 * config.hidden_size * config.expert_size


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts that it is not sent to.

    >>> from blockpress.config import PRESETS
    >>> round(active_parameters(PRESETS["diffusiongemma-26B-A4B"]()) / 1e9, 1)
    3.8
    """
    idle = len(config.layers) * (config.num_experts - config.top_k_experts) * expert_parameters(config)
    return sum(parameters(config).values()) - idle


def context_bytes(config: ModelConfig, dtype: str) -> dict[LayerKind, int]:
    """Bytes of keys and values that one token of context takes in all layers of each kind.

    >>> from blockpress.config import PRESETS
    >>> {kind: size // 1024 for kind, size in context_bytes(PRESETS["diffusiongemma-26B-A4B"](), "bfloat16").items()}
    {'sliding_attention': 200, 'full_attention': 20}
    """
    total: dict[LayerKind, int] = {}
    for layer in config.layers:
        total[layer.kind] = total.get(layer.kind, 0) + 2 * layer.kv_heads * layer.head_dim * DTYPE_BYTES[dtype]
    return total


def _attention(config: ModelConfig, layer: LayerConfig) -> int:
    """Query, output and key projections, the value's where there is one (sliding layers), and two norms."""
    query, key = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    return config.hidden_size * (2 * query + key * (2 if layer.sliding else 1)) + 2 * layer.head_dim
