"""The logits of both passes, to look inside a model: `LM.denoise_logits`, `LM.next_token_logits`, `LM.token_logprobs`.

Invariant: they are those of the reference loop; the engine is not involved.
Run it:  python -m pytest tests/lm/test_model.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.decoding import Cancel, TokenLogprob
from blockpress.decoding.scoring import score_prompt
from blockpress.errors import RequestError
from blockpress.lm.arguments import check_cancel, check_logprobs
from blockpress.lm.rows import check_context_length, check_ids
from blockpress.model import Network
from blockpress.ops.computing import computing


@computing()
@torch.inference_mode()
def denoise_logits(
    network: Network,
    prompt_ids: Sequence[int] | Tensor,
    canvas_ids: Sequence[int] | Tensor,
    previous_logits: Float32[Tensor, "canvas vocab"] | None,
) -> Float32[Tensor, "canvas vocab"]:
    """Softcapped float32 logits of one denoising step for a canvas after a prompt."""
    config = network.config
    canvas = check_ids(config, canvas_ids, "canvas_ids")
    prompt = check_ids(config, prompt_ids, "prompt_ids")
    shape = (len(canvas), config.vocab_size)
    if previous_logits is not None and not isinstance(previous_logits, Tensor):
        raise RequestError(f"previous_logits is {previous_logits!r:.60}", hint="give a tensor, or None")
    if previous_logits is not None and tuple(previous_logits.shape) != shape:
        raise RequestError(
            f"previous_logits has the shape {tuple(previous_logits.shape)}",
            hint=f"it must be {shape}: [canvas, vocabulary]",
        )
    check_context_length(config, len(prompt), len(canvas))
    device = network.device
    _, cache = network.read(torch.tensor([prompt], device=device), network.empty_cache(1))
    signal = None if previous_logits is None else network.soft_embedding(previous_logits[None].float().to(device))
    hidden = network.denoise(torch.tensor([canvas], device=device), cache, signal)
    return network.logits(hidden)[0]


@computing()
@torch.inference_mode()
def next_token_logits(network: Network, ids: Sequence[int] | Tensor) -> Float32[Tensor, "length vocab"]:
    """Softcapped float32 logits of the token after each token, from the causal pass."""
    tokens = check_ids(network.config, ids, "ids")
    check_context_length(network.config, len(tokens), 0)
    hidden, _ = network.read(torch.tensor([tokens], device=network.device), network.empty_cache(1))
    return network.logits(hidden)[0]


@computing()
def token_logprobs(
    network: Network, ids: Sequence[int] | Tensor, top: int = 0, cancel: Cancel | None = None
) -> list[TokenLogprob]:
    """The log-probability of every token but the first, from the causal pass, in pieces of the prompt and blocks of
    the vocabulary."""
    tokens = check_ids(network.config, ids, "ids")
    check_context_length(network.config, len(tokens), 0)
    return score_prompt(network, tokens, check_logprobs(top, network.config) or 0, check_cancel(cancel))
