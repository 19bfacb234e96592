"""Frames as one animated SVG, which plays in any browser and on GitHub: CSS keyframes, no script, nothing from outside.

    frame       0   1   2   3       a mark is written once, however many frames show it; marks that the same frames show
    mark a      x   x   x   x       stand in one group, and a keyframe rule says when the group is seen. What is in
    mark b      x   .   .   .       all frames, such as a, needs none.
    marks c, d  .   x   x   .

Invariant: the same frames give the same bytes; and where nothing moves (a reader asked for reduced motion, a program
knows no CSS animation), what is seen is the last frame.

Run it:  python -m pytest tests/cli/test_record.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

from blockpress.errors import RequestError
from blockpress.hardware import whole_file

FADE = 0.12  # seconds in which one frame becomes the next
NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Frame:
    """Elements of SVG that are seen together, and for how long."""

    marks: tuple[str, ...]
    seconds: float


def animation(frames: Sequence[Frame], size: tuple[int, int], style: str, title: str, described: str) -> str:
    """The frames as an SVG document of `size`, width and height in pixels, that begins again after the last.

    Args:
        style: rules of CSS for the marks. title, described: what it shows, for whoever cannot see it.
    """
    seen: dict[str, int] = {}  # of each mark, in the order of its first frame: bit i is set where frame i shows it
    for number, frame in enumerate(frames):
        for mark in frame.marks:
            seen[mark] = seen.get(mark, 0) | 1 << number
    groups: dict[int, list[str]] = {}
    for mark, bits in seen.items():
        groups.setdefault(bits, []).append(mark)
    always, last = (1 << len(frames)) - 1, 1 << (len(frames) - 1)
    lines, plays, rules = ["<g>", *groups.pop(always, []), "</g>"], [], []
    total = sum(frame.seconds for frame in frames)
    for number, (bits, marks) in enumerate(groups.items()):
        hidden = "" if bits & last else ' opacity="0"'
        lines += [f'<g class="k{number}"{hidden}>', *marks, "</g>"]
        plays.append(f".k{number}{{animation:k{number} {_short(total)}s linear infinite}}")
        rules.append(f"@keyframes k{number}{{{_keyframes(bits, frames)}}}")
    width, height = size
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title desc">',
            f'<title id="title">{escaped(title)}</title>',
            f'<desc id="desc">{escaped(described)}</desc>',
            "<style>",
            style.strip("\n"),
            "@media (prefers-reduced-motion:no-preference){",
            *plays,
            "}",
            *rules,
            "</style>",
            *lines,
            "</svg>\n",
        ]
    )


def escaped(text: str) -> str:
    """`text` as XML may hold it; a character that it may not hold becomes a replacement mark."""
    return escape(NO_XML.sub("\ufffd", text))


def check_file(given: str | None) -> Path | None:
    """The file that `--record` names, which can be written now.

    Raises:
        RequestError: another suffix, a folder, or a file that cannot be made there.
    """
    if given is None:
        return None
    file = Path(given).expanduser()
    if file.suffix.lower() != ".svg":
        raise RequestError(f"--record is {given!r}, and a recording is an SVG", hint="give a name that ends in .svg")
    try:
        if file.is_dir():
            raise RequestError(f"--record is {given!r}, a folder", hint=f"give a file, such as {file / 'canvas.svg'}")
        if not file.parent.is_dir():
            raise RequestError(
                f"--record is {given!r}, and its folder is not there", hint=f"make the folder {file.parent} first"
            )
        _part(file).touch()
        _part(file).unlink()
    except OSError as error:
        raise _unwritable(f"--record is {given!r}, which", error) from error
    return file


def save(file: Path, svg: str) -> None:
    """Write `svg` to `file`, all of it or nothing; what was there until now is replaced.

    Raises:
        RequestError: the file cannot be written after all.
    """
    content = svg.encode()
    with whole_file(file, need=len(content), kind=RequestError) as part:
        part.write_bytes(content)


def _part(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}")


def _unwritable(what: str, error: OSError) -> RequestError:
    return RequestError(
        f"{what} cannot be written: {error.strerror}", hint="check the path, its rights and the room on the disk"
    )


def _keyframes(bits: int, frames: Sequence[Frame]) -> str:
    """The opacity of a group through one round: 1 in the frames whose bits are set, 0 in the others."""
    total = sum(frame.seconds for frame in frames)
    starts = [0.0, *accumulate(frame.seconds for frame in frames)]
    times, rules, on = [0.0], [], 0
    for number, (start, frame) in enumerate(zip(starts, frames, strict=False)):
        on = bits >> number & 1
        if number and on != bits >> (number - 1) & 1:
            rules.append(f"{_stops([*times, start], total)}{{opacity:{1 - on}}}")
            times = [start + min(FADE, frame.seconds / 3)]
    rules.append(f"{_stops([*times, total], total)}{{opacity:{on}}}")
    return "".join(rules)


def _stops(seconds: Sequence[float], total: float) -> str:
    return ",".join(f"{_short(100 * second / total)}%" for second in seconds)


def _short(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")
