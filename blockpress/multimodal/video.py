"""From a video to frames: one a second, each a picture of its own with a small budget.

PyAV decodes; it is an extra: `pip install 'blockpress[video]'`. No other module imports it.

Invariant: the frames are those that the reference samples at the same rate: `count` of `total` frames, with the numbers
`i * total // count`, at `number / frame rate` seconds. `total` is the number of frames that are shown: not those before
the beginning that an edit list sets, as in clips trimmed without encoding them anew, nor packets that hold no frame of
their own. It is counted from the packets before the first is decoded, corrected by what the decoder gives, and only
sampled frames are kept.

Run it:  python -m pytest tests/multimodal/test_video.py
Source: `Gemma4VideoProcessor`, `default_sample_indices_fn`, `read_video_pyav` of `transformers` 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from blockpress.config.vision import PictureSettings
from blockpress.errors import MediaError
from blockpress.multimodal.images import ProcessedImage, checked_budget, checked_pixels, to_patches
from blockpress.multimodal.sources import Source, open_media

LONGEST = 60
"""Seconds of the longest video; one of 60.9 seconds still passes."""

_FASTEST = 240
# Playlists and scripts name other files and addresses, which FFmpeg would fetch: containers only.
_CONTAINERS = "mov,matroska,webm,avi,ogg,mpegts,mpeg"


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """The frames that are shown to the model, and the time of each in seconds."""

    frames: tuple[ProcessedImage, ...]
    seconds: tuple[float, ...]


def prepare_videos(
    videos: Sequence[Source], settings: PictureSettings, max_soft_tokens: int | None = None
) -> list[Video]:
    """Each video as the tower reads it; `max_soft_tokens` is the budget of a frame. Errors as `read_video`."""
    budget = checked_budget(settings.video_soft_tokens if max_soft_tokens is None else max_soft_tokens)
    prepared = []
    for number, video in enumerate(videos, 1):
        try:
            prepared.append(read_video(video, settings, budget))
        except MediaError as error:
            raise MediaError(f"video {number} of {len(videos)}: {error.message}", hint=error.hint) from error
    return prepared


def read_video(source: Source, settings: PictureSettings, max_soft_tokens: int) -> Video:
    """The frames of a video, sampled at the settings' rate.

    Args:
        source: a path, the file's bytes or a data: URL.

    Raises:
        MediaError: PyAV is not installed; no such file, not a video, a damaged one, one without frames, or one longer
            than `LONGEST` seconds.
    """
    av = _pyav()
    with open_media(source, "video") as file:
        try:
            total, rate = _measure(av, file)
            numbers = sample_frames(total, rate, settings)

            def processed(image: Image.Image) -> ProcessedImage:
                return to_patches(image, settings, max_soft_tokens)

            frames, shown = _pick(av, file, numbers, processed)
            if 0 < shown != total:  # some packets hold no frame that is shown
                numbers = sample_frames(shown, rate, settings)
                frames, _ = _pick(av, file, numbers, processed)
        except MediaError:
            raise
        # FFmpeg and PyAV raise many types for a damaged file; whichever, it is the file's fault. So is FFmpeg's
        # MemoryError, for an allocation of the size that the file states.
        except Exception as error:
            if isinstance(error, MemoryError) and not isinstance(error, av.error.FFmpegError):
                raise
            raise MediaError(f"the video cannot be read: {error}", hint="give a whole MP4, MOV, WebM or AVI") from error
    if len(frames) < len(numbers):
        raise MediaError(
            f"the video is cut short: frame {numbers[len(frames)]} of {total} is not there", hint="give the whole file"
        )
    return Video(frames=tuple(frames), seconds=tuple(number / rate for number in numbers))


def sample_frames(total: int, rate: float, settings: PictureSettings) -> list[int]:
    """The numbers of the sampled frames out of `total`, which are shown at `rate` a second.

    >>> sample_frames(75, 25.0, PictureSettings(patch_size=16, pooling=3))
    [0, 25, 50]
    """
    if settings.video_frames is not None:
        count = min(settings.video_frames, total)
    else:
        count = min(max(1, int(total / rate * settings.frames_per_second)), total)
    return [index * total // count for index in range(count)]


def _measure(av: Any, file: BinaryIO) -> tuple[int, float]:
    """The number of frames that are shown and the frames per second, from the packets, without decoding."""
    with _container(av, file) as container:
        if not container.streams.video:
            raise MediaError("the file has no video in it", hint="give a video; is the file whole?")
        stream = container.streams.video[0]
        checked_pixels(stream.codec_context.width, stream.codec_context.height)
        total, end, begin = 0, 0, math.inf
        for packet in container.demux(stream):
            is_shown = packet.size > 0 and not packet.is_discard
            total += is_shown
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
            begin = min(begin, packet.pts) if is_shown and packet.pts is not None else begin
            if total > (LONGEST + 1) * _FASTEST:
                raise _too_long(f"more than {total - 1:,} frames")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        length = float((end - begin) * stream.time_base) if begin < end else 0.0
        # A container that does not state its length does not know its average rate either, if frames are not even.
        if rate > 0 and stream.duration is None and abs(total / rate - length) > 1 and length > 0:
            rate = total / length
        promised = (stream.start_time or 0) + (stream.duration or 0)
        if float((promised - end) * stream.time_base) > 1:
            raise MediaError("the video is cut short: its last seconds are not there", hint="give the whole file")
    if total == 0 or rate <= 0:
        raise MediaError("the video is empty: it has no frames", hint="give a video with at least one frame")
    if total / rate >= LONGEST + 1:
        raise _too_long(f"{total / rate:.1f} seconds")
    return total, rate


def _pick(
    av: Any, file: BinaryIO, numbers: Sequence[int], processed: Callable[[Image.Image], ProcessedImage]
) -> tuple[list[ProcessedImage], int]:
    """The frames of these numbers, and how many frames there are."""
    wanted, picked, shown = set(numbers), [], 0
    file.seek(0)
    with _container(av, file) as container:
        try:
            for frame in container.decode(video=0):
                if shown in wanted:
                    checked_pixels(frame.width, frame.height)
                    # Phones store videos rotated, together with the angle to turn them back by.
                    picked.append(processed(frame.to_image().convert("RGB").rotate(frame.rotation, expand=True)))
                shown += 1
        except av.error.FFmpegError:
            if len(picked) < len(numbers):  # what is damaged after the last of them does no harm
                raise
    return picked, shown


def _container(av: Any, file: BinaryIO) -> Any:
    return av.open(file, options={"format_whitelist": _CONTAINERS})


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise MediaError("reading videos needs PyAV", hint="pip install 'blockpress[video]'") from error
    return av


def _too_long(how: str) -> MediaError:
    return MediaError(f"the video is too long: {how}", hint=f"cut it to at most {LONGEST} seconds")
