"""What a page holds, as a digest: pages of equal digests hold equal keys and values, whoever read them.

    page    0                    1                     2
    digest  H(root, tokens 0)    H(digest 0, tokens)   H(digest 1, tokens, picture)
                                                       |<--- picture: start, length, what it shows --->|

The keys and values of a page depend on all tokens before it, hence the chain; its tokens depend on a picture that
reaches into it as a whole, since the tokens of a picture see each other in both directions.

Invariant: exact. A digest says everything that the contents of a page depend on, beside the network.
Run it:  python -m pytest tests/engine/test_prefix_cache.py
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256

from blockpress.engine.request import HashedImageSpan, Request

_ROOT = sha256(b"blockpress page").digest()


def page_digest(parent: bytes, tokens: Sequence[int], pictures: Sequence[HashedImageSpan]) -> bytes:
    """The digest of a page of `tokens` behind `parent`, with the pictures that reach into it."""
    told = sha256(parent)
    told.update(array("q", tokens).tobytes())
    for picture in pictures:
        told.update(array("q", (picture.start, picture.length, len(picture.digest))).tobytes())
        told.update(picture.digest)
    return told.digest()


def extend_digests(request: Request, pages: int, page: int) -> list[bytes]:
    """The digests of the first `pages` pages of a request's context, each computed once; they stay with the request."""
    known = request.digests
    for at in range(len(known) * page, pages * page, page):
        shown = [one for one in request.image_spans if one.start < at + page and one.stop > at]
        known.append(page_digest(known[-1] if known else _ROOT, request.context[at : at + page], shown))
    return known[:pages]


def longest_prefix(
    request: Request,
    page: int,
    known: Callable[[int], tuple[bool, bool]],
    window: int | None,
) -> int:
    """How many whole pages at the beginning of a request's context can be taken over.

    A prefix needs all its full pages, and of the sliding ones those that the window reaches back to; it ends in no
    picture, and before the last tokens that the request hears.

        full       + + + + -          page 3 is the last that is known everywhere
        sliding    - - + + -          window of one page: 4 pages; of three pages: none

    Args:
        known: for page i, whether its full page is there (True where there is no such kind), and its sliding one.
        window: how far a sliding layer looks back, the token itself included; None without sliding layers.
    """
    most = (len(request.context) - request.num_logit_tokens) // page
    best = behind = 0  # pages in a row up to here whose sliding page is there
    for number in range(most):
        full, sliding = known(number)
        if not full:
            break
        behind = behind + 1 if sliding else 0
        stop = (number + 1) * page
        oldest = 0 if window is None else max(0, stop - (window - 1)) // page
        inside = any(one.start < stop < one.stop for one in request.image_spans)
        if behind >= number + 1 - oldest and not inside:
            best = number + 1
    return best
