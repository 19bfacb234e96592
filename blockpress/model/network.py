"""The whole network: one stack of layers, run causally over a prompt or bidirectionally over a canvas.

    read     tokens --embed--> stack (causal mask, causal scalars)  --norm--> hidden   keys and values join the cache
    denoise  canvas --embed + signal--> stack (canvas mask)         --norm--> hidden   the cache is only read
    logits   hidden @ embedding^T, softcap

Gemma 4 is the first and the last line alone: it has no canvas, and no self-conditioning.

Invariant: `denoise` never changes a cache; both passes use the same weights and differ in mask, scalars and input.
Source: reference model, `DiffusionGemmaEncoderTextModel`, `DiffusionGemmaDecoderModel`, `Gemma4TextModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn

from blockpress.config import LayerKind, ModelConfig
from blockpress.config.vision import pictures_see_themselves
from blockpress.errors import RequestError
from blockpress.model.cache import Cache, KeyValue
from blockpress.model.layers import AttentionOp, Embedding, Layer, RMSNorm, SelfConditioning
from blockpress.model.masks import canvas_mask, causal_mask
from blockpress.model.pictures import Images, place
from blockpress.ops import attention
from blockpress.ops.linear import combine, linear
from blockpress.ops.rope import inverse_frequencies, rotary_tables
from blockpress.shapes import Canvas, Hidden, Logits, Mask, Positions, Signal, Tokens


class Network(nn.Module):
    """A DiffusionGemma or Gemma 4 network with tied input embedding, output head and self-conditioning embedding."""

    def __init__(self, config: ModelConfig, attention_op: AttentionOp = attention.plain) -> None:
        super().__init__()
        self.config = config
        self.attention_op = attention_op
        self.pictures_see_themselves = pictures_see_themselves(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config) if config.has_canvas else None

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

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
        """The causal pass over `tokens`, right-padded where `counts` says so, behind what the cache holds.

        Args:
            images: for each row its pictures: the place in `tokens` of the first soft token, and the features that
                take the embedding's place from there on, [soft tokens, hidden]. The tokens of one picture see each
                other in both directions, so a picture must lie in `tokens` as a whole.

        Returns:
            hidden states after the final norm (those of padding mean nothing), and the cache with the tokens added.

        Raises:
            MediaError: a picture that does not fit. RequestError: pictures for a family that masks them otherwise.
        """
        own = tokens.shape[1]
        if counts is None:
            counts = torch.full_like(cache.lengths, own)
        positions = cache.lengths[:, None] + torch.arange(own, device=tokens.device)
        x, runs = self.embed(tokens), None
        if images is not None:
            if not self.config.has_canvas:
                raise RequestError(
                    f"images are not read in the family {self.config.family}",
                    hint="leave them out, or use DiffusionGemma",
                )
            x, runs = place(x, counts, images)
            runs = runs if self.pictures_see_themselves else None
        windows = self._windows().items()
        masks = {kind: causal_mask(cache.lengths, cache.width, own, window, runs) for kind, window in windows}
        hidden, fresh = self.run(x, positions, cache.layers, masks, causal=True)
        return hidden, cache.append(fresh, counts)

    def denoise(self, canvas: Canvas, cache: Cache, signal: Signal | None) -> Hidden:
        """The bidirectional pass over a canvas that goes on from each row's context.

        Args:
            signal: what the last step believed (`soft_embedding`), or None at the first step: an exact zero vector.

        Returns:
            hidden states after the final norm, [batch, canvas, hidden].

        Raises:
            RequestError: the family has no canvas.
        """
        x, own = self.condition(canvas, signal), canvas.shape[1]
        windows = self._windows()
        contexts, masks = [], {}
        for index, layer in enumerate(self.config.layers):
            context, start = cache.recent(index, windows[layer.kind])
            contexts.append(context)
            if layer.kind not in masks:
                masks[layer.kind] = canvas_mask(cache.lengths, cache.width - start, own, windows[layer.kind], start)
        positions = cache.lengths[:, None] + torch.arange(own, device=canvas.device)
        hidden, _ = self.run(x, positions, contexts, masks, causal=False)
        return hidden

    def run(
        self,
        x: Hidden,
        positions: Positions,
        contexts: Sequence[KeyValue] | None,
        masks: Mapping[LayerKind, Mask | None],
        *,
        causal: bool,
    ) -> tuple[Hidden, list[KeyValue]]:
        """The stack itself: layers and final norm, over each layer's context and x's own rows."""
        rotary = {kind: rotary_tables(positions, self._frequencies(kind), x.dtype) for kind in masks}
        fresh = []
        for index, (layer, sizes) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            context = None if contexts is None else contexts[index]
            x, own = layer(x, rotary[sizes.kind], context, masks[sizes.kind], causal=causal, op=self.attention_op)
            fresh.append(own)
        return self.norm(x), fresh

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Hidden:
        """Rows of the embedding times sqrt(hidden), which is rounded to the weight's dtype."""
        return self.embed_tokens(tokens, self.dtype) * self._embed_scale()

    def condition(self, canvas: Canvas, signal: Signal | None) -> Hidden:
        """The canvas's input: its embedding and the self-conditioning signal (None: zeros), normed together.

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
        """The expected embedding under softmax(scaled logits): the signal for the next step.

        Rounded where the reference rounds: logits to the weight's dtype, softmax in float32, back, times sqrt(hidden).
        """
        belief = torch.softmax(scaled.to(self.dtype), dim=-1, dtype=torch.float32).to(self.dtype)
        return combine(belief, self.embed_tokens.weight) * self._embed_scale()

    def _embed_scale(self) -> Tensor:
        return torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype, device=self.device)

    def _windows(self) -> dict[LayerKind, int | None]:
        windows: dict[LayerKind, int | None] = {}
        for layer in self.config.layers:
            windows[layer.kind] = self.config.sliding_window if layer.sliding else None
        return windows

    def _frequencies(self, kind: LayerKind) -> Float32[Tensor, " half"]:
        dim = next(layer.head_dim for layer in self.config.layers if layer.kind == kind)
        return inverse_frequencies(self.config.rope(kind), dim).to(self.device)
