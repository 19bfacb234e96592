"""Bytes into pages: how many an engine gets for each kind of layer, and how many one request needs at once.

    positions   0 ........ 255 | 256 ...... 511 | 512 ...... 767 |       a page is `page_length` tokens, in all layers
    full                     7 |              8 |              3 |       of its kind; page i of a request begins at i*P
    sliding            DROPPED |             12 |             13 |       dropped once the window has passed

Invariant: the planned pages hold at least one request of a page's context, and never take more than the given bytes.
Run it:  python -m pytest tests/engine/test_sizing.py
"""

from __future__ import annotations

from blockpress import costs
from blockpress.config import LayerKind, ModelConfig
from blockpress.engine.options import EngineOptions
from blockpress.errors import RequestError

DROPPED = -1
"""The entry in a request's table for a page that was released."""


def page_length(config: ModelConfig) -> int:
    """Tokens per page: a canvas, or 256 if the family has none.

    >>> from blockpress.config import PRESETS
    >>> page_length(PRESETS["sudoku-nano"]()), page_length(PRESETS["gemma4-26B-A4B"]())
    (90, 256)
    """
    return config.canvas_length if config.has_canvas else costs.PLAIN_PAGE


def num_pages(tokens: int, page: int) -> int:
    """Pages of the first `tokens` tokens."""
    return -(-tokens // page)


def window_pages(config: ModelConfig, chunk: int) -> int:
    """Most sliding pages that a request holds at once: those of a window and a chunk of `chunk` tokens after it.

    >>> from blockpress.config import PRESETS
    >>> window_pages(PRESETS["diffusiongemma-26B-A4B"](), 512)
    7
    """
    return num_pages(config.sliding_window - 1 + chunk, page_length(config)) + 1


def check_slots(config: ModelConfig, dtype: str, options: EngineOptions, free: int) -> None:
    """Raises RequestError: the canvases of `max_running` requests take more than `free` bytes, all that is free."""
    if config.has_canvas:
        slot = config.canvas_length * (config.hidden_size * costs.DTYPE_BYTES[dtype] + 24)  # the signal; three ids
        if (options.max_running + 1) * slot > free:
            raise RequestError(
                f"engine option max_running is {options.max_running}: a canvas takes {slot} bytes, and {free} are free",
                hint=f"lower max_running to at most {max(1, free // slot - 1)}",
            )


def plan_pages(config: ModelConfig, dtype: str, options: EngineOptions, bytes: int) -> dict[LayerKind, int]:
    """How many pages of each kind fit into `bytes`.

    Sliding pages for `max_running` requests if they take no more than half of the bytes, for one in any case; the rest
    are full ones, at most what `max_running` full contexts need. Each request gets one more sliding page than it needs,
    so that the page it released last stays reusable.

    Args:
        dtype: of the keys and values, a name of `costs.DTYPE_BYTES`.

    Raises:
        RequestError: not even one request fits; names `memory` and the bytes that one needs.

    >>> from blockpress.config import PRESETS
    >>> plan_pages(PRESETS["diffusiongemma-26B-A4B"](), "bfloat16", EngineOptions(), 16 * 2**30)
    {'sliding_attention': 163, 'full_attention': 1646}
    """
    page = page_length(config)
    sizes = {kind: size * page for kind, size in costs.context_bytes(config, dtype).items()}
    whole = num_pages(config.context_length, page)
    sliding = min(whole, window_pages(config, max(options.chunk, config.canvas_length)) + 1)
    minimum = {kind: sliding if kind == "sliding_attention" else 1 for kind in sizes}
    need = sum(sizes[kind] * count for kind, count in minimum.items())
    if bytes < need:
        raise RequestError(
            f"engine option memory is {options.memory}: {bytes} bytes for pages, and one request takes {need}",
            hint=f"raise memory to at least {need} bytes, or lower chunk ({options.chunk})",
        )
    counts: dict[LayerKind, int] = {}
    if "sliding_attention" in sizes:
        share = bytes // 2 if len(sizes) > 1 else bytes
        affordable = max(sliding, share // sizes["sliding_attention"])
        leaving_one = (bytes - sizes.get("full_attention", 0)) // sizes["sliding_attention"]
        counts["sliding_attention"] = min(options.max_running * sliding, affordable, leaving_one)
    if "full_attention" in sizes:
        rest = bytes - sum(sizes[kind] * count for kind, count in counts.items())
        counts["full_attention"] = min(options.max_running * whole, rest // sizes["full_attention"])
    return counts
