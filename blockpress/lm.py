"""The object that `blockpress.load` gives: text in, text out, and the logits for whoever wants to look inside.

Invariant: whatever comes in is checked here, by name, before the first forward; nothing that is accepted is ignored.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

import torch
from jaxtyping import Float32
from torch import Tensor

from blockpress.config import GenerationConfig, ModelConfig, Sampling
from blockpress.errors import CheckpointError, PromptTooLong, RequestError
from blockpress.generate import generate
from blockpress.reply import Cancel, Done, Event, Reply, Row
from blockpress.text import StreamDecoder, Tokenizer
from blockpress.weights import load_config, load_generation, load_network, resolve

if TYPE_CHECKING:
    from blockpress.model import Network

Prompt = str | Sequence[int] | Tensor


def load(name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> LM:
    """Load a model: a shipped name such as "sudoku-nano", or the directory of a checkpoint.

    Args:
        dtype: of the weights in memory, a torch dtype or its name ("float32", "bfloat16"); None: what the checkpoint's
            config.json names.
        device: where the network runs, such as "cpu" or "cuda".

    Raises:
        CheckpointError, ConfigError: what is wrong with the files, and what to do.
    """
    if not isinstance(name, str | Path):
        raise RequestError(f"name is {name!r:.60}", hint="give a shipped model's name or the directory of a checkpoint")
    path = resolve(name)
    config = load_config(path)
    return LM(
        path=path,
        network=load_network(path, dtype=dtype, device=device),
        generation=load_generation(path, config),
        tokenizer=Tokenizer.find(path),
    )


class LM:
    """A loaded model. `path` is its directory, `config` its shape, `network` the torch module inside."""

    def __init__(
        self, *, path: Path, network: Network, generation: GenerationConfig, tokenizer: Tokenizer | None
    ) -> None:
        self.path, self.network, self.generation, self.tokenizer = path, network, generation, tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the ids that the model wants in front.

        Raises:
            TextError: the vocabulary has no token for some of the text.
        """
        return self._needs_tokenizer("encode").encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids; control tokens are left out.

        Raises:
            TextError: an id outside the vocabulary.
        """
        return self._needs_tokenizer("decode").decode(_as_list(ids, "ids"))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too; it is meant as one
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> Reply: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> list[Reply]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> Reply | list[Reply]:
        """Answer a prompt, or a list of them in one batch.

        Args:
            prompt: text, or token ids as a list or a 1-D tensor; or a list of such prompts.
            max_tokens: most tokens to return; None: until a stop or the context's end.
            seed: of the random draws; a list gives each prompt its own. The same seed gives the same answer.
            sampling: how canvases are denoised; None: as the checkpoint's generation_config.json says.
            cancel: asked between steps (`is_set()`); a `threading.Event` will do.

        Returns:
            a `Reply`, or a list of them where `prompt` or `seed` is a list.
        """
        replies = {
            e.row: e.reply
            for e in self.stream(prompt, max_tokens, seed, sampling, cancel=cancel)
            if isinstance(e, Done)
        }
        many = _is_batch(prompt) or not _is_whole(seed)
        return [replies[row] for row in sorted(replies)] if many else replies[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> Iterator[Event]:
        """The same as `generate`, as events: `Denoised` a step, `Committed` a canvas, `Text`, and `Done` at the end.

        Arguments are checked at once, before the first event is asked for. Leaving the loop early ends the work.
        """
        sampling = self.generation.sampling if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise RequestError(f"sampling is {sampling!r}", hint="give a blockpress.Sampling")
        if sampling.stop and self.tokenizer is None:
            raise RequestError(
                f"sampling.stop is {sampling.stop!r}", hint="stop texts need a tokenizer; this model has none"
            )
        prompts = list(cast("Sequence[Prompt]", prompt)) if _is_batch(prompt) else [cast("Prompt", prompt)]
        rows = self._rows(prompts, max_tokens, seed, sampling)
        return generate(self.network, rows, sampling, cancel) if rows else iter(())

    @torch.inference_mode()
    def denoise_logits(
        self,
        prompt_ids: Sequence[int] | Tensor,
        canvas_ids: Sequence[int] | Tensor,
        previous_logits: Float32[Tensor, "canvas vocab"] | None = None,
    ) -> Float32[Tensor, "canvas vocab"]:
        """What one denoising step makes of a canvas behind a prompt: softcapped float32 logits.

        Args:
            previous_logits: the last step's temperature-scaled logits, for self-conditioning; None: the first step.
        """
        canvas = self._ids(canvas_ids, "canvas_ids")
        prompt = self._ids(prompt_ids, "prompt_ids")
        shape = (len(canvas), self.config.vocab_size)
        if previous_logits is not None and not isinstance(previous_logits, Tensor):
            raise RequestError(f"previous_logits is {previous_logits!r:.60}", hint="give a tensor, or None")
        if previous_logits is not None and tuple(previous_logits.shape) != shape:
            raise RequestError(
                f"previous_logits has the shape {tuple(previous_logits.shape)}",
                hint=f"it must be {shape}: [canvas, vocabulary]",
            )
        self._check_room(len(prompt), len(canvas))
        device = self.network.device
        _, cache = self.network.read(torch.tensor([prompt], device=device), self.network.empty_cache(1))
        signal = (
            None if previous_logits is None else self.network.soft_embedding(previous_logits[None].float().to(device))
        )
        hidden = self.network.denoise(torch.tensor([canvas], device=device), cache, signal)
        return self.network.logits(hidden)[0]

    @torch.inference_mode()
    def next_token_logits(self, ids: Sequence[int] | Tensor) -> Float32[Tensor, "length vocab"]:
        """The causal pass as a language model: for every token, softcapped float32 logits of the one behind it."""
        tokens = self._ids(ids, "ids")
        self._check_room(len(tokens), 0)
        hidden, _ = self.network.read(torch.tensor([tokens], device=self.network.device), self.network.empty_cache(1))
        return self.network.logits(hidden)[0]

    def _rows(
        self, prompts: list[Prompt], max_tokens: int | None, seed: int | Sequence[int], sampling: Sampling
    ) -> list[Row]:
        if max_tokens is not None and not (_is_whole(max_tokens) and max_tokens >= 1):
            raise RequestError(
                f"max_tokens is {max_tokens!r}", hint="max_tokens must be a whole number of at least 1, or None"
            )
        seeds = [seed] * len(prompts) if _is_whole(seed) else _as_list(cast("Sequence[int]", seed), "seed")
        if len(prompts) == 1 and not _is_whole(seed):
            prompts = prompts * len(seeds)
        if len(seeds) != len(prompts):
            raise RequestError(
                f"seed has {len(seeds)} entries", hint=f"give one for each of the {len(prompts)} prompts"
            )
        rows = []
        for index, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
            ids = self._ids(self.encode(prompt) if isinstance(prompt, str) else prompt, "prompt")
            self._check_room(len(ids), self.config.canvas_length)
            rows.append(
                Row(
                    index,
                    ids,
                    cast(int, own),
                    stop_ids=self.generation.stop_ids,
                    canvas_length=self.config.canvas_length,
                    room=self.config.context_length - len(ids),
                    max_tokens=max_tokens,
                    decoder=None if self.tokenizer is None else StreamDecoder(self.tokenizer, stop=sampling.stop),
                )
            )
        return rows

    def _ids(self, ids: Sequence[int] | Tensor, name: str) -> list[int]:
        listed = _as_list(ids, name)
        if not listed:
            raise RequestError(f"{name} is empty", hint="give at least one token")
        for place, token in enumerate(listed):
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"{name} holds id {token} at place {place}", hint=f"ids go from 0 to {self.config.vocab_size - 1}"
                )
        return listed

    def _check_room(self, prompt: int, canvas: int) -> None:
        if prompt + canvas > self.config.context_length:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens, a canvas {canvas}, the model's context {self.config.context_length}",
                hint=f"shorten the prompt to {self.config.context_length - canvas} tokens or fewer",
            )

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.path} has no tokenizer.json, which {what} needs", hint="give token ids, or add the file"
            )
        return self.tokenizer


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_batch(prompt: object) -> bool:
    """A list of prompts, as against one text, one list of ids or one 1-D tensor."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 2
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(not _is_number(x) for x in prompt)


def _is_number(value: object) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else hasattr(value, "__index__")


def _as_list(ids: Sequence[int] | Tensor, name: str) -> list[int]:
    """Whole numbers from a list, a tuple or a 1-D tensor."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(
                f"{name} is a tensor of shape {tuple(ids.shape)}, {ids.dtype}", hint=f"{name} must be 1-D whole numbers"
            )
        return ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise RequestError(f"{name} is {ids!r:.60}", hint=f"{name} must be a list or a 1-D tensor of whole numbers")
    try:
        return [operator.index(x) for x in ids]
    except TypeError:
        raise RequestError(f"{name} is {ids!r:.60}", hint=f"{name} must hold whole numbers only") from None
