"""Where media come from: a file, bytes in memory, or a data: URL. Never the network.

Invariant: only the source that the caller named is opened. A server passes bytes or `from_data_url`, so that no text
from a client is used as a path.

Run it:  python -m pytest tests/multimodal/test_images.py
Source: RFC 2397 (data: URLs).
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from blockpress.errors import MediaError

Source = str | os.PathLike[str] | bytes
"""A path, a data: URL, or the file's own bytes."""


def open_media(source: Source, kind: str) -> BinaryIO:
    """The media file as a binary stream, which the caller closes.

    Args:
        kind: what the file should hold, "image" or "video", for error messages.

    Raises:
        MediaError: no such file, another kind of URL, an empty file, or a value that is no source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = from_data_url(source)
    elif isinstance(source, str) and "://" in source[:16]:
        raise MediaError(
            f"the {kind} {source[:80]!r} is a URL", hint="fetch it first, and give its bytes, a path or a data: URL"
        )
    elif isinstance(source, str | os.PathLike):
        return _open_file(Path(source), kind)
    else:
        raise MediaError(
            f"the {kind} is a {type(source).__name__}", hint=f"give a path, bytes or a data: URL of the {kind}"
        )
    if not data:
        raise MediaError(f"the {kind} is empty: 0 bytes", hint=f"give the bytes of a whole {kind}")
    return io.BytesIO(data)


def from_data_url(url: str) -> bytes:
    """The bytes in a data: URL, base64 or percent-encoded. Raises MediaError: it is not one, or not valid base64.

    >>> from_data_url("data:text/plain;base64,aGk=")
    b'hi'
    """
    head, comma, body = url.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise MediaError(f"{url[:40]!r} is no data: URL", hint="it must read like data:image/png;base64,iVBORw0...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"the data: URL is not base64: {error}", hint="encode the file's bytes as base64") from error


def _open_file(path: Path, kind: str) -> BinaryIO:
    path = path.expanduser()
    try:
        if path.stat().st_size == 0:
            raise MediaError(f"the {kind} {str(path)!r} is empty: 0 bytes", hint="was the download cut short?")
        return path.open("rb")
    # ValueError: a path with a null character.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(
            f"the {kind} {str(path)[:200]!r} cannot be opened: {reason}", hint="check the path and its rights"
        ) from error
