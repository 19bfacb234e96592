"""A tensor's name in a published checkpoint, and its name in our network.

    DiffusionGemma, published                                      ours
    model.decoder.NAME                                             NAME
    model.encoder.language_model.layers.N.layer_scalar             layers.N.causal_scalar
    model.encoder.language_model.NAME, lm_head.weight              NAME, embed_tokens.weight: ties, rarely written
    model.encoder.vision_tower.*, model.encoder.embed_vision.*     none: the tower is loaded separately

    Gemma 4, published                                             ours
    model.language_model.NAME, or model.NAME (gemma4_text)         NAME
    the same of layers.N.layer_scalar                              layers.N.causal_scalar
    lm_head.weight                                                 embed_tokens.weight: a tie, rarely written
    model.vision_tower.*, model.embed_vision.*                     none: the tower is loaded separately

The encoder and the decoder are one stack, so the published files hold it once. Some tools write the other names as
well; such a tied tensor is used where its twin is absent, and must equal its twin where both are stored. Gemma 4 has
only the causal pass, so its scalars are the causal ones.

Invariant: `our_name(published_name(x, family), family) == x` for every tensor of a network of that family.

>>> published_name("layers.3.causal_scalar")
'model.encoder.language_model.layers.3.layer_scalar'
>>> our_name("model.encoder.language_model.layers.3.layer_scalar")
'layers.3.causal_scalar'
>>> our_name("lm_head.weight")
'embed_tokens.weight'
>>> published_name("layers.3.causal_scalar", "gemma4")
'model.language_model.layers.3.layer_scalar'
>>> our_name("model.layers.3.mlp.up_proj.weight", "gemma4_text")
'layers.3.mlp.up_proj.weight'

Run it:  python -m pytest tests/checkpoints/test_names.py
Source: `DiffusionGemmaModel._tied_weights_keys`, `DiffusionGemmaForBlockDiffusion._tied_weights_keys`,
`Gemma4ForConditionalGeneration`, `Gemma4ForCausalLM`.
"""

from __future__ import annotations

import re

from blockpress.config import FAMILIES, FAMILY, Family

DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
HEAD = "lm_head.weight"
VISION = (
    "model.encoder.vision_tower.", "model.encoder.embed_vision.", "model.vision_tower.", "model.embed_vision.",
)  # fmt: skip

# Prefixes of a family's text stack: the first one is written. The bare "model." of a Gemma 4 saved by itself counts
# only before the stack's own names, since the names of towers begin with it as well.
_STACKS: dict[Family, tuple[str, ...]] = {
    "diffusion_gemma": (DECODER, ENCODER),
    "gemma4": ("model.language_model.", "model."),
    "gemma4_text": ("model.", "model.language_model."),
}
_OWN = re.compile(r"(embed_tokens|layers|norm)\..*")

_CAUSAL = re.compile(r"layers\.\d+\.causal_scalar")
_SCALAR = re.compile(r"layers\.\d+\.layer_scalar")

# Tables and factors derived from the config; programs that save their non-persistent buffers write them too.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\..*|(\w+_)?inv_freq|embed_scale)")

# What the quantised formats store in addition to (or instead of) a weight.
_QUANTISED = re.compile(
    r".*\.(weight_(packed|scale|scale_2|scale_inv|global_scale|zero_point|shape|g_idx)|(input|output|k|v)_(global_)?scale"
    r"|qweight|qzeros|scales|g_idx|absmax|quant_map|SCB|weight\..+)"
)


def published_name(ours: str, family: Family = FAMILY) -> str:
    """The name under which a tensor of our network is stored in a checkpoint of that family."""
    first = _STACKS[family][0]
    if _CAUSAL.fullmatch(ours):
        return (ENCODER if first == DECODER else first) + ours.replace("causal_scalar", "layer_scalar")
    return first + ours


def our_name(published: str, family: Family | None = None) -> str | None:
    """The tensor of our network that this one is, or is tied to; None for a name outside the stack.

    Whether a network has a tensor of that name is not checked. Without a family, the names of all families are tried.
    """
    if published == HEAD:
        return "embed_tokens.weight"
    for prefix in (prefix for candidate in ([family] if family else FAMILIES) for prefix in _STACKS[candidate]):
        name = published.removeprefix(prefix)
        if name == published or (prefix == "model." and not _OWN.fullmatch(name)):
            continue
        causal = prefix != DECODER and _SCALAR.fullmatch(name)
        return name.replace("layer_scalar", "causal_scalar") if causal else name
    return None


def is_vision(published: str) -> bool:
    """Whether it is a tensor of the vision tower or of its projection into the stack."""
    return published.startswith(VISION)


def is_derived(published: str) -> bool:
    """Whether it is derived from the config and ignored in a file, such as rotary frequencies.

    >>> is_derived("model.decoder.rotary_emb.full_attention_inv_freq")
    True
    """
    return bool(_DERIVED.fullmatch(published))


def is_quantised(published: str) -> bool:
    """Whether it is a scale, a packed weight or another tensor that only a quantised checkpoint holds.

    >>> is_quantised("model.decoder.layers.0.experts.5.up_proj.weight_scale")
    True
    >>> is_quantised("model.decoder.layers.0.router.per_expert_scale")
    False
    """
    return bool(_QUANTISED.fullmatch(published))
