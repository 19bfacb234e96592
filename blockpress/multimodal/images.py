"""From an image to patches: opened, checked, converted to upright RGB, resized to its budget, cut into squares.

    file --open_image--> RGB pixels --fitted_size--> resized --cut--> patches [n, 3 * patch^2], positions [n, 2]

An image keeps its aspect ratio. Its sides become multiples of `pooling * patch_size` pixels, and it has at most
`max_soft_tokens * pooling^2` patches, so that `pooling x pooling` patches make one soft token each.

Invariant: the patches of an 8-bit image equal those of the reference processor, bit for bit. An image is measured
before it is decoded, so that a small file cannot fill the memory.

Run it:  python -m pytest tests/multimodal/test_images.py
Source: `Gemma4ImageProcessorPil`, `load_image` of `transformers` 5.23.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from blockpress.config.checks import is_count
from blockpress.config.vision import BUDGETS, PictureSettings
from blockpress.errors import MediaError
from blockpress.multimodal.sources import Source, open_media

MOST_PIXELS = 80_000_000
"""Pixels of the largest image that is decoded: 240 MB as RGB, and more than a camera of 2026 takes by default."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are decoded. Those that run a program (EPS) or describe a scene are not among them."""

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_NARROW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# The reference rescales in float64 and rounds once; there are 256 values.
_SCALED: NDArray[np.float32] = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProcessedImage:
    """An image, or a frame of a video, as the vision tower reads it.

    `patches`: [n, 3 * patch^2] float32 from 0 to 1, in row-major order; within a patch row-major too, RGB interleaved.
    `positions`: [n, 2] int64, column and row of each patch. `soft_tokens`: the prompt tokens that it takes.
    """

    patches: NDArray[np.float32]
    positions: NDArray[np.int64]
    soft_tokens: int


def prepare_images(
    images: Sequence[Source | Image.Image], settings: PictureSettings, max_soft_tokens: int | None = None
) -> list[ProcessedImage]:
    """Each image as the tower reads it.

    Args:
        max_soft_tokens: the budget of an image, 70, 140, 280, 560 or 1120; None: the settings' own.

    Raises:
        MediaError: an image that cannot be read (its number is in the message), or another budget.
    """
    budget = checked_budget(settings.max_soft_tokens if max_soft_tokens is None else max_soft_tokens)
    pictures = []
    for number, image in enumerate(images, 1):
        try:
            pictures.append(to_patches(open_image(image), settings, budget))
        except MediaError as error:
            raise MediaError(f"image {number} of {len(images)}: {error.message}", hint=error.hint) from error
    return pictures


def checked_budget(max_soft_tokens: int) -> int:
    """The budget itself. Raises MediaError: the model was not trained with it."""
    if not is_count(max_soft_tokens) or max_soft_tokens not in BUDGETS:
        known = ", ".join(map(str, BUDGETS))
        raise MediaError(f"max_soft_tokens is {max_soft_tokens!r}", hint=f"max_soft_tokens must be one of {known}")
    return max_soft_tokens


def open_image(source: Source | Image.Image) -> Image.Image:
    """The image as upright 8-bit RGB: the first frame of an animation, transparency blended onto white.

    Args:
        source: a path, the file's bytes, a data: URL, or an image of Pillow.

    Raises:
        MediaError: nothing there, not an image of `FORMATS`, cut short, without pixels, or above `MOST_PIXELS`.
    """
    if isinstance(source, Image.Image):
        return _checked_rgb(source)
    with open_media(source, "image") as file, warnings.catch_warnings():
        # Pillow only warns of an image of 90 to 180 million pixels; `_checked_rgb` refuses it. Any other warning about
        # a file that is decoded all the same can be ignored.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise _too_large(str(error)) from error
        # Decoders raise many kinds of exception for a damaged file: whichever, it is the file's fault.
        except Exception as error:
            raise MediaError(
                "the image is not of a known format, or its header is damaged",
                hint=f"give one of {', '.join(FORMATS)}",
            ) from error
        with image:
            return _checked_rgb(image)


def fitted_size(height: int, width: int, settings: PictureSettings, max_soft_tokens: int) -> tuple[int, int]:
    """The size in pixels, (height, width), to which an image is resized: the largest that its budget allows.

    >>> fitted_size(480, 640, PictureSettings(patch_size=16, pooling=3), 280)
    (672, 912)
    >>> fitted_size(1, 1000, PictureSettings(patch_size=16, pooling=3), 70)
    (48, 3360)
    """
    side = settings.pooling * settings.patch_size
    most = max_soft_tokens * settings.pooling**2 * settings.patch_size**2
    factor = math.sqrt(most / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    # Both cannot be 0: a budget is many times side * side.
    if rows == 0:
        rows, columns = 1, min(math.floor(width / height), max_soft_tokens)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), max_soft_tokens), 1
    return rows * side, columns * side


def to_patches(image: Image.Image, settings: PictureSettings, max_soft_tokens: int) -> ProcessedImage:
    """An RGB image, resized (bicubic) and cut into patches."""
    height, width = fitted_size(image.height, image.width, settings, max_soft_tokens)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    size = settings.patch_size
    rows, columns = height // size, width // size
    pixels = np.asarray(image).reshape(rows, size, columns, size, 3)
    patches = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, size * size * 3)
    x, y = np.meshgrid(np.arange(columns, dtype=np.int64), np.arange(rows, dtype=np.int64), indexing="xy")
    return ProcessedImage(
        patches=_SCALED[patches],
        positions=np.stack((x, y), axis=-1).reshape(-1, 2),
        soft_tokens=rows * columns // settings.pooling**2,
    )


def checked_pixels(width: int, height: int) -> None:
    """MediaError for a size without pixels or with too many."""
    if width < 1 or height < 1:
        raise MediaError(f"the image has no pixels: {width} x {height}", hint="give an image of at least one pixel")
    if width * height > MOST_PIXELS:
        raise _too_large(f"{width} x {height} pixels")


def _checked_rgb(image: Image.Image) -> Image.Image:
    checked_pixels(*image.size)
    if image.mode not in (*_NARROW, *_SIXTEEN):
        raise MediaError(
            f"the image has pixels of Pillow's mode {image.mode!r}", hint="convert it to 8 bits a channel first"
        )
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _rgb(upright)
    except MemoryError:
        raise
    except Exception as error:
        raise MediaError(
            f"the image is cut short or damaged: {error}", hint="give the whole file, or save it again"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN:
        # Pillow would clip 16-bit values at 255, which turns nearly everything white.
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _too_large(what: str) -> MediaError:
    return MediaError(
        f"the image is too large: {what}", hint=f"scale it down: at most {MOST_PIXELS:,} pixels are decoded"
    )
