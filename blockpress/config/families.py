"""The families of networks that share one stack, and the defaults of each family's config.json.

    diffusion_gemma   DiffusionGemma: the stack run causally over the context and bidirectionally over a canvas
    gemma4            Gemma 4: only the causal pass; the text part is in `text_config`, next to the towers'
    gemma4_text       the same text part saved by itself: the file is the text part

Invariant: a field that a file leaves out has the value that the family's reference gives it, even if the stack does not
compute that value; so it is refused instead of guessed.
Run it:  python -m pytest tests/test_config.py
Source: `DiffusionGemmaTextConfig`, `Gemma4TextConfig`, `Gemma4Config` of `transformers` 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["diffusion_gemma", "gemma4", "gemma4_text"]
"""`model_type` of a config.json."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of a family.

    architecture: the class that the reference loads. text_type: `model_type` of its text part. nested: whether that
    part is in `text_config`. has_canvas: whether it denoises canvases, or is only autoregressive.
    defaults: the reference's values for fields of the text part that a file leaves out.
    """

    architecture: str
    text_type: str
    nested: bool
    has_canvas: bool
    defaults: Mapping[str, Any]


SIZES: Mapping[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
"""The reference's values for fields of the text part that a file leaves out, alike in all families. The number and the
size of experts have none."""

GLOBAL_HEAD_DIM, PATTERN = 512, 6
"""The size of a full layer's head, and every how manyth layer is full."""

SOFTCAP, CANVAS = 30.0, 256
"""Of DiffusionGemma: the reference has the first as a class attribute, so it is missing from what its configs write."""

_GEMMA4_DEFAULTS: Mapping[str, Any] = {
    **SIZES,
    "final_logit_softcapping": None,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 256,
}

FAMILIES: Mapping[Family, Traits] = {
    "diffusion_gemma": Traits(
        architecture="DiffusionGemmaForBlockDiffusion",
        text_type="diffusion_gemma_text",
        nested=True,
        has_canvas=True,
        defaults={**SIZES, "final_logit_softcapping": SOFTCAP},
    ),
    "gemma4": Traits(
        architecture="Gemma4ForConditionalGeneration",
        text_type="gemma4_text",
        nested=True,
        has_canvas=False,
        defaults=_GEMMA4_DEFAULTS,
    ),
    "gemma4_text": Traits(
        architecture="Gemma4ForCausalLM",
        text_type="gemma4_text",
        nested=False,
        has_canvas=False,
        defaults=_GEMMA4_DEFAULTS,
    ),
}

REASONS: Mapping[str, str] = {
    "hidden_size_per_layer_input": "per-layer inputs, as in Gemma 4 E2B and E4B, are not computed; absent means 256",
    "num_kv_shared_layers": "layers that reuse the keys and values of others, as in E2B and E4B, are not computed",
    "use_double_wide_mlp": "the double-wide MLP of Gemma 4 E2B is not computed",
    "use_bidirectional_attention": "text is read causally here",
    "audio_config": "there is no audio tower here, which Gemma 4 E2B and E4B have",
    "tie_word_embeddings": "embedding and output head are one matrix here",
}
"""Why a field is refused, where its name does not tell."""
