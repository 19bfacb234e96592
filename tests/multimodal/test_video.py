"""Videos: the frames and seconds that the reference takes, made with PyAV itself; and the files that must not pass."""

from __future__ import annotations

import io
import struct
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blockpress.config.vision import PictureSettings
from blockpress.errors import MediaError
from blockpress.multimodal import insert_placeholders, prepare_images, prepare_videos, read_video, video
from blockpress.multimodal.video import sample_frames
from tests.conftest import num_examples

av = pytest.importorskip("av", reason="PyAV is not installed")
CUT = PictureSettings(patch_size=4, pooling=2)


def film(
    frames: int,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    format: str = "mp4",
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
    coding: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
) -> bytes:
    """A film whose frame i is of the grey 4 * i; in one thread, since the threads decide what bytes it has.

    `times`: milliseconds of the frames, where they are not even. `coding`: the encoder's options.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "film"
        with av.open(str(file), "w", format=format, options=options or {}) as container:
            stream = container.add_stream(codec, rate=rate, options=coding or {})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(frames):
                grey = np.full((size[1], size[0], 3), 4 * number % 256, np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return file.read_bytes()


def copied(data: bytes, format: str, first: int = 0, shift: int = 0) -> bytes:
    """The packets of a film from `first` on, not encoded anew, `shift` milliseconds earlier: an MP4 or MOV hides what comes
    before 0 by an edit list, as programs that trim without encoding do."""
    with tempfile.TemporaryDirectory() as folder:
        file, even = Path(folder) / "film", {"avoid_negative_ts": "disabled"}
        with av.open(io.BytesIO(data)) as old, av.open(str(file), "w", format=format, options=even) as container:
            stream = container.add_stream_from_template(old.streams.video[0])
            for packet in [packet for packet in old.demux(video=0) if packet.size][first:]:
                ticks = int(shift / 1000 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, stream
                container.mux(packet)
        return file.read_bytes()


def greys(read: video.Video) -> list[float]:
    return [float(frame.patches.mean() * 255 / 4) for frame in read.frames]


@pytest.mark.parity
@given(st.integers(1, 5000), st.floats(1, 240), st.sampled_from([0.5, 1.0, 2.0]))
def test_frames_are_chosen_as_the_reference_chooses_them(total: int, rate: float, per_second: float) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    wanted = PictureSettings(patch_size=4, pooling=2, frames_per_second=per_second)
    if max(1, int(total / rate * per_second)) > total:  # which the reference refuses
        assert sample_frames(total, rate, wanted) == list(range(total))
        return
    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=rate), fps=per_second)
    assert sample_frames(total, rate, wanted) == theirs.tolist()


@pytest.mark.parity
@given(st.integers(1, 5000), st.integers(1, 100))
def test_a_number_of_frames_is_spaced_as_the_reference_spaces_it(total: int, count: int) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    wanted = PictureSettings(patch_size=4, pooling=2, video_frames=count)
    count = min(count, total)
    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=30.0), num_frames=count)
    assert sample_frames(total, 30.0, wanted) == theirs.tolist()


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]
)
def test_videos_are_sampled_at_one_frame_a_second(format: str, codec: str, tmp_path: Path) -> None:
    data = film(34, format=format, codec=codec)
    (tmp_path / "film").write_bytes(data)
    for source in (data, tmp_path / "film", str(tmp_path / "film")):
        read = read_video(source, CUT, 70)
        assert read.seconds == (0, 1.1, 2.2)
        assert greys(read) == pytest.approx([0, 11, 22], abs=1)
        assert all(frame.soft_tokens <= 70 for frame in read.frames)


@pytest.mark.parametrize("format", ["mp4", "mov"])
@pytest.mark.parametrize("between", [0, 2], ids=["in order", "B-frames"])
@pytest.mark.parametrize("hidden", [0, 7, 24, 49])
def test_frames_hidden_by_an_edit_list_are_not_counted(format: str, between: int, hidden: int) -> None:
    whole = film(50, codec="libx264", coding={"g": "20", "bf": str(between), "sc_threshold": "0", "crf": "1"})
    data = copied(whole, format, shift=100 * hidden)
    with av.open(io.BytesIO(data)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 50 - hidden
    read = read_video(data, CUT, 70)
    numbers = sample_frames(50 - hidden, 10.0, CUT)
    assert read.seconds == tuple(number / 10 for number in numbers)
    assert greys(read) == pytest.approx([hidden + number for number in numbers], abs=1)


@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
def test_packets_without_a_frame_are_not_counted(format: str) -> None:
    """A recording that begins between two key frames: the decoder shows nothing until the second."""
    whole = film(50, codec="libx264", coding={"g": "20", "bf": "2", "sc_threshold": "0", "crf": "1"})
    read = read_video(copied(whole, format, first=5), CUT, 70)
    with av.open(io.BytesIO(copied(whole, format, first=5))) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown < 45 and len(read.frames) == shown // 10
    assert greys(read)[0] >= 17, "what is left of the first 20 is not shown"


@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
@pytest.mark.parametrize("shift", [-5000, 1000], ids=["a late start", "a start below 0"])
def test_seconds_count_from_the_first_frame(format: str, shift: int) -> None:
    if format != "matroska" and shift > 0:
        shift = -1000  # an edit list hides it there, and a transport stream has no such times
    data = copied(film(30, codec="libx264", coding={"bf": "2"}), format, shift=shift)
    assert read_video(data, CUT, 70).seconds == (0, 1, 2)


def test_uneven_frames_have_their_mean_rate_in_every_container() -> None:
    """20 frames in the first two seconds, 4 in the next four."""
    times = [*range(0, 2000, 100), *range(2000, 6000, 1000)]
    mean = {}
    for format in ("mp4", "matroska"):
        read = read_video(film(24, codec="libx264", coding={"bf": "0"}, format=format, times=times), CUT, 70)
        mean[format] = read.seconds[-1] / (len(read.seconds) - 1)
        assert len(read.frames) in (5, 6)
    assert mean["mp4"] == pytest.approx(mean["matroska"], rel=0.2)


@pytest.mark.parametrize(("format", "codec"), [("mpegts", "libx264"), ("mpeg", "mpeg2video"), ("matroska", "libx264")])
def test_a_single_frame_is_a_video(format: str, codec: str) -> None:
    """From one frame a stream has no rate."""
    assert read_video(film(1, rate=25, format=format, codec=codec), CUT, 70).seconds == (0,)


@pytest.mark.parity
def test_the_pixels_are_the_reference_s(tmp_path: Path) -> None:
    """The same decoder, the same frames; resized by the rule of images, since frames are images to this model."""
    from transformers.video_utils import default_sample_indices_fn, read_video_pyav

    (tmp_path / "film.mp4").write_bytes(film(25))
    frames, metadata = read_video_pyav(
        str(tmp_path / "film.mp4"), lambda metadata: default_sample_indices_fn(metadata, fps=1)
    )
    read = read_video(tmp_path / "film.mp4", CUT, 70)
    assert list(read.seconds) == metadata.timestamps
    for ours, theirs in zip(
        read.frames, prepare_images([Image.fromarray(frame) for frame in frames], CUT, 70), strict=True
    ):
        assert np.array_equal(ours.patches, theirs.patches)
        assert np.array_equal(ours.positions, theirs.positions)


def test_a_video_shorter_than_a_second_is_one_frame() -> None:
    assert read_video(film(3), CUT, 70).seconds == (0,)


def test_a_phone_s_video_stands_upright() -> None:
    """The angle stands in the track's matrix, which is patched into the file here: a quarter turn clockwise."""
    data = bytearray(film(5))
    at = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, reserved and volume
    assert struct.unpack(">9i", data[at : at + 36])[8] == 1 << 30
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    columns, rows = read_video(bytes(data), CUT, 70).frames[0].positions[-1] + 1
    assert rows > columns  # of a film of 64 x 48


def test_frames_have_timestamps_in_the_prompt() -> None:
    films = prepare_videos([film(20), film(10)], CUT)
    (image,) = prepare_images([Image.new("RGB", (9, 9))], CUT)
    text, pictures = insert_placeholders("a<|video|>b<|image|>c<|video|>", [image], films)
    assert text == "a00:00 <|image|> 00:01 <|image|>b<|image|>c00:00 <|image|>"
    assert pictures == [*films[0].frames, image, *films[1].frames]


def test_a_long_video_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    long = film(61, rate=1, size=(16, 16))
    with pytest.raises(MediaError, match=r"too long: 61.0 seconds"):
        read_video(long, CUT, 70)
    assert len(read_video(film(60, rate=1, size=(16, 16)), CUT, 70).frames) == 60
    monkeypatch.setattr(video, "_FASTEST", 0.5)
    with pytest.raises(MediaError, match=r"too long: more than 30 frames"):
        read_video(film(40), CUT, 70)


def test_large_frames_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockpress.multimodal.images.MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="64 x 48 pixels"):
        read_video(film(2), CUT, 70)


def test_a_playlist_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg itself would open the file beside it and show what is in there."""
    (tmp_path / "private.mp4").write_bytes(film(20))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match="cannot be read"):
        read_video(b"ffconcat version 1.0\nfile private.mp4\n", CUT, 70)


def _most_of(data: bytes) -> bytes:
    """Up to the middle of the frames, which lie between the headers and, in an AVI, the index."""
    at = max(data.find(b"mdat"), data.find(b"movi"))
    assert at > 0
    return data[: at + (len(data) - at) // 3]


def _sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"no film at all", "cannot be read"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "cannot be read"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be read"),
        (_sound(), "no video"),
        (film(30)[:1600], "no video"),
        (film(30)[:2000], "cannot be read"),
        (film(12, size=(16, 16))[:886] + b"\0\x10", "Cannot allocate memory"),
        (film(30)[:-100], "cannot be read|no video|no frames"),
        (_most_of(film(40, options={"movflags": "faststart"})), "cut short"),
        (_most_of(film(40, format="avi")), "cut short"),
    ],
    ids=[
        "nothing",
        "text",
        "playlist",
        "script",
        "sound",
        "no track of the index",
        "half the index",
        "a size that asks for gigabytes",
        "without its end",
        "half, index first",
        "half an avi",
    ],
)
def test_data_that_is_no_video_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        read_video(data, CUT, 70)
    with pytest.raises(MediaError, match=r"^video 1 of 1: "):
        prepare_videos([data], CUT)


WHOLE = film(12, size=(16, 16))


@settings(max_examples=num_examples(60))
@given(st.data())
def test_a_damaged_video_is_read_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(WHOLE) - 4))
    file = WHOLE[:at] + data.draw(st.binary(max_size=4)) + (WHOLE[at + 4 :] if data.draw(st.booleans()) else b"")
    try:
        read = read_video(file, CUT, 70)
    except MediaError:
        return
    assert 1 <= len(read.frames) == len(read.seconds)


def test_without_pyav_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install 'blockpress\[video\]'"):
        read_video(b"anything", CUT, 70)


def test_another_budget_is_refused() -> None:
    with pytest.raises(MediaError, match="max_soft_tokens is 71"):
        prepare_videos([], CUT, 71)


def test_the_frames_have_their_own_budget() -> None:
    data: Any = film(3, size=(640, 480))
    (small,), (large,) = prepare_videos([data], CUT), prepare_videos([data], CUT, 280)
    assert small.frames[0].soft_tokens <= 70 < large.frames[0].soft_tokens <= 280
