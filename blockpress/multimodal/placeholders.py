"""Pictures in a prompt: one placeholder in the text becomes as many tokens as the picture has soft tokens.

    text    "Look: <|image|>!"                                       one placeholder a picture
    ids     ... <|image|> ...              --expand-->  ... <|image> <|image|> x n <image|> ...     the span: the n
    video   "<|video|>"                    --timestamp-->  "00:00 <|image|> 00:01 <|image|>"        a frame a second

Invariant: the k-th placeholder belongs to the k-th picture, and there are as many placeholders as pictures.

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
    """The soft tokens of one picture: the position of the first in the prompt, and their number."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class ExpandedPrompt:
    """Token ids with the soft tokens of every picture, and their spans in order."""

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
    image_iter, video_iter = iter(images), iter(videos)
    pictures: list[ProcessedImage] = []

    def write(mark: re.Match[str]) -> str:
        if mark[0] == IMAGE:
            pictures.append(next(image_iter))
            return IMAGE
        video = next(video_iter)
        pictures.extend(video.frames)
        return timestamp(video.seconds)

    return _EITHER.sub(write, text), pictures


def timestamp(seconds: Sequence[float]) -> str:
    """The text that replaces a video's placeholder: each frame's minute and second, and a placeholder for it.

    >>> timestamp([0, 1.5, 61])
    '00:00 <|image|> 00:01 <|image|> 01:01 <|image|>'
    """
    return " ".join(f"{int(second // 60):02d}:{int(second % 60):02d} {IMAGE}" for second in seconds)


def expand(ids: Sequence[int], soft_tokens: Sequence[int], config: ModelConfig) -> ExpandedPrompt:
    """Replace each placeholder by a begin token, the picture's soft tokens, and an end token.

    Args:
        ids: a prompt with one `<|image|>` a picture. soft_tokens: the number for each picture, in that order.

    Raises:
        MediaError: another number of placeholders than of pictures. ConfigError: a model without such tokens.
    """
    if not soft_tokens and config.image_id not in ids:
        return ExpandedPrompt(list(ids), [])
    tokens = PictureTokens.of(config)
    _check_number("image", sum(token == tokens.image for token in ids), len(soft_tokens))
    remaining = iter(soft_tokens)
    expanded: list[int] = []
    spans: list[ImageSpan] = []
    for token in ids:
        if token != tokens.image:
            expanded.append(token)
            continue
        span = ImageSpan(len(expanded) + 1, next(remaining))
        spans.append(span)
        expanded += [tokens.begin, *[tokens.image] * span.length, tokens.end]
    return ExpandedPrompt(expanded, spans)


def part_end(start: int, stop: int, spans: Sequence[ImageSpan]) -> int:
    """Where a prefill chunk from `start` on should end instead of at `stop`: never inside a span, whose tokens attend
    to each other in both directions.

    >>> part_end(0, 4, [ImageSpan(3, 3)]), part_end(3, 7, [ImageSpan(3, 3)])  # before the span that would be cut
    (3, 7)
    >>> part_end(1, 3, [ImageSpan(1, 6)])  # a chunk that begins with the span holds all of it
    7
    """
    split = next((span for span in spans if span.start < stop < span.stop), None)
    if split is None:
        return stop
    return split.start if split.start > start else split.stop


def _check_number(kind: str, placeholders: int, given: int) -> None:
    if placeholders == given:
        return
    what = f"{given} {kind}{'s' * (given != 1)} for {placeholders} placeholder{'s' * (placeholders != 1)} in the prompt"
    mark = IMAGE if kind == "image" else VIDEO
    raise MediaError(f"there {'is' if given == 1 else 'are'} {what}", hint=f"write {mark} once for every {kind}")
