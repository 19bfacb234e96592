"""Prompts with pictures against `transformers`, from files of pixels to canvas logits.

The reference is `generate`'s own path: the encoder under the masks that `create_masks_for_generate` makes of the token
types. (Its plain `forward` is causal over pictures.) Its preprocessor cuts the pictures of its side, ours those of ours.
A figure is the norm of the difference over the norm of `transformers`' tensor; the limit is that of the other float32
figures of these tests, 1e-5. Rows of ours run together in one ragged batch, the oracle's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from blockpress.config import ModelConfig
from blockpress.config.vision import MINIMAL_TOWER as SMALLEST
from blockpress.config.vision import PictureSettings, VisionConfig
from blockpress.model import Network, pictures
from blockpress.model.vision import VisionTower
from blockpress.multimodal import ExpandedPrompt, expand, prepare_images
from blockpress.multimodal.images import fitted_size
from blockpress.multimodal.placeholders import part_end

from .checkpoints import TINY
from .conftest import Report
from .oracle import CACHE, build, distance, network_like

pytestmark = pytest.mark.parity

FLOAT32 = 1e-5
IMAGE, BEGIN, END = 60, 61, 62
VISION = SMALLEST | {"position_embedding_size": 48}  # the smallest tower's own 16 would allow squares only
# Window 8: a picture of 70 soft tokens is far longer than it.
CONFIG = replace(
    TINY, vocab_size=64, image_id=IMAGE, vision=VISION, source={"boi_token_id": BEGIN, "eoi_token_id": END}
)
CUT = PictureSettings(patch_size=VISION["patch_size"], pooling=VISION["pooling_kernel_size"], max_soft_tokens=70)
I = IMAGE  # noqa: E741
ROWS: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "two pictures among text": ([3, 9, I, 5, 6, 7, I, 8, 11], [(40, 90), (30, 30)]),
    "a picture first": ([I, 4, 5], [(60, 70)]),
    "a picture last": ([7, 8, 9, I], [(70, 60)]),
    "nothing else": ([I], [(64, 64)]),
    "two adjacent": ([2, I, I, 3], [(64, 64), (64, 64)]),
    "text only": ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], []),
}


@dataclass(frozen=True)
class SequenceState:
    """One prompt and its pictures, with a canvas to denoise and one to commit."""

    prompt: ExpandedPrompt
    images: list[Image.Image]
    first: Tensor
    second: Tensor


Figures = dict[str, Tensor]


@lru_cache(maxsize=1)
def oracle() -> DiffusionGemmaForBlockDiffusion:
    with patch.dict(SMALLEST, VISION):
        theirs = build(CONFIG, seed=3)
    draw = torch.Generator().manual_seed(4)
    encoder = theirs.model.encoder
    for part in (encoder.vision_tower, encoder.embed_vision):
        for tensor in part.state_dict().values():
            tensor.copy_(
                torch.randn(tensor.shape, generator=draw) * (tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1)
            )
    theirs.set_attn_implementation("eager")
    return theirs


@lru_cache(maxsize=1)
def rows() -> dict[str, SequenceState]:
    made = {}
    random = np.random.default_rng(5)
    for name, (ids, sizes) in ROWS.items():
        images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        soft = [picture.soft_tokens for picture in prepare_images(images, CUT)]
        canvases = torch.from_numpy(random.integers(0, 60, (2, CONFIG.canvas_length)))
        made[name] = SequenceState(expand(ids, soft, CONFIG), images, *canvases)
    return made


@lru_cache
def reference(name: str, causal: bool = False) -> Figures:
    """The oracle's figures; `causal`: with the masks of a config that leaves out use_bidirectional_attention."""
    theirs, row = oracle(), rows()[name]
    tokens = torch.tensor(row.prompt.ids)[None]
    cache = DynamicCache(config=theirs.config.text_config)
    given: dict[str, Any] = {}
    if row.images:
        out = Gemma4ImageProcessorPil(
            patch_size=CUT.patch_size, pooling_kernel_size=CUT.pooling, max_soft_tokens=CUT.max_soft_tokens
        )(row.images, return_tensors="pt")
        given = {"pixel_values": out["pixel_values"], "image_position_ids": out["image_position_ids"]}
    masks = theirs.model.encoder.create_masks_for_generate(
        config=theirs.config,
        inputs_embeds=torch.empty(*tokens.shape, 0),
        attention_mask=torch.ones_like(tokens, dtype=torch.bool),
        **{CACHE: cache},
        position_ids=torch.arange(tokens.shape[1])[None],
        mm_token_type_ids=torch.zeros_like(tokens) if causal else (tokens == IMAGE).long(),
    )
    read = theirs.model.encoder(input_ids=tokens, attention_mask=masks, **{CACHE: cache}, **given)
    figures = {"hidden": read.last_hidden_state[0]}
    figures |= {f"key {index}": layer.keys[0] for index, layer in enumerate(cache.layers)}
    figures["canvas"] = theirs(decoder_input_ids=row.first[None], **{CACHE: cache}).logits[0]
    after = theirs(input_ids=row.first[None], decoder_input_ids=row.second[None], **{CACHE: cache})
    return figures | {"canvas after a commit": after.logits[0]}


def ours(names: list[str], network: Network, parts: int | None = None) -> list[Figures]:
    """Our figures, all rows in one ragged batch; `parts`: each row read in parts of at most so many tokens."""
    tower = VisionTower(VisionConfig.from_dict(VISION), CONFIG.hidden_size).eval().requires_grad_(False)
    state = oracle().model.encoder.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    chosen = [rows()[name] for name in names]
    images = []
    for row in chosen:
        features = tower(prepare_images(row.images, CUT))
        images.append({run.start: seen for run, seen in zip(row.prompt.image_spans, features, strict=True)})
    hidden, cache = _read(network, chosen, images) if parts is None else _read_in_parts(network, chosen, images, parts)
    first, second = torch.stack([row.first for row in chosen]), torch.stack([row.second for row in chosen])
    canvas = network.logits(network.denoise(first, cache, None))
    _, longer = network.read(first, cache)
    after = network.logits(network.denoise(second, longer, None))
    figures: list[Figures] = []
    for index, row in enumerate(chosen):
        figures.append({"hidden": hidden[index][: len(row.prompt.ids)], "canvas": canvas[index]})
        for layer, (key, _) in enumerate(cache.layers):
            figures[-1][f"key {layer}"] = key[index, :, : len(row.prompt.ids)]
        figures[-1]["canvas after a commit"] = after[index]
    return figures


def _read(network: Network, chosen: list[SequenceState], images: list[dict[int, Tensor]]) -> Any:
    prompts = [torch.tensor(row.prompt.ids) for row in chosen]
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    counts = torch.tensor([len(prompt) for prompt in prompts])
    return network.read(tokens, network.empty_cache(len(chosen)), counts, images)


def _read_in_parts(network: Network, chosen: list[SequenceState], images: list[dict[int, Tensor]], size: int) -> Any:
    (row,), (own,) = chosen, images
    cache, hidden, start, length = network.empty_cache(1), [], 0, len(row.prompt.ids)
    while start < length:
        stop = part_end(start, min(start + size, length), row.prompt.image_spans)
        inside = {at - start: seen for at, seen in own.items() if start <= at < stop}
        seen, cache = network.read(torch.tensor(row.prompt.ids[start:stop])[None], cache, None, [inside])
        hidden.append(seen)
        start = stop
    return torch.cat(hidden, dim=1), cache


def worst(figures: list[Figures], names: list[str]) -> dict[str, float]:
    theirs = [reference(name) for name in names]
    return {kind: max(distance(a[kind], b[kind]) for a, b in zip(figures, theirs, strict=True)) for kind in theirs[0]}


def test_the_rows_cover_the_cases() -> None:
    assert [len(row.prompt.ids) for row in rows().values()][-1] == 10
    for name, (_, sizes) in ROWS.items():
        found = [run.length for run in rows()[name].prompt.image_spans]
        assert found == [np.prod(fitted_size(*size, CUT, 70)) // 64 for size in sizes]
    assert min(run.length for row in rows().values() for run in row.prompt.image_spans) > 2 * CONFIG.sliding_window


def test_prompts_with_pictures_equal_the_oracle_s(report: Report) -> None:
    names = list(ROWS)
    for kind, measured in worst(ours(names, network_like(oracle(), CONFIG)), names).items():
        report(f"float32, with pictures: {kind.rstrip(' 0123456789')}", measured, FLOAT32)
        assert measured <= FLOAT32, f"{kind}: {measured:.2e}"


@pytest.mark.parametrize("size", [1, 5, 64, 90])
@pytest.mark.parametrize("name", ["two pictures among text", "two adjacent", "a picture last"])
def test_chunked_prefill_with_pictures_is_the_same(name: str, size: int) -> None:
    for kind, measured in worst(ours([name], network_like(oracle(), CONFIG), size), [name]).items():
        assert measured <= FLOAT32, f"{kind}: {measured:.2e}"


def test_without_bidirectional_attention_pictures_are_causal() -> None:
    config = replace(CONFIG, source={**CONFIG.source, "text_config": {}})
    for name in ("two pictures among text", "a picture first"):
        (figures,) = ours([name], network_like(oracle(), config))
        theirs = reference(name, causal=True)
        assert max(distance(figures[kind], theirs[kind]) for kind in theirs) <= FLOAT32
        assert distance(figures["hidden"], reference(name)["hidden"]) >= 100 * FLOAT32


def _causal(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, lambda runs: torch.full_like(runs, -1))


def _one_run_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, lambda runs: runs.clamp(max=0))


def _run_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    _runs(monkeypatch, lambda runs: torch.maximum(runs, runs.roll(1, 1)))


def _scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pictures.insert_images
    scale = CONFIG.hidden_size**0.5
    monkeypatch.setattr(
        "blockpress.model.network.insert_images",
        lambda x, counts, images: right(x, counts, [{at: f * scale for at, f in row.items()} for row in images]),
    )


def _runs(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    right = pictures.insert_images

    def placed(x: Tensor, counts: Tensor, images: Any) -> tuple[Tensor, Tensor]:
        x, runs = right(x, counts, images)
        return x, change(runs)

    monkeypatch.setattr("blockpress.model.network.insert_images", placed)


@pytest.mark.parametrize("mistake", [_causal, _one_run_for_all, _run_too_long, _scaled])
def test_a_wrong_mask_or_place_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    measured = worst(ours(["two adjacent"], network_like(oracle(), CONFIG)), ["two adjacent"])
    assert measured["hidden"] >= 100 * FLOAT32
    assert measured["canvas"] >= 100 * FLOAT32


def test_the_vision_config_round_trips() -> None:
    """What marks a picture is read back from what is written."""
    assert ModelConfig.from_dict(CONFIG.to_dict()).source["boi_token_id"] == BEGIN
