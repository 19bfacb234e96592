"""The memory of a network, part by part, from its config alone: parameters, bytes of context and of working memory.

    weights    parameters x bytes; packed weights keep their bytes on disk, unless products are in integers
    context    the KV cache: every layer, every token; for a sliding layer the engine keeps what its window needs
    forward    the peak of one forward of the engine, in addition to weights and context: `engine_peak`

Why: whether a model fits has to be known before its weights are there. No torch here.

Invariant: `sum(parameters(config).values())` is the number of parameters of `Network(config)`; the two layer scalars of
a layer are buffers and not counted, nor is the vision tower, which the config alone does not describe.

Run it:  python -m pytest blockpress/costs/memory.py tests/test_costs.py
"""

from __future__ import annotations

from blockpress.config import LayerConfig, LayerKind, ModelConfig

CHUNK = 512
"""Tokens of a prompt that the engine reads in one forward by default."""

PLAIN_PAGE = 256
"""Tokens per page where a family has no canvas."""

PRODUCTS = 1 << 27
"""Most bytes of products with the vocabulary in memory at a time."""

TABLES = 6 * 4 * (1 << 16)
"""Bytes of the tables of all bfloat16 while they are computed, for one temperature."""

TERMS = 4 * 4 * (1 << 16)
"""Bytes of the terms of sums that a step on matrix tiles makes of such tables (`ops/vocabulary/fused.py`)."""

TABLED = 1 << 12
"""The vocabulary from which on rows of bfloat16 are read through them: a canvas of 128 rows is then read in more time
than they take to compute."""

FUSED = 1 << 15
"""The vocabulary from which on a step in float32, or in bfloat16 on matrix tiles, reads it tile by tile: smaller ones
are parts for few threads only."""

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
    """Bytes of the weights of a network whose layers multiply integers: int8 codes and a float32 scale for each row of
    their matrices, embedding and router in `dtype`, and the rest in float32.

    >>> from blockpress.config import PRESETS
    >>> round(integer_weights(PRESETS["diffusiongemma-26B-A4B"](), "bfloat16") / 2**30, 2)
    24.28
    """
    hidden, parts = config.hidden_size, parameters(config)
    sparse = config.num_experts > 0
    floats = config.vocab_size * hidden + len(config.layers) * hidden * config.num_experts * sparse
    float32_values = parts["norms"] + hidden * config.has_canvas
    float32_values += len(config.layers) * (hidden + config.num_experts) * sparse
    float32_values += sum(2 * layer.head_dim for layer in config.layers)
    codes = sum(parts.values()) - floats - float32_values
    gated = 2 * config.intermediate_size + hidden
    rows = gated * (len(config.layers) + config.has_canvas)
    rows += len(config.layers) * config.num_experts * (2 * config.expert_size + hidden) * sparse
    for layer in config.layers:
        key = layer.kv_heads * layer.head_dim * (2 if config.has_value(layer) else 1)
        rows += config.num_heads * layer.head_dim + key + hidden
    # The two scalars of a layer are not parameters.
    return codes + 4 * rows + floats * DTYPE_BYTES[dtype] + 4 * (float32_values + 2 * len(config.layers))


def activation_dtype(compute: str) -> str:
    """The type of activations and context: the compute type, or float32 where products are in integers."""
    return "float32" if compute == "int8" else compute


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert of one layer."""
    return 3 * config.hidden_size * config.expert_size


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses: all but the experts that it is not routed to.

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


def paged_bytes(config: ModelConfig, dtype: str, tokens: int, chunk: int = CHUNK) -> int:
    """Bytes of the pages that the engine keeps for one request of `tokens` tokens: whole pages, for sliding layers no
    more than the window and a chunk of a prompt span.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(paged_bytes(published, "bfloat16", tokens) / 2**30, 2) for tokens in (512, 4096, 32768)]
    [0.11, 0.42, 0.97]
    """
    page = config.canvas_length if config.has_canvas else PLAIN_PAGE
    per_token, whole = context_bytes(config, dtype), -(-tokens // page)
    window = -(-(config.sliding_window - 1 + chunk) // page) + 1
    return page * sum(size * (min(whole, window) if kind == SLIDING else whole) for kind, size in per_token.items())


def engine_peak(
    config: ModelConfig, dtype: str, context: int, canvases: int = 1, tokens: int = 0, *, tiles: bool = False
) -> int:
    """Bytes that one forward of the engine allocates at its peak: `canvases` denoised and `tokens` read causally after
    `context` tokens of one request, all rows in one flat batch. tiles: bfloat16 is multiplied on matrix tiles (AMX).

    For the vocabulary it holds one buffer of products (`ops/vocabulary/blocks.py`), and in bfloat16 tables of capped
    logits (`ops/vocabulary/native.py`); in a layer the rows' queries, keys and values and attention's output; and
    throughout the buffers of C++. Without a compiler torch takes several times as much.

    >>> from blockpress.config import PRESETS
    >>> published = PRESETS["diffusiongemma-26B-A4B"]()
    >>> [round(engine_peak(published, "bfloat16", tokens, 1, 256) / 2**20) for tokens in (0, 4096, 131072)]
    [192, 192, 220]
    """
    canvas, size = config.canvas_length, DTYPE_BYTES[dtype]
    rows, keys = canvases * canvas + tokens, context + tokens + (canvas if canvases else 0)
    tiles = tiles and dtype == "bfloat16"
    tables = TABLES if dtype == "bfloat16" and config.softcap is not None and config.vocab_size >= TABLED else 0
    if (dtype == "float32" or tiles) and config.vocab_size >= FUSED:
        vocabulary = _fused(config, canvases * canvas) + tables + (TERMS if tables else 0)
    else:
        vocabulary = min(PRODUCTS, max(canvases * canvas, 1) * config.vocab_size * size) + tables
    wide = max((config.num_heads + layer.kv_heads) * layer.head_dim for layer in config.layers)
    native = _native_buffers(config, dtype, rows) + _native_task(config, rows, keys, tiles)
    return _resident(config, dtype, rows, 6) + max(vocabulary, 2 * rows * wide * size) + native


def _fused(config: ModelConfig, rows: int) -> int:
    """Bytes of `ops/native/head.h`: of at most 288 rows at a time, the mean embeddings of 32 parts of the vocabulary
    and five numbers of 8 bytes for every 256 tokens; products and weights of a tile."""
    rows, hidden = min(rows, 288), config.hidden_size
    return rows * (32 * 4 * hidden + config.vocab_size // 256 * 40 + 4 * 2 * 256)


def _native_buffers(config: ModelConfig, dtype: str, rows: int) -> int:
    """Bytes that `ops/native/forward.cpp` keeps for a layer of `rows` rows, on one thread.

    Normed rows, states, and the outputs of the MLP and the experts; the activations between the MLP's products; the
    experts' outputs for each of a token's experts; panels of up to 1,152 rows of the deepest product; fixed blocks.
    """
    size, hidden = DTYPE_BYTES[dtype], config.hidden_size
    chosen = config.top_k_experts if config.num_experts else 0
    between = rows * (hidden * ((4 if chosen else 3) + chosen) + config.intermediate_size) * size
    deepest = max(hidden, config.intermediate_size, *(config.num_heads * layer.head_dim for layer in config.layers))
    return between + (min(rows, 1152) + 12) * deepest * size + (1 << 18)


def _native_task(config: ModelConfig, rows: int, keys: int, tiles: bool) -> int:
    """Bytes of one task in C++, in float32, or on tiles in bfloat16: attention's scores and probabilities for a block
    of queries, or an expert's tokens and the activations between its products; they share memory."""
    sharing = max(config.num_heads // layer.kv_heads for layer in config.layers)  # heads of a key head
    queries = min(max(64 if tiles else 24, (1 << 16) // max(1, keys)), rows * sharing)
    expert = 132 * config.hidden_size + 252 * config.expert_size if config.num_experts else 0
    return (2 if tiles else 4) * max(keys * (2 * queries + (32 if tiles else 12)), expert)


def _resident(config: ModelConfig, dtype: str, positions: int, tensors: int) -> int:
    """Bytes of the activations alive meanwhile, in tensors as large as the input of a layer: measured."""
    return tensors * positions * config.hidden_size * DTYPE_BYTES[dtype]


def _attention(config: ModelConfig, layer: LayerConfig) -> int:
    """Query, output and key projections, the value's where there is one, and two norms."""
    query, key = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    return config.hidden_size * (2 * query + key * (2 if config.has_value(layer) else 1)) + 2 * layer.head_dim
