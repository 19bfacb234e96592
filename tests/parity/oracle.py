"""The oracle: `transformers`' own DiffusionGemma, with the same random weights as a network of ours.

Why: everything that this package computes is checked against it. What makes it a fair oracle, and is kept here:

- its DynamicCache only (its static cache is another function beyond the window), each row run alone (its left padding
  shifts positions), no gradient, eval mode;
- every text weight random and none neutral: norms, router scales, expert scales, and layer scalars that differ between
  the causal pass and the canvas, so that a weight that is left out or swapped moves the result;
- a final norm large enough that the softcap bends the logits.

Invariant: `network_like` uses every text tensor of the oracle exactly once, or it fails.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache

import blockpress
from blockpress.config import LayerConfig, ModelConfig
from blockpress.config.vision import MINIMAL_TOWER
from blockpress.model import Cache, Network
from blockpress.model.masks import canvas_mask, causal_mask
from blockpress.model.network import CachedAttention
from blockpress.ops import attention
from blockpress.ops.attention import AttentionOp
from blockpress.ops.rope import inverse_frequencies, rotary_tables

TEMPERATURE = 0.7
SHIPPED = Path(blockpress.__file__).parent / "models" / "sudoku-nano"
Figures = dict[str, Tensor]
CACHE = (
    "cache" if "cache" in inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters else "past_key_values"
)
"""The oracle's argument for its cache: `cache` from `transformers` 5.24 on."""


def build(
    config: ModelConfig, seed: int = 0, sharpness: float = 4.0, branch: float = 1.0
) -> DiffusionGemmaForBlockDiffusion:
    """A float32 oracle of that shape with random weights.

    Args:
        sharpness: about how large the final norm's weights are; logits grow with it.
        branch: about how large the norms are that a layer's branches pass before they join the residual stream; the
            smaller, the more the net says again what it reads.
    """
    theirs = DiffusionGemmaForBlockDiffusion(_their_config(config)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    named = [*theirs.named_parameters(), *theirs.named_buffers()]
    for name, tensor in named:
        if "vision" in name or name.endswith(("inv_freq", "embed_scale")):
            continue
        if tensor.ndim < 2:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * tensor.shape[-1] ** -0.5)
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensor.mul_(branch)
    theirs.model.decoder.norm.weight.mul_(sharpness)
    return theirs


def sliding(dim: int, kv: int) -> LayerConfig:
    """A sliding layer with that size of a head and that many key/value heads."""
    return LayerConfig(kind="sliding_attention", head_dim=dim, kv_heads=kv)


def full(dim: int, kv: int) -> LayerConfig:
    """A full layer, likewise."""
    return LayerConfig(kind="full_attention", head_dim=dim, kv_heads=kv)


def load_shipped() -> DiffusionGemmaForBlockDiffusion:
    """The shipped model as `transformers` loads it, in float32; nothing may be missing, left over or of another shape."""
    theirs, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        SHIPPED, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {what: names for what, names in info.items() if names}
    assert not wrong, wrong
    return theirs.eval().requires_grad_(False)


def _their_config(config: ModelConfig) -> DiffusionGemmaConfig:
    data = config.to_dict() | {"vision_config": dict(MINIMAL_TOWER)}
    data["text_config"] |= {"use_bidirectional_attention": "vision"}  # as published; it concerns images only
    return DiffusionGemmaConfig.from_dict(data)


def network_like(
    theirs: DiffusionGemmaForBlockDiffusion, config: ModelConfig, op: AttentionOp = attention.plain
) -> Network:
    """A network of ours with the oracle's weights, in the oracle's dtype."""
    state = theirs.state_dict()
    network = Network(config, op).to(theirs.lm_head.weight.dtype).eval().requires_grad_(False)
    ours = {name: state.pop(_their_name(name)) for name in network.state_dict()}
    network.load_state_dict(ours)
    tied = [name for name in state if name.startswith("model.encoder.language_model.") or name == "lm_head.weight"]
    left = [name for name in state if name not in tied and "vision" not in name]
    assert not left, f"the oracle has weights that ours does not: {left}"
    for name in tied:
        twin = "embed_tokens.weight" if name == "lm_head.weight" else name.removeprefix("model.encoder.language_model.")
        assert torch.equal(state[name], ours[twin]), f"{name} is not the tied weight that it should be"
    return network


def _their_name(name: str) -> str:
    if name.endswith("causal_scalar"):
        return "model.encoder.language_model." + name.replace("causal_scalar", "layer_scalar")
    return "model.decoder." + name


def round_weights(theirs: DiffusionGemmaForBlockDiffusion) -> None:
    """Round every weight to bfloat16, kept as float32: what both precisions then compute from."""
    for tensor in _stored(theirs):
        tensor.copy_(tensor.bfloat16())


def to_bfloat16(theirs: DiffusionGemmaForBlockDiffusion) -> DiffusionGemmaForBlockDiffusion:
    """A bfloat16 copy as `from_pretrained(dtype=bfloat16)` makes it: RoPE frequencies stay float32."""
    low = copy.deepcopy(theirs)
    for tensor in _stored(low):
        tensor.data = tensor.data.bfloat16()
    return low


def _stored(theirs: DiffusionGemmaForBlockDiffusion) -> list[Tensor]:
    """What a checkpoint holds: parameters and persistent buffers."""
    buffers = [
        buffer
        for module in theirs.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set
    ]
    return [*theirs.parameters(), *buffers]


@dataclass(frozen=True)
class Text:
    """What one row of a comparison reads: a prompt, and two canvases of which the first is committed."""

    prompt: Tensor
    first: Tensor
    second: Tensor


def texts(config: ModelConfig, lengths: Sequence[int], seed: int = 1) -> list[Text]:
    """One random row a prompt length."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=draw)

    return [Text(tokens(n), tokens(config.canvas_length), tokens(config.canvas_length)) for n in lengths]


def their_figures(
    theirs: DiffusionGemmaForBlockDiffusion, text: Text, how: str, signals: Mapping[str, Tensor] | None = None
) -> Figures:
    """All that the oracle computes over one row, with `how` = "eager" or "sdpa" attention.

    Args:
        signals: scaled logits of the steps before, by canvas; None: the oracle's own, which are among the figures.
    """
    theirs.set_attn_implementation(how)
    cache = DynamicCache(config=theirs.config.text_config)
    figures: Figures = {}
    length = 0
    for part, tokens, canvas in (("prefill", text.prompt, text.first), ("commit", text.first, text.second)):
        out = theirs(input_ids=tokens[None], decoder_input_ids=canvas[None], **{CACHE: cache})
        length += len(tokens)
        figures[f"{part}: hidden"] = out.encoder_last_hidden_state[0]
        figures[f"{part}: next token"] = _head(theirs, out.encoder_last_hidden_state[0])
        for index, layer in enumerate(cache.layers):
            figures[f"{part}: key {index}"], figures[f"{part}: value {index}"] = layer.keys[0], layer.values[0]
        figures[f"{part}: denoise"] = out.logits[0]
        scaled = out.logits[0] / TEMPERATURE if signals is None else signals[part]
        figures[f"{part}: scaled"] = scaled
        told = theirs(
            decoder_input_ids=canvas[None],
            **{CACHE: cache},
            self_conditioning_logits=scaled[None].to(theirs.lm_head.weight.dtype),
        )
        figures[f"{part}: denoise again"] = told.logits[0]
    return figures


def _head(theirs: DiffusionGemmaForBlockDiffusion, hidden: Tensor) -> Tensor:
    cap = theirs.final_logit_softcapping
    return torch.tanh(theirs.lm_head(hidden).float() / cap) * cap


def our_figures(network: Network, rows: Sequence[Text], signals: Sequence[Mapping[str, Tensor]]) -> list[Figures]:
    """The same figures of our network, all rows in one ragged batch; `signals` as in `their_figures`."""
    figures: list[Figures] = [{} for _ in rows]
    cache = network.empty_cache(len(rows))
    first, second = (torch.stack([getattr(row, name) for row in rows]) for name in ("first", "second"))
    prompts = torch.nn.utils.rnn.pad_sequence([row.prompt for row in rows], batch_first=True)
    counts = torch.tensor([len(row.prompt) for row in rows])
    committed = torch.full_like(counts, first.shape[1])
    for part, tokens, count, canvas in (("prefill", prompts, counts, first), ("commit", first, committed, second)):
        hidden, cache = network.read(tokens, cache, count)
        scaled = torch.stack([signal[part] for signal in signals])
        next_token = network.logits(hidden)
        fresh = network.logits(network.denoise(canvas, cache, None))
        again = network.logits(network.denoise(canvas, cache, network.soft_embedding(scaled)))
        for row, own in enumerate(figures):
            own[f"{part}: hidden"] = hidden[row, : count[row]]
            own[f"{part}: next token"] = next_token[row, : count[row]]
            own[f"{part}: denoise"], own[f"{part}: denoise again"] = fresh[row], again[row]
            own |= _cached(cache, row, part)
    return figures


def _cached(cache: Cache, row: int, part: str) -> Figures:
    real = int(cache.lengths[row])
    figures: Figures = {}
    for index, (key, value) in enumerate(cache.layers):
        figures[f"{part}: key {index}"], figures[f"{part}: value {index}"] = key[row, :, :real], value[row, :, :real]
    return figures


def distance(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||, in float64. Of a cache the last tokens are compared: theirs keeps no more."""
    if ours.ndim == 3:
        ours = ours[:, ours.shape[1] - theirs.shape[1] :]
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def kinds(figures: Mapping[str, Any]) -> list[str]:
    """The figures that are compared: all but the scaled logits, which are given."""
    return [name for name in figures if not name.endswith("scaled")]


@dataclass(frozen=True)
class LayerCall:
    """One run of one of the oracle's layers: what it read, what it could look back on, what it gave.

    `context` is None where nothing was cached; `position` is that of x's first token.
    """

    index: int
    causal: bool
    position: int
    x: Tensor
    context: tuple[Tensor, Tensor] | None
    y: Tensor


def layer_calls(theirs: DiffusionGemmaForBlockDiffusion, text: Text, how: str) -> list[LayerCall]:
    """Every layer's calls while the oracle computes `their_figures` over the row."""
    calls: list[LayerCall] = []
    before: dict[torch.nn.Module, tuple[Tensor, Tensor] | None] = {}
    places = {layer: (i, True) for i, layer in enumerate(theirs.model.encoder.language_model.layers)}
    places |= {layer: (i, False) for i, layer in enumerate(theirs.model.decoder.layers)}

    def enter(module: torch.nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        cached = kwargs[CACHE].layers[places[module][0]]
        before[module] = (cached.keys, cached.values) if cached.is_initialized else None

    def leave(module: torch.nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], y: Tensor) -> None:
        index, causal = places[module]
        calls.append(LayerCall(index, causal, int(kwargs["position_ids"][0, 0]), args[0], before[module], y))

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in places]
    hooks += [layer.register_forward_hook(leave, with_kwargs=True) for layer in places]
    try:
        their_figures(theirs, text, how)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def widened(call: LayerCall) -> LayerCall:
    """The same call with its input and context in float32."""
    context = None if call.context is None else (call.context[0].float(), call.context[1].float())
    return replace(call, x=call.x.float(), context=context)


def our_layer(network: Network, call: LayerCall) -> Tensor:
    """The output of our layer of that index over the same input and context."""
    sizes = network.config.layers[call.index]
    window = network.config.sliding_window if sizes.sliding else None
    own = call.x.shape[1]
    cached = 0 if call.context is None else call.context[0].shape[2]
    lengths = torch.tensor([cached])  # relative: a sliding layer of theirs has let go of what lies before its window
    mask = (causal_mask if call.causal else canvas_mask)(lengths, cached, own, window)
    positions = call.position + torch.arange(own)[None]
    frequencies = inverse_frequencies(network.config.rope(sizes.kind), sizes.head_dim)
    rotary = rotary_tables(positions, frequencies, call.x.dtype)
    look = CachedAttention(call.context, mask, network.attention_op)
    return network.layers[call.index](call.x, rotary, look, causal=call.causal)
