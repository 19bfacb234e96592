"""The images and videos that `run` shows a model, as parts of a chat's first message.

Invariant: a missing file, an unreadable image, and a model that has no vision or no chat template are reported by the
option's name before any weight is read.

Run it:  blockpress run ./my-checkpoint "What is this?" --image photo.jpg
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockpress.cli.options import refuse
from blockpress.errors import MediaError, RequestError

if TYPE_CHECKING:
    from blockpress.checkpoints import Checkpoint


def parts(images: Sequence[str], videos: Sequence[str], soft_tokens: int | None) -> tuple[dict[str, Any], ...]:
    """The message parts that show these files: the images, then the videos.

    Raises:
        RequestError, MediaError: a file is missing or no image, or soft_tokens is not a budget or has nothing to show.
    """
    from blockpress.config.vision import BUDGETS

    if soft_tokens is not None and soft_tokens not in BUDGETS:
        known = ", ".join(map(str, BUDGETS))
        raise RequestError(f"--soft-tokens is {soft_tokens}", hint=f"--soft-tokens takes one of {known}")
    if soft_tokens is not None and not (images or videos):
        raise RequestError(
            "--soft-tokens is given with nothing to show", hint="give --image or --video, or leave it out"
        )
    return (
        *({"type": "image", "image": _image(path)} for path in images),
        *({"type": "video", "video": _file(path, "--video")} for path in videos),
    )


def check_model(checkpoint: Checkpoint, chat: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Raises RequestError: a `chat` option (not None) for a model without a template, or a `shown` option for a model
    without vision."""
    given = [name for name, value in {**chat, **shown}.items() if value is not None]
    if not given:
        return
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    if tokenizer is None or tokenizer.chat_template is None:
        refuse(f"{checkpoint.path.name}, which has no chat template", {**chat, **shown})
    if config.vision is None or not config.has_canvas:
        refuse(f"{checkpoint.path.name}, which sees nothing", shown)


def _image(path: str) -> Any:
    """The opened image: a damaged file is reported here, and a conversation reads it once."""
    from blockpress.multimodal import open_image

    try:
        return open_image(_file(path, "--image"))
    except MediaError as error:
        raise MediaError(f"--image {path}: {error.message}", hint=error.hint) from error


def _file(path: str, option: str) -> str:
    expanded = os.path.expanduser(path)
    if not os.path.isfile(expanded):
        raise RequestError(f"{option} is {path!r}, and there is no such file", hint=f"give {option} the path of a file")
    return expanded
