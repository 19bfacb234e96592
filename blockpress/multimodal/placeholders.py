"""Pictures in a prompt: one placeholder in the text becomes as many tokens as the picture has soft tokens.

    text    "Look: <|image|>!"                                       one placeholder a picture
    ids     ... <|image|> ...              --expand-->  ... <|image> <|image|> x n <image|> ...     the run: the n
    video   "<|video|>"                    --write_videos-->  "00:00 <|image|> 00:01 <|image|>"     a frame a second

Invariant: the k-th placeholder belongs to the k-th picture, and there are as many of one as of the other.

Run it:  python -m pytest tests/multimodal/test_placeholders.py
Source: `Gemma4Processor` of `transformers` 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blockpress.config import ModelConfig
from blockpress.config.vision import PictureTokens
from blockpress.errors import MediaError
from blockpress.multimodal.images import ProcessedImage
from blockpress.multimodal.video import Video

IMAGE, VIDEO = "<|image|>", "<|video|>"
_EITHER = re.compile("|".join(map(re.escape, (IMAGE, VIDEO))))


class ImageSpan(NamedTuple):
    """The soft tokens of one picture: their first place in the prompt, and how many there are."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class ExpandedPrompt:
    """Token ids in which every picture has its place, and those places in order."""

    ids: list[int]
    image_spans: list[ImageSpan]


def insert_placeholders(
    text: str, images: Sequence[ProcessedImage], videos: Sequence[Video] = ()
) -> tuple[str, list[ProcessedImage]]:
    """The text with one `<|image|>` a picture, and the pictures in the order of the text, frames of videos included.

    Raises:
        MediaError: another number of `<|image|>` than of images, or of `<|video|>` than of videos.
    """
    _check_number("image", text.count(IMAGE), len(images))
    _check_number("video", text.count(VIDEO), len(videos))
    left, films = iter(images), iter(videos)
    pictures: list[ProcessedImage] = []

    def write(mark: re.Match[str]) -> str:
        if mark[0] == IMAGE:
            pictures.append(next(left))
            return IMAGE
        film = next(films)
        pictures.extend(film.frames)
        return timestamp(film.seconds)

    return _EITHER.sub(write, text), pictures


def timestamp(seconds: Sequence[float]) -> str:
    """What stands for a video in the text: each frame's minute and second, and its placeholder.

    >>> timeline([0, 1.5, 61])
    '00:00 <|image|> 00:01 <|image|> 01:01 <|image|>'
    """
    return " ".join(f"{int(second // 60):02d}:{int(second % 60):02d} {IMAGE}" for second in seconds)


def expand(ids: Sequence[int], soft_tokens: Sequence[int], config: ModelConfig) -> ExpandedPrompt:
    """Room for every picture: each placeholder becomes a begin token, the picture's soft tokens, and an end token.

    Args:
        ids: a prompt with one `<|image|>` a picture. soft_tokens: of each picture, in that order.

    Raises:
        MediaError: another number of placeholders than of pictures. ConfigError: a model without such tokens.
    """
    if not soft_tokens and config.image_id not in ids:
        return ExpandedPrompt(list(ids), [])
    tokens = PictureTokens.of(config)
    _check_number("image", sum(token == tokens.image for token in ids), len(soft_tokens))
    left = iter(soft_tokens)
    longer: list[int] = []
    runs: list[ImageSpan] = []
    for token in ids:
        if token != tokens.image:
            longer.append(token)
            continue
        run = ImageSpan(len(longer) + 1, next(left))
        runs.append(run)
        longer += [tokens.begin, *[tokens.image] * run.length, tokens.end]
    return ExpandedPrompt(longer, runs)


def part_end(start: int, stop: int, runs: Sequence[ImageSpan]) -> int:
    """Where a part of a prefill from `start` on ends that was to end at `stop`: never inside a run, whose tokens see
    each other in both directions.

    >>> part_end(0, 4, [Run(3, 3)]), part_end(3, 7, [Run(3, 3)])  # before the run that would be cut
    (3, 7)
    >>> part_end(1, 3, [Run(1, 6)])  # a part that begins with the run holds all of it
    7
    """
    split = next((run for run in runs if run.start < stop < run.stop), None)
    if split is None:
        return stop
    return split.start if split.start > start else split.stop


def _check_number(kind: str, places: int, given: int) -> None:
    if places == given:
        return
    what = f"{given} {kind}{'s' * (given != 1)} for {places} place{'s' * (places != 1)} in the prompt"
    mark = IMAGE if kind == "image" else VIDEO
    raise MediaError(f"there {'is' if given == 1 else 'are'} {what}", hint=f"write {mark} once for every {kind}")
