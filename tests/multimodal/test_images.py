"""Images against the reference processor, bit for bit; and the files that must not pass."""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from blockpress.config.vision import BUDGETS, PictureSettings
from blockpress.errors import MediaError
from blockpress.multimodal import images, open_image, prepare_images
from blockpress.multimodal.images import FORMATS, fitted_size
from tests.conftest import num_examples

PUBLISHED = PictureSettings(patch_size=16, pooling=3)
SMALL = PictureSettings(patch_size=4, pooling=2, max_soft_tokens=70)
SIDES = st.integers(1, 40) | st.integers(1, 2000)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels if bands > 1 else pixels[..., 0])


def stored(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def theirs(image: Image.Image, cut: PictureSettings, budget: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Patches, positions and soft tokens of the reference, without its padding."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor = Gemma4ImageProcessorPil(
        patch_size=cut.patch_size, pooling_kernel_size=cut.pooling, max_soft_tokens=budget
    )
    out = processor(image)
    patches, places = out["pixel_values"][0], out["image_position_ids"][0]
    real = (places >= 0).all(-1)
    assert len(patches) == budget * cut.pooling**2
    return patches[real], places[real], out["num_soft_tokens_per_image"][0]


def assert_equal_to_theirs(image: Image.Image, cut: PictureSettings, budget: int) -> None:
    (ours,) = prepare_images([image], cut, budget)
    patches, places, soft = theirs(image, cut, budget)
    assert ours.patches.dtype == patches.dtype == np.float32
    assert np.array_equal(ours.patches, patches)
    assert np.array_equal(ours.positions, places)
    assert ours.soft_tokens == soft == len(patches) // cut.pooling**2 <= budget


@pytest.mark.parity
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "size",
    [(1, 1), (640, 480), (3, 5), (1, 700), (900, 2), (48, 48), (912, 672), (1500, 1100)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_every_budget_is_the_reference_s(size: tuple[int, int], budget: int) -> None:
    assert_equal_to_theirs(noise(*size), PUBLISHED, budget)


@pytest.mark.parity
@settings(max_examples=num_examples(60))
@given(SIDES, SIDES, st.sampled_from(BUDGETS[:2]), st.integers(0, 9))
def test_any_size_is_the_reference_s(width: int, height: int, budget: int, seed: int) -> None:
    # A thin image repeated: noise of 4 million pixels a case would only cost time.
    assert_equal_to_theirs(noise(width, min(height, 1 + 90_000 // width), seed=seed), SMALL, budget)


@pytest.mark.parity
@given(
    st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(BUDGETS), st.sampled_from([(16, 3), (4, 2), (8, 1)])
)
def test_any_size_fits_its_budget_as_the_reference_fits_it(
    height: int, width: int, budget: int, shape: tuple[int, int]
) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    patch, pooling = shape
    cut = PictureSettings(patch_size=patch, pooling=pooling)
    fitted = fitted_size(height, width, cut, budget)
    assert fitted == get_aspect_ratio_preserving_size(height, width, patch, budget * pooling**2, pooling)
    rows, columns = (side // (patch * pooling) for side in fitted)
    assert 1 <= rows * columns <= budget


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_kind_of_pixel_becomes_what_the_reference_makes_of_it(mode: str) -> None:
    base = noise(60, 45, "RGBA")
    image = _converted(base, mode)
    assert image.mode == mode
    assert_equal_to_theirs(image, SMALL, 70)


def _converted(base: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(base.convert("RGB"), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode == "PA":
        return base.convert("LA").convert("PA")
    return base.convert(mode if mode in ("L", "LA", "RGBA") else "RGB").convert(mode)


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert open_image(stored(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (8, 8), "red").quantize(4)
    assert open_image(stored(palette)).getpixel((0, 0)) == (255, 0, 0)
    hidden = palette.getpixel((0, 0))
    assert open_image(stored(palette, transparency=hidden)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_images_are_scaled_not_clipped() -> None:
    wide = np.array([[0, 255, 257, 32_896, 65_535]], dtype=np.uint16)
    for file in (stored(Image.fromarray(wide)), stored(Image.fromarray(wide), "TIFF")):
        assert np.asarray(open_image(file))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parity
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photograph_stands_upright_as_the_reference_loads_it(turn: int) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = turn
    data = stored(noise(30, 20), "JPEG", exif=exif)
    upright = open_image(data)
    reference = load_image(Image.open(io.BytesIO(data)))
    assert upright.size == ((20, 30) if turn > 4 else (30, 20))
    assert np.array_equal(np.asarray(upright), np.asarray(reference))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))), np.asarray(upright))


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = stored(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((4, 3)) == (255, 0, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_every_named_format_is_read(format: str, tmp_path: Path) -> None:
    data = stored(noise(40, 30), format)
    file = tmp_path / "image"
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = [open_image(data), open_image(file), open_image(str(file)), open_image(Image.open(io.BytesIO(data)))]
    same.append(open_image(f"data:image/{format.lower()};base64," + base64.b64encode(data).decode()))
    assert all(image.mode == "RGB" and image.tobytes() == same[0].tobytes() for image in same)


WHOLE = {format: stored(noise(40, 30), format) for format in FORMATS}


@settings(max_examples=num_examples(150))
@given(st.sampled_from(FORMATS), st.data())
def test_a_damaged_image_is_read_or_refused(format: str, data: st.DataObject) -> None:
    """Bytes cut off or overwritten anywhere: no exception of a decoder gets out, and no warning."""
    file = bytearray(WHOLE[format])
    if data.draw(st.booleans()):
        file = file[: data.draw(st.integers(0, len(file)))]
    else:
        at = data.draw(st.integers(0, len(file) - 4))
        file[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    try:
        (picture,) = prepare_images([bytes(file)], SMALL)
    except MediaError:
        return
    assert picture.patches.shape[1] == 48


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_is_refused(format: str) -> None:
    with pytest.raises(MediaError, match=r"cut short|damaged"):
        open_image(WHOLE[format][: len(WHOLE[format]) * 2 // 3])


def test_a_decompression_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that promises 30,000 x 30,000 pixels, and one above our own limit only."""
    data = bytearray(stored(Image.new("L", (1, 1))))
    for width, height in ((30_000, 30_000), (10_000, 9_500), (8_001, 10_000)):
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        with pytest.raises(MediaError, match="too large"):
            open_image(bytes(data))
    monkeypatch.setattr(images, "MOST_PIXELS", 99)
    with pytest.raises(MediaError, match="10 x 10 pixels"):
        open_image(stored(Image.new("L", (10, 10))))
    assert open_image(stored(Image.new("L", (9, 11)))).size == (9, 11)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "0 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
        ("https://example.com/a.png", "is a URL"),
        ("file:///etc/hostname", "is a URL"),
        ("/no/such/image.png", "No such file"),
        ("data:image/png;base64,@@@@", "not base64"),
        ("data:image/png", "no data: URL"),
        ("data:image/png;base64,", "0 bytes"),
        ("nul\0l", "null"),
        (7, "is a int"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (Image.new("F", (4, 4)), "mode 'F'"),
        (Image.new("I", (4, 4)), "mode 'I'"),
    ],
    ids=lambda value: f"mode {value.mode}" if isinstance(value, Image.Image) else str(value),
)
def test_data_that_is_no_image_is_refused(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        open_image(source)


def test_directories_and_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(MediaError, match="0 bytes"):
        open_image(tmp_path / "empty")
    with pytest.raises(MediaError, match="directory"):
        open_image(tmp_path)


def test_the_number_of_the_bad_image_is_named() -> None:
    with pytest.raises(MediaError, match=r"^image 2 of 2: .*0 bytes"):
        prepare_images([noise(4, 4), b""], SMALL)
    with pytest.raises(MediaError, match="max_soft_tokens is 100"):
        prepare_images([], SMALL, 100)
    with pytest.raises(MediaError, match="max_soft_tokens is True"):
        prepare_images([], SMALL, True)
    with pytest.raises(MediaError, match=r"max_soft_tokens is 70\.0"):
        prepare_images([], SMALL, 70.0)  # type: ignore[arg-type]


def test_percent_encoded_data_is_read() -> None:
    data = stored(noise(5, 4))
    assert open_image("data:image/png," + quote_from_bytes(data)).tobytes() == open_image(data).tobytes()
