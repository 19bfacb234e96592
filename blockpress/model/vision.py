"""The vision tower: the patches of a picture become soft tokens, projected to the features of the text stack.

    patches --input_proj + x, y tables--> layers (no mask, axial RoPE) --mean of pooling x pooling--> soft tokens
    soft tokens * sqrt(hidden) --standardize--> unweighted norm --embedding_projection--> features [soft, text hidden]

A layer is x + norm(attention(norm(x))), then x + norm(mlp(norm(x))). The first half of every head rotates with a
patch's column, the second with its row. Module names are those of the published checkpoints.

Invariant: a picture's features do not depend on the rest of its batch: pictures in a batch have the same grid, and
there is no padding.

Run it:  python -m pytest tests/model/test_vision.py
Source: `Gemma4VisionModel`, `DiffusionGemmaMultimodalEmbedder` of `transformers` 5.23.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockpress.config.layers import Rope
from blockpress.config.vision import VisionConfig
from blockpress.errors import MediaError
from blockpress.model.layers import Linear, RMSNorm
from blockpress.ops import attention
from blockpress.ops.attention import AttentionOp
from blockpress.ops.geglu import geglu
from blockpress.ops.norm import rms_norm
from blockpress.ops.rope import inverse_frequencies, rotary_tables, rotate
from blockpress.shapes import Heads

AT_ONCE = 10_080
"""Most patches in one batch: those of one picture of the largest budget."""

Patches = Float[Tensor, "pictures patches features"]
PatchPositions = Int[Tensor, "pictures patches 2"]
Axis = tuple[Float[Tensor, "pictures 1 patches half"], Float[Tensor, "pictures 1 patches half"]]


@runtime_checkable
class ImagePatches(Protocol):
    """The tower's input: numpy arrays of pixels from 0 to 1, [n, 3 * patch^2], and of column and row, [n, 2]."""

    @property
    def patches(self) -> Any: ...

    @property
    def positions(self) -> Any: ...


class VisionTower(nn.Module):
    """The tower and the projection after it."""

    def __init__(self, config: VisionConfig, text_hidden: int, attention_op: AttentionOp = attention.fused) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = Encoder(config, attention_op)
        self.embed_vision = Projection(config, text_hidden)

    def forward(self, pictures: Sequence[ImagePatches]) -> list[Float[Tensor, "_soft text"]]:
        """The features of each picture's soft tokens, row by row of the picture, in the order of the pictures.

        Raises:
            MediaError: patches whose size is not the tower's, or positions that are not a grid that it can pool.
        """
        weight = self.embed_vision.embedding_projection.weight
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, picture in enumerate(pictures):
            by_grid[self._grid(picture)].append(number)
        features: dict[int, Tensor] = {}
        for (rows, columns), numbers in by_grid.items():
            step = max(1, AT_ONCE // (rows * columns))
            for batch in (numbers[i : i + step] for i in range(0, len(numbers), step)):
                patches = torch.stack([torch.as_tensor(pictures[i].patches) for i in batch]).to(weight.device)
                positions = torch.stack([torch.as_tensor(pictures[i].positions) for i in batch]).to(weight.device)
                projected = self.embed_vision(self.vision_tower(patches, positions, rows))
                features |= dict(zip(batch, projected, strict=True))
        return [features[number] for number in range(len(pictures))]

    def _grid(self, picture: ImagePatches) -> tuple[int, int]:
        """Rows and columns of the picture's patches, which must be complete and in order."""
        config = self.config
        size, positions = 3 * config.patch_size**2, torch.as_tensor(picture.positions)
        if tuple(picture.patches.shape) != (len(positions), size) or not len(positions):
            raise MediaError(
                f"a picture's patches have the shape {list(picture.patches.shape)} for {len(positions)} positions",
                hint=f"the tower takes [n, {size}] of n positions: patches of {config.patch_size} pixels",
            )
        columns, rows = (int(last) + 1 for last in positions[-1])
        raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
        if (
            positions.shape != raster.shape
            or not torch.equal(positions, raster)
            or rows % config.pooling + columns % config.pooling
        ):
            raise MediaError(
                f"a picture's {len(positions)} positions are no grid of {rows} rows and {columns} columns",
                hint=f"give every patch once, row by row, and rows and columns in multiples of {config.pooling}",
            )
        if max(rows, columns) > config.positions:
            raise MediaError(
                f"a picture has {rows} rows and {columns} columns of patches, the tower knows {config.positions}",
                hint="give a smaller max_soft_tokens, or a picture that is less long",
            )
        return rows, columns


class Encoder(nn.Module):
    """The tower: patches of pictures of one grid to soft tokens, [pictures, soft, hidden]."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig, attention_op: AttentionOp) -> None:
        super().__init__()
        self.config, self.attention_op = config, attention_op
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionStack(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size, dtype=torch.float32))
            self.register_buffer("std_scale", torch.ones(config.hidden_size, dtype=torch.float32))

    def forward(self, pixels: Patches, positions: PatchPositions, rows: int) -> Float[Tensor, "pictures _soft _hidden"]:
        x = self.patch_embedder(pixels, positions)
        frequencies = inverse_frequencies(Rope(theta=self.config.rope_theta), self.config.head_dim // 2).to(x.device)
        axes = tuple(rotary_tables(indices, frequencies, x.dtype) for indices in positions.unbind(-1))
        x = self.encoder(x, axes, self.attention_op)
        # The values exceed the range of float16, so they are float32 until standardized.
        pooled = pool_patches(x, rows, self.config.pooling).float() * self.config.hidden_size**0.5
        if self.config.standardize:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        return pooled.to(x.dtype)


class PatchEmbedder(nn.Module):
    """Pixels from -1 to 1, projected, plus a learned vector for the column and one for the row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding_table = nn.Parameter(
            torch.ones(2, config.positions, config.hidden_size, dtype=torch.float32)
        )

    def forward(self, pixels: Patches, positions: PatchPositions) -> Float[Tensor, "pictures patches _hidden"]:
        x = self.input_proj((2 * (pixels - 0.5)).to(self.position_embedding_table.dtype))
        column, row = (
            table[indices] for table, indices in zip(self.position_embedding_table, positions.unbind(-1), strict=True)
        )
        return x + (column + row)


class VisionStack(nn.Module):
    """The layers in sequence."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Patches, axes: tuple[Axis, ...], op: AttentionOp) -> Patches:
        for layer in self.layers:
            x = layer(x, axes, op)
        return x


class VisionLayer(nn.Module):
    """One layer: attention and a gated MLP, each between two norms, each added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Patches, axes: tuple[Axis, ...], op: AttentionOp) -> Patches:
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), axes, op))
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


class VisionAttention(nn.Module):
    """Every patch sees every patch. Queries and keys have weighted norms, values an unweighted one; scale 1."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, self.dim, self.eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        inner, shared = config.num_heads * self.dim, config.kv_heads * self.dim
        self.q_proj = ClippableLinear(hidden, inner, clipped=config.clipped)
        self.k_proj = ClippableLinear(hidden, shared, clipped=config.clipped)
        self.v_proj = ClippableLinear(hidden, shared, clipped=config.clipped)
        self.o_proj = ClippableLinear(inner, hidden, clipped=config.clipped)
        self.q_norm = RMSNorm(self.dim, self.eps)
        self.k_norm = RMSNorm(self.dim, self.eps)

    def forward(self, x: Patches, axes: tuple[Axis, ...], op: AttentionOp) -> Patches:
        query = rotate_axes(self.q_norm(self._heads(self.q_proj(x))), axes)
        key = rotate_axes(self.k_norm(self._heads(self.k_proj(x))), axes)
        value = rms_norm(self._heads(self.v_proj(x)), None, self.eps)
        return self.o_proj(op(query, key, value, None).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Heads:
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)


class VisionMLP(nn.Module):
    """GeGLU: down(gelu_tanh(gate(x)) * up(x)), no bias."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.intermediate_size
        self.gate_proj = ClippableLinear(hidden, size, clipped=config.clipped)
        self.up_proj = ClippableLinear(hidden, size, clipped=config.clipped)
        self.down_proj = ClippableLinear(size, hidden, clipped=config.clipped)

    def forward(self, x: Patches) -> Patches:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class ClippableLinear(nn.Module):
    """A linear layer whose input and output are clamped to limits from the checkpoint, where it has them."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, inputs: int, outputs: int, *, clipped: bool) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.clipped = clipped
        if clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.tensor(-float("inf"), dtype=torch.float32))
                self.register_buffer(f"{side}_max", torch.tensor(float("inf"), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        return torch.clamp(
            self.linear(torch.clamp(x, self.input_min, self.input_max)), self.output_min, self.output_max
        )


class Projection(nn.Module):
    """Soft tokens to the text stack's features: an unweighted norm, and one matrix."""

    def __init__(self, config: VisionConfig, text_hidden: int) -> None:
        super().__init__()
        self.embedding_projection = Linear(config.hidden_size, text_hidden)
        self.eps = config.rms_norm_eps

    def forward(self, x: Float[Tensor, "pictures soft hidden"]) -> Float[Tensor, "pictures soft text"]:
        return self.embedding_projection(rms_norm(x, None, self.eps))


def rotate_axes(x: Heads, axes: tuple[Axis, ...]) -> Heads:
    """Each half of every head rotated by its own axis: the first by columns, the second by rows."""
    halves = zip(x.chunk(2, dim=-1), axes, strict=True)
    return torch.cat([rotate(half, cos, sin) for half, (cos, sin) in halves], dim=-1)


def pool_patches(x: Patches, rows: int, size: int) -> Float[Tensor, "pictures _soft features"]:
    """The mean of every square of `size x size` patches, in float32, rounded to x's type; row by row.

    >>> pool_patches(torch.arange(8.0).view(1, 8, 1), 2, 2).flatten().tolist()
    [2.5, 4.5]
    """
    grid = x.float().unflatten(1, (rows // size, size, -1, size))
    return grid.mean((2, 4)).flatten(1, 2).to(x.dtype)
