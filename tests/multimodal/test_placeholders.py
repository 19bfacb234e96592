"""Places for pictures in a prompt, against the reference processor's own replacement of text, and where to cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress.config import PRESETS, ModelConfig
from blockpress.errors import ConfigError, MediaError
from blockpress.multimodal import ImageSpan, ProcessedImage, Video, expand, insert_placeholders
from blockpress.multimodal.placeholders import part_end
from blockpress.text import Tokenizer

CONFIG = PRESETS["diffusiongemma-26B-A4B"]()
IMAGE, BEGIN, END = 258_880, 255_999, 258_882


def picture(soft: int = 2) -> ProcessedImage:
    return ProcessedImage(patches=np.zeros((0, 3), np.float32), positions=np.zeros((0, 2), np.int64), soft_tokens=soft)


def film(*seconds: float, soft: int = 3) -> Video:
    return Video(frames=tuple(picture(soft) for _ in seconds), seconds=seconds)


# `Gemma4Processor` cannot be built without torchvision; its replacements of text can be called all the same.
PROCESSOR: Any = SimpleNamespace(
    boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", video_token="<|video|>"
)


def their_image(soft: int) -> str:
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    return Gemma4Processor.replace_image_token(PROCESSOR, {"num_soft_tokens_per_image": [soft]}, 0)


def their_video(seconds: tuple[float, ...], soft: int) -> str:
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    inputs = {
        "num_soft_tokens_per_video": [soft],
        "video_metadata": [SimpleNamespace(fps=1.0, timestamps=list(seconds))],
    }
    # This model knows no token for videos: their frames are images.
    return Gemma4Processor.replace_video_token(PROCESSOR, inputs, 0).replace("<|video|>", "<|image|>")


@pytest.mark.parity
def test_the_ids_are_those_of_the_reference_s_text(gemma: Tokenizer) -> None:
    written = "Compare \n\n<|image|>\n\n and <|image|><|image|>, then <|video|>: <|video|>"
    soft, films = [280, 7, 64], [film(0, 1.2, 59.9, 60.5), film(0.0)]
    text, pictures = insert_placeholders(written, [picture(count) for count in soft], films)
    prompt = expand(gemma.encode(text), [one.soft_tokens for one in pictures], CONFIG)
    theirs = written
    for count in soft:
        theirs = theirs.replace("<|image|>", their_image(count).replace("<|image|>", "\0"), 1)
    for one in films:
        theirs = theirs.replace("<|video|>", their_video(one.seconds, 3), 1)
    theirs = theirs.replace("\0", "<|image|>")
    assert "00:59 <|image>" in theirs
    assert "01:00 <|image>" in theirs
    assert prompt.ids == gemma.encode(theirs)
    assert [run.length for run in prompt.image_spans] == [280, 7, 64, 3, 3, 3, 3, 3]
    _check_runs(prompt.ids, prompt.image_spans)


@pytest.mark.parity
@given(st.lists(st.floats(0, 61), min_size=1, max_size=9))
def test_the_timeline_is_the_reference_s(seconds: list[float]) -> None:
    text, _ = insert_placeholders("<|video|>", [], [film(*seconds)])
    assert text == their_video(tuple(seconds), 1).replace("<|image><|image|><image|>", "<|image|>")


def _check_runs(ids: list[int], runs: list[ImageSpan]) -> None:
    marked = [False] * len(ids)
    for run in runs:
        assert (ids[run.start - 1], ids[run.stop]) == (BEGIN, END)
        marked[run.start : run.stop] = [True] * run.length
    assert marked == [token == IMAGE for token in ids]


@given(st.lists(st.integers(0, 99) | st.just(IMAGE), max_size=20), st.data())
def test_only_placeholders_change(ids: list[int], data: st.DataObject) -> None:
    soft = [data.draw(st.integers(1, 9)) for token in ids if token == IMAGE]
    prompt = expand(ids, soft, CONFIG)
    _check_runs(prompt.ids, prompt.image_spans)
    assert [run.length for run in prompt.image_spans] == soft
    assert [token for token in prompt.ids if token < 100] == [token for token in ids if token < 100]
    assert len(prompt.ids) == len(ids) + sum(soft) + len(soft)


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_no_chunk_ends_inside_a_picture(length: int, size: int, data: st.DataObject) -> None:
    runs, at = [], data.draw(st.integers(0, 9))
    while at < length:
        runs.append(ImageSpan(at, data.draw(st.integers(1, min(15, length - at)))))
        at = runs[-1].stop + data.draw(st.integers(1, 9))
    start = 0
    while start < length:
        stop = part_end(start, min(start + size, length), runs)
        assert start < stop <= length
        assert not any(run.start < cut < run.stop for run in runs for cut in (start, stop))
        assert stop - start <= size or any((start, stop) == (run.start, run.stop) for run in runs)
        # As long as can be: one token more would be too long or end inside a run.
        longer = min(start + size, length)
        assert stop >= longer or any(run.start < longer < run.stop for run in runs)
        start = stop


def test_placeholders_and_pictures_must_agree_in_number() -> None:
    for images, videos, message in (
        ([], [film(0)], "there are 0 images for 1 placeholder"),
        ([picture()] * 2, [film(0)], "there are 2 images for 1 placeholder"),
        ([picture()], [], "there are 0 videos for 1 placeholder"),
        ([picture()], [film(0)] * 2, "there are 2 videos for 1 placeholder"),
    ):
        with pytest.raises(MediaError, match=message):
            insert_placeholders("<|image|> <|video|>", images, videos)
    with pytest.raises(MediaError, match="there is 1 image for 2 placeholders"):
        expand([IMAGE, IMAGE], [3], CONFIG)
    with pytest.raises(MediaError, match="there are 0 images for 1 placeholder"):
        expand([5, IMAGE], [], CONFIG)


def test_a_model_without_image_tokens_refuses_pictures() -> None:
    small: ModelConfig = PRESETS["tiny"]()
    assert expand([1, 2], [], small).ids == [1, 2]
    with pytest.raises(ConfigError, match=r"token_id is \d+ .*below vocab_size \(64\)"):
        expand([1, 2], [3], small)
    other = replace(small, image_id=5, source={"boi_token_id": 6, "eoi_token_id": 7})
    assert expand([1, 5, 2], [2], other) == expand([1, 5, 2], [2], other)
    assert expand([1, 5, 2], [2], other).ids == [1, 6, 5, 5, 7, 2]
    with pytest.raises(ConfigError, match="boi_token_id is None"):
        expand([5], [2], replace(other, source={"boi_token_id": None, "eoi_token_id": 7}))
