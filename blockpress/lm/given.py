"""Pins and drafts of calls, checked.

Invariant: what cannot stand in the answer is refused by its name, before any forward.
Run it:  python -m pytest tests/lm/test_given.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor

from blockpress.config import ModelConfig, Sampling
from blockpress.config.checks import is_number, value_text
from blockpress.decoding import Given
from blockpress.errors import RequestError
from blockpress.lm.arguments import AnySampling, GivenOptions, is_integer
from blockpress.lm.rows import check_ids

NOISE = 0.5
"""The noise level of a draft for which none is given."""


def read_given(
    options: GivenOptions, sampling: AnySampling, config: ModelConfig, encode: Callable[[str], list[int]]
) -> Given | None:
    """What a call gives of its answer; None: nothing. `encode`: a draft's text to ids.

    Raises:
        RequestError: pins or a draft that are malformed, or that the mode cannot hold.
    """
    pins, draft, noise = (options.get(name) for name in ("pins", "draft", "noise"))
    if pins is None and draft is None and noise is None:
        return None
    given = next(name for name in ("pins", "draft", "noise") if options.get(name) is not None)
    if not isinstance(sampling, Sampling):
        raise RequestError(
            f"{given} is given in the mode 'autoregressive', which has no canvas", hint="use the mode 'diffusion'"
        )
    checked = check_pins(pins, config)
    if draft is None:
        if noise is not None:
            raise RequestError(f"noise is {value_text(noise)} without a draft", hint="give the draft that it is for")
        return Given(pins=checked)
    ids = encode(draft) if isinstance(draft, str) else cast("Sequence[int] | Tensor", draft)
    tokens = check_ids(config, ids, "draft")
    return Given(
        pins=checked, draft=dict(enumerate(tokens)), noise=dict.fromkeys(range(len(tokens)), check_noise(noise))
    )


def check_pins(pins: object, config: ModelConfig) -> dict[int, int]:
    """Positions and token ids as plain integers. Raises RequestError: they are none, or outside the vocabulary."""
    if pins is None:
        return {}
    if not isinstance(pins, Mapping):
        raise RequestError(f"pins is {value_text(pins)}", hint="pins must map positions to token ids: {0: 5, 7: 3}")
    for place, token in pins.items():
        if not is_integer(place) or place < 0:
            raise RequestError(f"pins has position {value_text(place)}", hint="positions are whole numbers from 0")
        if not is_integer(token) or not 0 <= token < config.vocab_size:
            raise RequestError(
                f"pins has {value_text(token)} at position {place}",
                hint=f"pins must hold token ids from 0 to {config.vocab_size - 1}",
            )
    return {int(place): int(token) for place, token in sorted(pins.items())}


def check_noise(noise: object) -> float:
    """The noise level of a draft. Raises RequestError: it is no number from 0 to 1."""
    if noise is None:
        return NOISE
    if not is_number(noise) or not 0 <= cast("float", noise) <= 1:
        raise RequestError(f"noise is {value_text(noise)}", hint="noise must be a number from 0 to 1")
    return float(cast("float", noise))
