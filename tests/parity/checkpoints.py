"""Random checkpoints of every shape of the family, and what the oracle makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from blockpress.config import PRESETS, ModelConfig, Rope
from blockpress.ops import attention

from .oracle import Figures, Text, build, distance, full, kinds, round_weights, sliding, texts, their_figures

OPS = {"plain": attention.plain, "fused": attention.fused, "grouped": attention.grouped}
PARTS = ("prefill", "commit")


def proportional(partial: float, theta: float = 10_000.0) -> Rope:
    return Rope(theta=theta, kind="proportional", partial=partial)


@dataclass(frozen=True)
class Case:
    """A shape, the prompt lengths of its rows, and how many random checkpoints of it are compared."""

    config: ModelConfig
    lengths: tuple[int, ...]
    seeds: int = 1


TINY = PRESETS["tiny"]()  # hidden 32, 4 heads, one sliding and one full layer, window 8, 2 of 4 experts, canvas 12
CASES = {
    "one prompt beyond the window": Case(TINY, (20,), seeds=2),
    "prompts short of the window, at it and beyond": Case(
        replace(TINY, sliding_window=16, num_experts=2, top_k_experts=1, full_rope=proportional(0.5)),
        (1, 14, 15, 16, 40),
    ),
    "canvas longer than the window": Case(
        replace(
            TINY,
            sliding_window=4,
            canvas_length=24,
            num_experts=8,
            top_k_experts=3,
            layers=(sliding(8, 4), sliding(8, 4), full(8, 2), sliding(8, 4), full(8, 2)),
            full_rope=proportional(1.0),
        ),
        (2, 30),
    ),
    "window never crossed, all experts, large full heads": Case(
        replace(TINY, sliding_window=512, top_k_experts=4, layers=(sliding(16, 1), full(32, 4))), (5, 60)
    ),
    "full layers only": Case(
        replace(TINY, layers=(full(16, 2), full(16, 2)), num_experts=3, full_rope=proportional(0.25, 100.0)), (7,)
    ),
    "the published pattern, twice": Case(
        replace(
            TINY,
            vocab_size=1000,
            hidden_size=48,
            num_heads=8,
            layers=tuple(full(32, 1) if i % 6 == 5 else sliding(8, 2) for i in range(12)),
            sliding_window=10,
            num_experts=16,
            top_k_experts=8,
            rms_norm_eps=1e-5,
            softcap=20.0,
        ),
        (3, 20),
    ),
    "full first, one expert, window of two": Case(
        replace(
            TINY,
            layers=(full(8, 4), sliding(16, 2), sliding(16, 2), full(8, 4)),
            sliding_window=2,
            sliding_rope=Rope(theta=100.0),
            num_experts=1,
            top_k_experts=1,
        ),
        (11, 5),
    ),
    "the published vocabulary": Case(
        replace(
            TINY, vocab_size=262_144, hidden_size=16, num_heads=2, layers=(sliding(8, 1), full(16, 2)), canvas_length=8
        ),
        (13,),
    ),
    "sudoku-nano": Case(PRESETS["sudoku-nano"](), (140,)),
}


@dataclass(frozen=True)
class Compared:
    """One random checkpoint: the oracle, its rows, its eager figures, and the signals that are given to all."""

    theirs: DiffusionGemmaForBlockDiffusion
    rows: list[Text]
    eager: list[Figures]
    signals: list[dict[str, Tensor]]


@lru_cache(maxsize=4)
def compared(name: str, seed: int, rounded: bool = False) -> Compared:
    """The oracle's float32 side of a case; `rounded`: with weights that bfloat16 can hold."""
    theirs, rows = oracle(name, seed, rounded)
    eager = [their_figures(theirs, row, "eager") for row in rows]
    signals = [{part: figures[f"{part}: scaled"] for part in PARTS} for figures in eager]
    return Compared(theirs, rows, eager, signals)


@lru_cache(maxsize=4)
def own_distances(name: str, seed: int) -> dict[str, float]:
    """How far the oracle's SDPA run is from its eager one, figure by figure."""
    c = compared(name, seed)
    sdpa = [their_figures(c.theirs, row, "sdpa", told) for row, told in zip(c.rows, c.signals, strict=True)]
    return {kind: worst(sdpa, c.eager, kind) for kind in kinds(c.eager[0])}


@lru_cache(maxsize=4)
def oracle(name: str, seed: int, rounded: bool) -> tuple[DiffusionGemmaForBlockDiffusion, list[Text]]:
    case = CASES[name]
    theirs = build(case.config, seed)
    if rounded:
        round_weights(theirs)
    return theirs, texts(case.config, case.lengths, seed)


def worst(ours: list[Figures], theirs: list[Figures], kind: str) -> float:
    """The largest distance of one figure over the rows."""
    return max(distance(a[kind], b[kind]) for a, b in zip(ours, theirs, strict=True))
