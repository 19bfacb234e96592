"""Networks by name: the published ones, the shipped one, and the smallest that has every part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blockpress.config.layers import LayerConfig, Rope
from blockpress.config.model import ModelConfig


def diffusiongemma_26b_a4b() -> ModelConfig:
    """The published model: 25.2 billion parameters, 3.8 billion active per token."""
    sliding = LayerConfig(kind="sliding_attention", head_dim=256, kv_heads=8)
    full = LayerConfig(kind="full_attention", head_dim=512, kv_heads=2)
    return ModelConfig(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        num_heads=16,
        layers=tuple(full if i % 6 == 5 else sliding for i in range(30)),
        sliding_window=1024,
        num_experts=128,
        top_k_experts=8,
        expert_size=704,
        context_length=262_144,
        eos_ids=(1, 106, 50),
        image_id=258_880,
        dtype="bfloat16",
    )


def gemma4_26b_a4b() -> ModelConfig:
    """Its autoregressive sibling: the same stack without self-conditioning and canvas, 25.2 billion parameters."""
    return replace(diffusiongemma_26b_a4b(), family="gemma4", canvas_length=1)


def tiny() -> ModelConfig:
    """Two layers, one of each kind: what the tests and the examples run."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        layers=(
            LayerConfig(kind="sliding_attention", head_dim=8, kv_heads=2),
            LayerConfig(kind="full_attention", head_dim=16, kv_heads=1),
        ),
        sliding_window=8,
        num_experts=4,
        top_k_experts=2,
        expert_size=16,
        canvas_length=12,
        context_length=256,
        image_id=63,
    )


LINES_OF_TEN = 11.92
"""The base of RoPE by which, in a head of 32, one pair turns once in ten tokens and one nearly once in thirty, so that
position alone tells which cells of lines of ten share a column. By 10,000 no pair does (docs/log.md, 2026-11-30)."""


def sudoku_nano() -> ModelConfig:
    """The shipped model: a puzzle of 9 x 9 digits as the prompt, the solved grid as the answer, 90 tokens each."""
    sliding = LayerConfig(kind="sliding_attention", head_dim=32, kv_heads=6)
    full = LayerConfig(kind="full_attention", head_dim=32, kv_heads=6)
    return ModelConfig(
        vocab_size=16,
        hidden_size=192,
        intermediate_size=192,
        num_heads=6,
        layers=(sliding, sliding, full, sliding, sliding, full),
        sliding_window=128,
        sliding_rope=Rope(theta=LINES_OF_TEN),
        full_rope=Rope(theta=LINES_OF_TEN, kind="proportional", partial=0.75),
        num_experts=4,
        top_k_experts=2,
        expert_size=64,
        canvas_length=90,
        context_length=256,
        image_id=15,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "diffusiongemma-26B-A4B": diffusiongemma_26b_a4b,
    "gemma4-26B-A4B": gemma4_26b_a4b,
    "sudoku-nano": sudoku_nano,
    "tiny": tiny,
}
