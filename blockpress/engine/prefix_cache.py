"""Digests of page contents: pages of equal digests hold equal keys and values, whichever request wrote them.

    page    0                    1                     2
    digest  H(root, tokens 0)    H(digest 0, tokens)   H(digest 1, tokens, image)
                                                       |<--- image: start, length, digest of features --->|

The keys and values of a page depend on all tokens before it, hence the chain; and on the whole of an image that
overlaps it, since the tokens of an image see each other in both directions.

Invariant: exact. A digest covers everything that the contents of a page depend on, apart from the network.
Run it:  python -m pytest tests/engine/test_prefix_cache.py
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256

from blockpress.engine.request import HashedImageSpan, Request

_ROOT = sha256(b"blockpress page").digest()


def page_digest(parent: bytes, tokens: Sequence[int], images: Sequence[HashedImageSpan]) -> bytes:
    """The digest of a page of `tokens` after the page of digest `parent`, with the images that overlap it."""
    digest = sha256(parent)
    digest.update(array("q", tokens).tobytes())
    for image in images:
        digest.update(array("q", (image.start, image.length, len(image.digest))).tobytes())
        digest.update(image.digest)
    return digest.digest()


def extend_digests(request: Request, pages: int, page: int) -> list[bytes]:
    """The digests of the first `pages` pages of a request's context; each is computed once and kept in the request."""
    digests = request.digests
    for start in range(len(digests) * page, pages * page, page):
        images = [span for span in request.image_spans if span.start < start + page and span.stop > start]
        digests.append(page_digest(digests[-1] if digests else _ROOT, request.context[start : start + page], images))
    return digests[:pages]


def longest_prefix(
    request: Request,
    page: int,
    known: Callable[[int], tuple[bool, bool]],
    window: int | None,
) -> int:
    """How many pages at the beginning of a request's context can be reused.

    A prefix needs all its full-attention pages, and those sliding-attention pages that the window reaches back to. It
    must not end inside an image, nor include the last tokens whose hidden states the request needs.

        full       + + + + -          page 3 is the last that is cached in both kinds
        sliding    - - + + -          window of one page: 4 pages; of three pages: none

    Args:
        known: for page i, whether its full-attention and its sliding-attention page are cached (True if the network has
            no such layers).
        window: the sliding window, including the token itself; None without sliding layers.
    """
    most = (len(request.context) - request.num_logit_tokens) // page
    best = consecutive = 0  # consecutive: cached sliding pages up to here
    for number in range(most):
        full, sliding = known(number)
        if not full:
            break
        consecutive = consecutive + 1 if sliding else 0
        stop = (number + 1) * page
        oldest = 0 if window is None else max(0, stop - (window - 1)) // page
        inside = any(span.start < stop < span.stop for span in request.image_spans)
        if consecutive >= number + 1 - oldest and not inside:
            best = number + 1
    return best
