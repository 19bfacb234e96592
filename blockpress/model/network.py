"""The whole network: one stack of layers, run causally over a prompt or bidirectionally over a canvas.

    read     tokens --embed--> stack (causal mask, causal scalars)  --norm--> hidden   new keys and values are cached
    denoise  canvas --embed + signal--> stack (canvas mask)         --norm--> hidden   the cache is only read
    logits   hidden @ embedding^T, softcap

Gemma 4 has only the first and the last line: no canvas, and no self-conditioning.

Invariant: `denoise` never changes a cache; both passes use the same weights and differ in mask, scalars and input.
Source: reference model, `DiffusionGemmaEncoderTextModel`, `DiffusionGemmaDecoderModel`, `Gemma4TextModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn

from blockpress.config import LayerKind, ModelConfig
from blockpress.config.vision import pictures_see_themselves
from blockpress.errors import RequestError
from blockpress.model.cache import Cache, KeyValue
from blockpress.model.layers import (
    Attend,
    Causal,
    Embedding,
    Layer,
    RMSNorm,
    Rotary,
    SelfConditioning,
    Wanted,
    packed_weights,
)
from blockpress.model.masks import canvas_mask, causal_mask
from blockpress.model.pictures import Images, insert_images
from blockpress.ops import attention
from blockpress.ops.attention import AttentionOp
from blockpress.ops.integers import IntegerWeight
from blockpress.ops.linear import combine, linear
from blockpress.ops.packed import HalfFloats
from blockpress.ops.rope import inverse_frequencies, rotary_tables
from blockpress.shapes import Canvas, Heads, Hidden, KeyHeads, Logits, Mask, Positions, Signal, Tokens

MOST_KEPT = 1 << 12
"""Most positions whose tables are kept for the next forward."""

# Not in the network itself: tables computed in inference mode must not be copied or trained with.
_TABLES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, Tensor, dict[LayerKind, Rotary]]] = WeakKeyDictionary()


class CachedAttention:
    """A layer's attention over its cached context and the new keys and values, which are kept in `new_kv`."""

    new_kv: KeyValue

    def __init__(self, context: KeyValue | None, mask: Mask | None, op: AttentionOp) -> None:
        self.context, self.mask, self.op = context, mask, op

    def __call__(self, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        self.new_kv = (key, value)
        if self.context is not None:
            key, value = torch.cat((self.context[0], key), dim=2), torch.cat((self.context[1], value), dim=2)
        return self.op(query, key, value, self.mask)


class Network(nn.Module):
    """A DiffusionGemma or Gemma 4 network with tied input embedding, output head and self-conditioning embedding."""

    def __init__(self, config: ModelConfig, attention_op: AttentionOp = attention.grouped) -> None:
        super().__init__()
        self.config = config
        self.attention_op = attention_op
        self.pictures_see_themselves = pictures_see_themselves(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config) if config.has_canvas else None
        self._inverse_frequencies: dict[tuple[LayerKind, torch.device], Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: of activations, products (but see `product_dtype`) and the cache."""
        return self.norm.weight.dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """The type in which layers multiply: `dtype`, or int8 where their matrices are integers."""
        packed = (weight for module in self.modules() for weight in packed_weights(module).values())
        return torch.int8 if any(isinstance(weight, IntegerWeight) for weight in packed) else self.dtype

    @property
    def storage_dtype(self) -> torch.dtype:
        """The type of float matrices in memory: `dtype`, or a narrower type that is widened where it is used."""
        for module in self.modules():
            for weight in packed_weights(module).values():
                if isinstance(weight, HalfFloats):
                    return weight.values.dtype
        return self.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def empty_cache(self, batch: int) -> Cache:
        """A cache of `batch` rows without any context."""
        shapes = [(layer.kv_heads, layer.head_dim) for layer in self.config.layers]
        return Cache.empty(shapes, batch, self.dtype, self.device)

    def read(
        self,
        tokens: Tokens,
        cache: Cache,
        counts: Int[Tensor, " batch"] | None = None,
        images: Images | None = None,
    ) -> tuple[Hidden, Cache]:
        """The causal pass over `tokens`, after the tokens of the cache.

        Args:
            counts: tokens of each row without the right padding; None: no padding.
            images: for each row its pictures: the index in `tokens` of the first soft token, and the features that
                replace embeddings from there on, [soft tokens, hidden]. The tokens of one picture see each other in
                both directions, so `tokens` must contain the whole picture.

        Returns:
            hidden states after the final norm (undefined for padding), and the cache with the tokens added.

        Raises:
            MediaError: a picture that does not fit. RequestError: pictures for a family that masks them differently.
        """
        length = tokens.shape[1]
        if counts is None:
            counts = torch.full_like(cache.lengths, length)
        positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
        x, picture_ids = self.embed(tokens), None
        if images is not None:
            if not self.config.has_canvas:
                raise RequestError(
                    f"images are not read in the family {self.config.family}",
                    hint="leave them out, or use DiffusionGemma",
                )
            x, picture_ids = insert_images(x, counts, images)
            picture_ids = picture_ids if self.pictures_see_themselves else None
        windows = self.windows().items()
        masks = {kind: causal_mask(cache.lengths, cache.width, length, window, picture_ids) for kind, window in windows}
        attends = [
            CachedAttention(context, masks[layer.kind], self.attention_op)
            for layer, context in zip(self.config.layers, cache.layers, strict=True)
        ]
        hidden = self.run(x, positions, attends, causal=True)
        return hidden, cache.append([attend.new_kv for attend in attends], counts)

    def denoise(self, canvas: Canvas, cache: Cache, signal: Signal | None) -> Hidden:
        """The bidirectional pass over a canvas that follows each row's context.

        Args:
            signal: the self-conditioning embedding of the last step (`soft_embedding`); None at the first step: zeros.

        Returns:
            hidden states after the final norm, [batch, canvas, hidden].

        Raises:
            RequestError: the family has no canvas.
        """
        x, length = self.condition(canvas, signal), canvas.shape[1]
        windows = self.windows()
        attends, masks = [], {}
        for index, layer in enumerate(self.config.layers):
            context, start = cache.recent(index, windows[layer.kind])
            if layer.kind not in masks:
                masks[layer.kind] = canvas_mask(cache.lengths, cache.width - start, length, windows[layer.kind], start)
            attends.append(CachedAttention(context, masks[layer.kind], self.attention_op))
        positions = cache.lengths[:, None] + torch.arange(length, device=canvas.device)
        return self.run(x, positions, attends, causal=False)

    def run(
        self, x: Hidden, positions: Positions, attends: Sequence[Attend], *, causal: Causal, skip: int = 0
    ) -> Wanted:
        """The stack itself: layers and final norm.

        Args:
            attends: for each layer, its attention, which also stores its keys and values.
            causal: whether the rows belong to the causal pass; one value per row where a batch row has both kinds.
            skip: how many of the first rows are needed only for their keys and values.

        Returns:
            hidden states of the other rows, [batch, length - skip, hidden].
        """
        rotary = self._rotary(positions, x.dtype)
        last = len(self.config.layers) - 1
        for index, (layer, sizes) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            left_out = skip if index == last else 0
            x = layer(x, rotary[sizes.kind], attends[index], causal=causal, skip=left_out)
        return self.norm(x)

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Hidden:
        """Rows of the embedding times sqrt(hidden) rounded to the weight's dtype; a placeholder has the pad token's."""
        for token in self.config.placeholder_ids:
            assert self.config.pad_id is not None, "a config without a pad token has no placeholders"
            tokens = tokens.masked_fill(tokens == token, self.config.pad_id)
        return self.embed_tokens(tokens, self.dtype) * self.embed_scale()

    def condition(self, canvas: Canvas, signal: Signal | None) -> Hidden:
        """The canvas's input: its embedding plus the self-conditioning embedding (None: zeros), normed.

        Raises:
            RequestError: the family has no canvas.
        """
        if self.self_conditioning is None:
            raise RequestError(
                f"the family {self.config.family} has no canvas to denoise", hint="use the mode autoregressive"
            )
        embedded = self.embed(canvas)
        return self.self_conditioning(embedded, torch.zeros_like(embedded) if signal is None else signal)

    def logits(self, hidden: Hidden) -> Logits:
        """Float32 logits, softcapped where the config has a cap.

        Rounded as the references do: the product to the weight's dtype; DiffusionGemma caps it in float32, Gemma 4 in
        the weight's dtype.
        """
        product, cap = linear(hidden, self.embed_tokens.weight), self.config.softcap
        if self.config.has_canvas:
            product = product.float()
        return (product if cap is None else torch.tanh(product / cap) * cap).float()

    def soft_embedding(self, scaled: Float32[Tensor, "batch canvas vocab"]) -> Signal:
        """The expected embedding under softmax(scaled logits): the self-conditioning embedding of the next step.

        Rounded where the reference rounds: logits to the weight's dtype, softmax in float32, back, times sqrt(hidden).
        """
        probabilities = torch.softmax(scaled.to(self.dtype), dim=-1, dtype=torch.float32).to(self.dtype)
        return combine(probabilities, self.embed_tokens.weight) * self.embed_scale()

    def embed_scale(self) -> Tensor:
        """sqrt(hidden), rounded to the weight's dtype as in the reference."""
        # A fill, not a copy: on a GPU a copy would wait for the device, and could not be captured.
        return torch.full((), self.config.hidden_size**0.5, dtype=self.dtype, device=self.device)

    def windows(self) -> dict[LayerKind, int | None]:
        """How far each kind of layer looks back, the token itself included; None: no limit."""
        windows: dict[LayerKind, int | None] = {}
        for layer in self.config.layers:
            windows[layer.kind] = self.config.sliding_window if layer.sliding else None
        return windows

    def _rotary(self, positions: Positions, dtype: torch.dtype) -> dict[LayerKind, Rotary]:
        """Cosines and sines for each kind of layer; reused from the last forward if it had the same positions.

        A canvas keeps its positions from step to step, and on a CPU torch's cosine takes as long as an attention.
        """
        traced = torch.compiler.is_compiling()  # a table from outside would break the graph
        keep = not traced and positions.device.type == "cpu" and torch.is_inference_mode_enabled()
        keep = keep and positions.numel() <= MOST_KEPT
        last = _TABLES.get(self) if keep else None
        if last is not None and last[0] == dtype and torch.equal(last[1], positions):
            return last[2]
        rotary = {kind: rotary_tables(positions, self._frequencies(kind), dtype) for kind in self.windows()}
        if keep:
            _TABLES[self] = (dtype, positions.clone(), rotary)
        return rotary

    def _frequencies(self, kind: LayerKind) -> Float32[Tensor, " half"]:
        if (kind, self.device) not in self._inverse_frequencies:
            dim = next(layer.head_dim for layer in self.config.layers if layer.kind == kind)
            self._inverse_frequencies[kind, self.device] = inverse_frequencies(self.config.rope(kind), dim).to(
                self.device
            )
        return self._inverse_frequencies[kind, self.device]
