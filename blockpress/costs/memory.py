"""What a network costs, part by part, from its config alone: parameters, bytes of context, and bytes of working memory.

    weights    parameters x bytes; packed weights keep their bytes on disk, unless products are of integers
    context    keys and values of every layer for every token; of a sliding layer the engine keeps what its window needs
    canvas     what one denoising step holds at its peak, beside weights and context: `canvas_peak`
    reading    what the causal pass over new tokens holds at its peak: `reading_peak`; the passes never run at once

Why: whether a model fits is asked before its weights are there. No torch here.

Invariant: `sum(parameters(config).values())` is the number of parameters of `Network(config)`; the two layer scalars of
a layer are buffers and not counted, nor is the vision tower, which the config alone does not describe.

Run it:  python -m pytest blockpress/costs/memory.py tests/test_costs.py
"""

from __future__ import annotations

from blockpress.config import LayerConfig, LayerKind, ModelConfig

CHUNK = 512
"""Tokens of a prompt that the engine reads in one forward, unless told otherwise."""

PLAIN_PAGE = 256
"""Tokens a page where a family has no canvas."""

PRODUCTS = 1 << 27
"""Bytes of products with the vocabulary that are in memory at a time."""

SLIDING: LayerKind = "sliding_attention"

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part that the text network has. Norms of queries and keys count as attention.

    >>> from blockpress.config import PRESETS
    >>> published = parameters(PRESETS["diffusiongemma-26B-A4B"]())
    >>> [f"{part} {count / 1e9:.2f} B" for part, count in published.items()][:4]
    ['embedding 0.74 B', 'attention 1.11 B', 'dense MLP 0.54 B', 'experts 22.84 B']
    >>> round(sum(published.values()) / 1e9, 2)
    25.25
    >>> list(parameters(PRESETS["gemma4-26B-A4B"]()))
    ['embedding', 'attention', 'dense MLP', 'experts', 'router', 'norms']
    """
    hidden, count, sparse = config.hidden_size, len(config.layers), config.num_experts > 0
    gated = 3 * hidden * config.intermediate_size
    parts = {
        "embedding": config.vocab_size * hidden,
        "attention": sum(_attention(config, layer) for layer in config.layers),
        "dense MLP": count * gated,
        "experts": count * config.num_experts * expert_parameters(config),
        "router": count * (hidden * config.num_experts + hidden + config.num_experts) * sparse,
        "self-conditioning": (gated + hidden) * config.has_canvas,
        "norms": ((7 if sparse else 4) * count + 1) * hidden,
    }
    return {part: number for part, number in parts.items() if number}


def integer_weights(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights of a network whose layers' products are made of integers: int8 codes and a float32 scale for
    each row of their matrices, embedding and router in `dtype`, and the rest in float32.

    >>> from blockpress.config import PRESETS
    >>> round(integer_weights(PRESETS["diffusiongemma-26B-A4B"](), "bfloat16") / 2**30, 2)
    24.28
    """
    hidden, parts = config.hidden_size, parameters(config)
    sparse = config.num_experts > 0
    floats = config.vocab_size * hidden + len(config.layers) * hidden * config.num_experts * sparse
    beside = parts["norms"] + hidden * config.has_canvas
    beside += len(config.layers) * (hidden + config.num_experts) * sparse
    beside += sum(2 * layer.head_dim for layer in config.layers)
    codes = sum(parts.values()) - floats - beside
    gated = 2 * config.intermediate_size + hidden
    rows = gated * (len(config.layers) + config.has_canvas)
    rows += len(config.layers) * config.num_experts * (2 * config.expert_size + hidden) * sparse
    for layer in config.layers:
        key = layer.kv_heads * layer.head_dim * (2 if config.has_value(layer) else 1)
        rows += config.num_heads * layer.head_dim + key + hidden
    # The two scalars of a layer are beside the parameters.
    return codes + 4 * rows + floats * DTYPE_BYTES[dtype] + 4 * (beside + 2 * len(config.layers))


def activation_dtype(compute: str) -> str:
    """The type of activations and context: that which is computed in, or float32 where products are of integers."""
    return "float32" if compute == "int8" else compute


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


def canvas_peak(config: ModelConfig, dtype: str, context: int, rows: int = 1) -> int:
    """Bytes that one denoising step allocates at its peak: over the vocabulary, or in a layer's attention.

    The first is that of `generate.plain_denoiser` and `ops/vocabulary/plain.py: entropy`: float32 logits, the same
    divided by the temperature, and, of the latter, three copies at once: 5 x 4 bytes for every position and token. The
    second grows with the context and overtakes it at some 100,000 tokens.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(canvas_peak(published, "bfloat16", tokens) / 2**30, 2) for tokens in (0, 4096, 131072)]
    [1.29, 1.29, 1.61]
    """
    canvas, window = config.canvas_length, config.sliding_window - 1
    beside = _resident(config, dtype, rows * canvas, 9) + _kept(config, dtype, rows * canvas)
    vocabulary = 5 * 4 * rows * canvas * config.vocab_size
    seen = {layer: (min(context, window) if layer.sliding else context) + canvas for layer in config.layers}
    looking = max(_looking(config, layer, dtype, rows, canvas, seen[layer]) for layer in seen)
    return beside + max(vocabulary, looking)


def reading_peak(config: ModelConfig, dtype: str, tokens: int, context: int = 0, rows: int = 1) -> int:
    """Bytes that the causal pass over `tokens` new ones behind `context` allocates at its peak, all at once as it is.

    That is a layer's attention, quadratic in the tokens, while the new keys and values wait; or the moment at which
    the cache is written anew (`model/cache.py: append`), when old and new ones are in memory twice. What stays, the
    context itself, is not counted.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(reading_peak(published, "bfloat16", tokens) / 2**30, 2) for tokens in (256, 4096, 32768)]
    [0.05, 1.17, 39.01]
    """
    beside = _resident(config, dtype, rows * tokens, 9) + _kept(config, dtype, rows * tokens)
    looking = max(_looking(config, layer, dtype, rows, tokens, context + tokens) for layer in set(config.layers))
    copies = rows * (context + tokens) * sum(context_bytes(config, dtype).values())
    return max(beside + looking, copies)


def paged_bytes(config: ModelConfig, dtype: str, tokens: int, chunk: int = CHUNK) -> int:
    """Bytes of the pages that the engine keeps for one request of so many tokens: whole pages, of sliding layers no
    more than the window and a chunk of a prompt reach over.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(paged_bytes(published, "bfloat16", tokens) / 2**30, 2) for tokens in (512, 4096, 32768)]
    [0.11, 0.42, 0.97]
    """
    page = config.canvas_length if config.has_canvas else PLAIN_PAGE
    each, whole = context_bytes(config, dtype), -(-tokens // page)
    window = -(-(config.sliding_window - 1 + chunk) // page) + 1
    return page * sum(size * (min(whole, window) if kind == SLIDING else whole) for kind, size in each.items())


def engine_peak(config: ModelConfig, dtype: str, context: int, canvases: int = 1, tokens: int = 0) -> int:
    """Bytes that one forward of the engine allocates at its peak: `canvases` denoised and `tokens` read causally behind
    `context` of one request, all rows in one flat batch.

    Over the vocabulary it holds one buffer of products (`ops/vocabulary/blocks.py`); in a layer the rows' queries, keys
    and values and what attention makes of them; and all the time what C++ keeps. Without a compiler torch takes some
    times as much.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(engine_peak(published, "bfloat16", tokens, 1, 256) / 2**20) for tokens in (0, 4096, 131072)]
    [191, 191, 220]
    """
    canvas, size = config.canvas_length, DTYPE_BYTES[dtype]
    rows, keys = canvases * canvas + tokens, context + tokens + (canvas if canvases else 0)
    vocabulary = min(PRODUCTS, max(canvases * canvas, 1) * config.vocab_size * size)
    wide = max((config.num_heads + layer.kv_heads) * layer.head_dim for layer in config.layers)
    kept = _kept(config, dtype, rows) + _scored(config, keys)
    return _resident(config, dtype, rows, 6) + max(vocabulary, 2 * rows * wide * size) + kept


def _kept(config: ModelConfig, dtype: str, rows: int) -> int:
    """Bytes that `ops/native/forward.cpp` keeps for a layer of so many rows, on one thread.

    Normed rows, states, and the outputs of the MLP and the experts; what is between the MLP's products; the experts'
    outputs for every choice of a token; panels of up to 960 rows of the deepest product; and blocks of fixed sizes.
    """
    size, hidden = DTYPE_BYTES[dtype], config.hidden_size
    chosen = config.top_k_experts if config.num_experts else 0
    between = rows * (hidden * ((4 if chosen else 3) + chosen) + config.intermediate_size) * size
    deepest = max(hidden, config.intermediate_size, *(config.num_heads * layer.head_dim for layer in config.layers))
    unit = 4 * (132 * hidden + 252 * config.expert_size) if chosen else 0
    return between + (min(rows, 960) + 12) * deepest * size + unit + (1 << 18)


def _scored(config: ModelConfig, keys: int) -> int:
    """Bytes of one task of attention in C++: scores and shares of a block of queries, in float32."""
    queries = max(24, (1 << 16) // max(1, keys))
    return 4 * keys * (2 * queries + 12)


def _looking(config: ModelConfig, layer: LayerConfig, dtype: str, rows: int, queries: int, keys: int) -> int:
    """Bytes of `ops/attention.py: grouped` at its softmax, which is done in the memory of the scores.

    Scores in the weights' type, the mask twice, keys and values joined with the context's, the rows' own queries, keys
    and values, and the queries once more as rows of one product. Where there is no compiler, torch's softmax takes 8
    bytes more for every score, in float32 4.
    """
    size, heads = DTYPE_BYTES[dtype], config.num_heads
    scores = rows * heads * queries * keys * size
    joined = 2 * rows * layer.kv_heads * keys * layer.head_dim * size
    own = rows * queries * layer.head_dim * (2 * heads + 2 * layer.kv_heads) * size
    return scores + joined + own + 2 * rows * queries * keys


def _resident(config: ModelConfig, dtype: str, positions: int, tensors: int) -> int:
    """Bytes of the activations that wait meanwhile, in tensors as large as the input of a layer: measured."""
    return tensors * positions * config.hidden_size * DTYPE_BYTES[dtype]


def _attention(config: ModelConfig, layer: LayerConfig) -> int:
    """Query, output and key projections, the value's where there is one, and two norms."""
    query, key = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    return config.hidden_size * (2 * query + key * (2 if config.has_value(layer) else 1)) + 2 * layer.head_dim
