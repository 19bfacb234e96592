"""The network against `transformers`, tensor by tensor, on small random checkpoints of every shape of the family.

A figure is the norm of the difference over the norm of `transformers`' tensor. Limits:

    float32     1e-5, or 4 times the distance between the oracle's own eager and SDPA runs of that tensor, if larger
    one layer   3e-6, fed with the oracle's own input and context

Rows of ours run together in one ragged batch, the oracle's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig

from blockpress.config import ModelConfig, Rope
from blockpress.model import Network

from .checkpoints import CASES, OPS, compared, oracle, own_distances, proportional, worst
from .conftest import Report
from .oracle import LayerCall, distance, kinds, layer_calls, network_like, our_figures, our_layer

pytestmark = pytest.mark.parity

FLOAT32, LAYER = 1e-5, 3e-6
cases = pytest.mark.parametrize("name", CASES)
ops = pytest.mark.parametrize("op", OPS)


def heading(kind: str) -> str:
    """The line of the table that a figure belongs to."""
    part, figure = kind.split(": ")
    figure = {"denoise": "canvas logits", "denoise again": "canvas logits, self-conditioned"}.get(figure, figure)
    return f"{part}: {'cached keys and values' if figure.startswith(('key', 'value')) else figure}"


@ops
@cases
def test_the_float32_network_equals_the_oracle_s(name: str, op: str, report: Report) -> None:
    """Prefill states, cache, next-token and canvas logits, with and without a signal, before and after a commit."""
    for seed in range(CASES[name].seeds):
        c, own = compared(name, seed), own_distances(name, seed)
        ours = our_figures(network_like(c.theirs, CASES[name].config, OPS[op]), c.rows, c.signals)
        for kind in kinds(c.eager[0]):
            limit = max(FLOAT32, 4 * own[kind])
            measured = worst(ours, c.eager, kind)
            report(f"float32, {heading(kind)}", measured, limit)
            assert measured <= limit, f"{kind}: {measured:.2e} is above {limit:.2e}"


@ops
@cases
def test_one_float32_layer_equals_the_oracle_s(name: str, op: str, report: Report) -> None:
    """Each layer by itself: no error of an earlier one can hide in its own, or be taken for it."""
    network = network_like(oracle(name, 0, False)[0], CASES[name].config, OPS[op])
    for call in their_layers(name):
        measured = distance(our_layer(network, call)[0], call.y[0])
        kind = "causal" if call.causal else "canvas"
        report(f"float32, one layer alone ({kind})", measured, LAYER)
        assert measured <= LAYER, f"{kind} layer {call.index} at {call.position}: {measured:.2e}"


@lru_cache(maxsize=1)
def their_layers(name: str) -> list[LayerCall]:
    theirs, rows = oracle(name, 0, False)
    return [call for row in rows for call in layer_calls(theirs, row, "eager")]


def _other_shape(**changes: Any) -> Callable[[Network], Network]:
    """The same weights in a network whose configuration differs."""

    def rebuild(right: Network) -> Network:
        wrong = Network(replace(right.config, **changes), right.attention_op).eval().requires_grad_(False)
        wrong.load_state_dict(right.state_dict())
        return wrong

    return rebuild


def _swap_scalars(right: Network) -> Network:
    for layer in right.layers:
        layer.layer_scalar, layer.causal_scalar = layer.causal_scalar, layer.layer_scalar
    return right


def _one_scalar_for_both(right: Network) -> Network:
    for layer in right.layers:
        layer.causal_scalar = layer.layer_scalar
    return right


def _late_canvas(right: Network) -> Network:
    """Canvas positions that begin one later."""
    run = right.run

    def shifted(x: Tensor, positions: Tensor, *args: Any, causal: bool) -> Any:
        return run(x, positions if causal else positions + 1, *args, causal=causal)

    right.run = shifted
    return right


def _signal_at_first(right: Network) -> Network:
    """Zero logits instead of a zero vector where there is no signal yet."""
    condition = right.condition

    def conditioned(canvas: Tensor, signal: Tensor | None) -> Tensor:
        zeros = torch.zeros(*canvas.shape, right.config.vocab_size)
        return condition(canvas, right.soft_embedding(zeros) if signal is None else signal)

    right.condition = conditioned
    return right


MUTATED = "canvas longer than the window"  # of four tokens; three of eight experts, five layers, RoPE in all pairs
MUTANTS: dict[str, Callable[[Network], Network]] = {
    "the window one token longer": _other_shape(sliding_window=5),
    "the window one token shorter": _other_shape(sliding_window=3),
    "one expert fewer": _other_shape(top_k_experts=2),
    "another softcap": _other_shape(softcap=31.0),
    "RoPE in half the pairs": _other_shape(full_rope=proportional(0.5)),
    "another RoPE theta": _other_shape(sliding_rope=Rope(theta=9_000.0)),
    "the two scalars swapped": _swap_scalars,
    "one scalar for both passes": _one_scalar_for_both,
    "a canvas one position late": _late_canvas,
    "zero logits for the first signal": _signal_at_first,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_network_is_found(mutant: str, report: Report) -> None:
    """The comparison can fail: each single mistake moves the logits at least a hundred limits away."""
    c = compared(MUTATED, seed=0)
    wrong = MUTANTS[mutant](network_like(c.theirs, CASES[MUTATED].config))
    ours = our_figures(wrong, c.rows, c.signals)
    measured = max(worst(ours, c.eager, kind) for kind in kinds(c.eager[0]) if "denoise" in kind)
    report("a wrong network: 1e-3 over its distance", 100 * FLOAT32 / measured, 1.0)
    assert measured >= 100 * FLOAT32


@cases
def test_configurations_are_read_alike(name: str) -> None:
    """What `transformers` saves of a configuration of ours says the same to us, and the other way round."""
    config = CASES[name].config
    read = DiffusionGemmaConfig.from_dict(config.to_dict())
    again = ModelConfig.from_dict(read.to_dict())
    assert replace(again, vision=None, dtype=config.dtype, image_id=config.image_id) == config
    published = _published_spelling(config.to_dict())
    assert ModelConfig.from_dict(published).layers == config.layers
    their_layers = DiffusionGemmaConfig.from_dict(published).text_config.per_layer_config
    for index, layer in enumerate(config.layers):
        assert (their_layers[index].head_dim, their_layers[index].num_key_value_heads) == (
            layer.head_dim,
            layer.kv_heads,
        )


def _published_spelling(data: dict[str, Any]) -> dict[str, Any]:
    """With the full layers' sizes as the published file gives them, not as differences."""
    config, text = ModelConfig.from_dict(data), dict(data["text_config"])
    text.pop("per_layer_config", None)
    size = config.layers[-1]
    return data | {
        "text_config": text | {"global_head_dim": size.head_dim, "num_global_key_value_heads": size.kv_heads}
    }


def test_the_distance_is_relative_to_theirs() -> None:
    assert math.isclose(distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])), 0.5)
    assert distance(torch.ones(1, 5, 2), torch.ones(1, 3, 2)) == 0
