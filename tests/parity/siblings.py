"""Random Gemma 4 checkpoints of every shape that our stack computes, as `transformers` builds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

from blockpress.config import PRESETS, ModelConfig
from blockpress.config.vision import MINIMAL_TOWER

from .oracle import full, sliding

Theirs = Gemma4ForConditionalGeneration | Gemma4ForCausalLM
TINY = replace(PRESETS["tiny"](), family="gemma4", canvas_length=1)
DENSE: dict[str, Any] = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}
LAYERS = (sliding(8, 2), full(16, 2), sliding(8, 2), full(16, 2))
SHARED = (sliding(8, 2), full(16, 1), sliding(8, 2), full(16, 1))


@dataclass(frozen=True)
class Case:
    config: ModelConfig
    lengths: tuple[int, ...] = (3, 20, 9)
    vision: bool = False


CASES = {
    "experts, keys are values": Case(replace(TINY, layers=SHARED)),
    "experts, keys are values, with a tower": Case(replace(TINY, layers=SHARED), vision=True),
    "experts, full layers with values": Case(replace(TINY, keys_are_values=False, layers=LAYERS, softcap=None)),
    "experts, saved by itself": Case(replace(TINY, family="gemma4_text", image_id=None, layers=SHARED), (1, 7, 8, 30)),
    "dense, keys are values": Case(replace(TINY, **DENSE, layers=SHARED)),
    "dense, full layers with values": Case(replace(TINY, **DENSE, keys_are_values=False, layers=LAYERS)),
    "dense, saved by itself, no softcap": Case(
        replace(TINY, **DENSE, family="gemma4_text", image_id=None, keys_are_values=False, layers=LAYERS, softcap=None)
    ),
    "full layers with values and their own number of heads": Case(
        replace(TINY, **DENSE, keys_are_values=False, layers=(sliding(8, 2), full(16, 4)), sliding_window=2)
    ),
    "the published pattern, twice": Case(
        replace(
            TINY,
            num_heads=8,
            layers=tuple(full(32, 1) if i % 6 == 5 else sliding(8, 2) for i in range(12)),
            sliding_window=10,
            num_experts=16,
            top_k_experts=8,
            rms_norm_eps=1e-5,
            softcap=20.0,
        ),
        (4, 25),
    ),
}


def build(config: ModelConfig, vision: bool = False, seed: int = 0) -> Theirs:
    """A float32 oracle with random weights, none of them neutral, whose logits the softcap bends."""
    data = config.to_dict()
    if config.family == "gemma4_text":
        theirs: Theirs = Gemma4ForCausalLM(Gemma4TextConfig.from_dict(data))
    else:
        theirs = Gemma4ForConditionalGeneration(
            Gemma4Config.from_dict(data | {"vision_config": MINIMAL_TOWER if vision else None})
        )
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if not name.endswith(("inv_freq", "embed_scale")):
            flat = tensor.ndim < 2
            fresh = (
                torch.rand(tensor.shape, generator=draw) + 0.5 if flat else torch.randn(tensor.shape, generator=draw)
            )
            tensor.copy_(fresh if flat else fresh * tensor.shape[-1] ** -0.5)
    text_model(theirs).norm.weight.mul_(4.0)
    return theirs.eval().requires_grad_(False)


def text_model(theirs: Theirs) -> Any:
    return theirs.model if isinstance(theirs, Gemma4ForCausalLM) else theirs.model.language_model


@lru_cache(maxsize=1)
def oracle(name: str) -> Theirs:
    """The oracle of a case; as long as one case is asked for, it is built once."""
    return build(CASES[name].config, CASES[name].vision)


def checkpoint(name: str, workspace: Path) -> tuple[Theirs, Path]:
    """The oracle of a case, and the directory into which it saved itself."""
    theirs, directory = oracle(name), workspace / "siblings" / str(list(CASES).index(name))
    if not directory.is_dir():
        theirs.save_pretrained(directory)
    return theirs, directory


def prompts(case: Case, seed: int = 0) -> list[list[int]]:
    """Random tokens, a row for each of the case's lengths."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 62, (length,), generator=draw).tolist() for length in case.lengths]
