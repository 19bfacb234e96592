"""Whether a model fits: the bytes of its parts from the headers of its files.

Formulas over the config alone are in `costs/`; here they are combined with the files. Weights that are stored packed
stay packed in memory, so they count as on disk; others count in the type that they are loaded in.

Invariant: no weight is read and nothing is allocated.

Run it:  blockpress show sudoku-nano --context 128
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockpress import costs
from blockpress.checkpoints.checkpoint import Checkpoint, opened_at
from blockpress.checkpoints.gguf.names import EMBEDDING, HEAD
from blockpress.checkpoints.index import FLOATS, StoredTensor
from blockpress.checkpoints.names import is_derived, is_quantised, is_vision, our_name, published_name
from blockpress.config import FAMILIES, ModelConfig

if TYPE_CHECKING:
    from blockpress.checkpoints.gguf.header import Header

_PARTS = (
    ("experts", r"\.experts\.|_exps\b"), ("router", r"\.router\.|ffn_gate_inp"),
    ("self-conditioning", r"self_conditioning\.|self_cond_"), ("attention", r"\.self_attn\.|\.attn_"),
    ("dense MLP", r"\.mlp\.|\.ffn_(gate|up|down)\b"), ("embedding", r"embed_tokens|lm_head|token_embd|output\.weight"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Files:
    """Sizes of a checkpoint's files: bytes on disk in all, of the text stack (tied weights once), and of the tower.

    `dtypes` counts the tensors of each stored type; `quantised` names the parts whose weights are packed.
    """

    count: int
    bytes: int
    text: int
    vision: int
    vision_parameters: int
    dtypes: Mapping[str, int]
    quantised: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a model takes while it answers one request with `tokens` tokens of context.

    `canvas` and `reading` are peaks of passes that never run at once, so `total` counts only the larger one.
    """

    tokens: int
    weights: int
    context: int
    canvas: int
    reading: int

    @property
    def total(self) -> int:
        return self.weights + self.context + max(self.canvas, self.reading)


def survey(path: str | Path | Checkpoint) -> Files:
    """The sizes of a checkpoint directory, a GGUF file or an open checkpoint, from the headers.

    Raises:
        MissingWeights, DamagedFile, CheckpointError: a file that is missing, cut short or unreadable.
    """
    checkpoint = opened_at(path)
    if checkpoint.header is not None:
        return _survey_gguf(checkpoint.header)
    tensors = checkpoint.tensors
    files = {tensor.file for tensor in tensors.values()}
    vision = [tensor for name, tensor in tensors.items() if is_vision(name)]
    text = {name: t for name, t in tensors.items() if not is_vision(name) and not is_derived(name)}
    once = {name: t for name, t in text.items() if not _is_tie(name, text)}
    packed = {_part(name) for name, t in once.items() if is_quantised(name) or t.dtype not in FLOATS}
    return Files(
        count=len(files),
        bytes=sum(file.stat().st_size for file in files),
        text=sum(tensor.bytes for tensor in once.values()),
        vision=sum(tensor.bytes for tensor in vision),
        vision_parameters=sum(math.prod(tensor.shape) for tensor in vision),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors.values())),
        quantised=tuple(sorted(packed)),
    )


def _survey_gguf(header: Header) -> Files:
    tensors = header.tensors
    once = {name: tensor for name, tensor in tensors.items() if name != HEAD or EMBEDDING not in tensors}
    return Files(
        count=1,
        bytes=header.file.stat().st_size,
        text=sum(tensor.bytes for tensor in once.values()),
        vision=0,
        vision_parameters=0,
        dtypes=dict(Counter(tensor.kind.name for tensor in tensors.values())),
        quantised=tuple(sorted({_part(name) for name, t in once.items() if t.kind.layout is not None})),
    )


def needed(
    config: ModelConfig,
    tokens: int,
    *,
    dtype: str | None = None,
    compute_dtype: str | None = None,
    files: Files | None = None,
) -> Need:
    """The bytes that a model takes while it writes after `tokens` tokens of context.

    Args:
        dtype: of the weights in memory; None: the config's.
        compute_dtype: of context and working memory; None: `dtype`. int8: matrices of layers are int8 codes in memory,
            however they are stored, and the rest is float32.
        files: of a checkpoint; packed weights then count as on disk.

    >>> from blockpress.config import PRESETS
    >>> need = needed(PRESETS["diffusiongemma-26B-A4B"](), 4096)
    >>> [round(size / 2**30, 2) for size in (need.weights, need.context, need.canvas, need.reading, need.total)]
    [47.03, 0.42, 0.19, 0.08, 47.64]
    """
    dtype = config.dtype if dtype is None else dtype
    compute = costs.activation_dtype(dtype if compute_dtype is None else compute_dtype)
    if compute_dtype == "int8":
        weights = costs.integer_weights(config, dtype)
    else:
        weights = files.text if files is not None and files.quantised else plain_weights(config, dtype)
    return Need(
        tokens=tokens,
        weights=weights,
        context=costs.paged_bytes(config, compute, tokens),
        canvas=costs.engine_peak(config, compute, tokens, 1, config.canvas_length if config.has_canvas else 0),
        reading=costs.engine_peak(config, compute, tokens, 0, min(tokens, costs.CHUNK)) if tokens else 0,
    )


def plain_weights(config: ModelConfig, dtype: str) -> int:
    """Bytes of a network's parameters, and of the two scalars of each layer, in `dtype`."""
    return (sum(costs.parameters(config).values()) + 2 * len(config.layers)) * costs.DTYPE_BYTES[dtype]


def _is_tie(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor is a second name of another one in `tensors`: only one of the two is loaded."""
    ours = our_name(name)
    first = [] if ours is None else [published_name(ours, family) for family in FAMILIES]
    return name not in first and any(other in tensors for other in first)


def _part(name: str) -> str:
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), "other")
