"""What a caller changes in the logits before a token is chosen: for canvases and for single tokens alike.

    logits --bias, banned--> --penalties--> / temperature --top_k, top_p, min_p--> what is drawn

Names, ranges and order are those of OpenAI, vLLM and `transformers`; what they mean on a canvas: docs/sampling.md.

Invariant: edits that exist are valid; errors name the field and its value. Whether ids are in the vocabulary is known
only beside a model (`lm.arguments.check_sampling`).
Run it:  python -m pytest tests/test_config.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpress.config.checks import is_count, is_number, value_text
from blockpress.errors import RequestError

MOST_ID = 2**31 - 1
"""The largest token id that any vocabulary could have."""
LEAST_REPETITION, MOST_REPETITION = 1e-3, 1e3
"""The penalties by which any float32 logit can be divided or multiplied at any temperature."""


@dataclass(frozen=True, kw_only=True)
class LogitEdits:
    """logit_bias: token id to what is added to its logit, -100 to 100; these two all but ban or force a token.
    allowed_token_ids: all other tokens are banned; None: none are. suppress_tokens: ids that are banned.
    presence_penalty: taken from the logit of a token that the answer has before this place, -2 to 2.
    frequency_penalty: the same, times how often it has. repetition_penalty: what divides the logit of a token that the
    prompt or the answer has before this place if it is positive, and multiplies it otherwise. repeat_last_n: how many
    places before this one, those of the prompt included, these three penalties look at; None: all. top_k: how many of
    the likeliest tokens may be sampled; None: all. top_p: of these, the likeliest that together have at least this
    probability may be sampled. min_p: of these, those that have at least this share of the likeliest one's probability.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int | None = None
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "min_p"):
            if is_number(getattr(self, name)):
                object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("top_k", "repeat_last_n"):
            if is_count(getattr(self, name), 0):
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _need(is_number(value) and -2 <= value <= 2, name, value, "a number from -2 to 2")
        repetition, limits = self.repetition_penalty, f"a number from {LEAST_REPETITION} to {MOST_REPETITION:g}"
        fits = is_number(repetition) and LEAST_REPETITION <= repetition <= MOST_REPETITION
        _need(fits, "repetition_penalty", repetition, f"{limits}; 1 changes nothing")
        fits = self.repeat_last_n is None or is_count(self.repeat_last_n, 0, MOST_ID)
        _need(fits, "repeat_last_n", self.repeat_last_n, f"a whole number from 0 to {MOST_ID}, or None")
        fits = self.top_k is None or is_count(self.top_k, 1, MOST_ID)
        _need(fits, "top_k", self.top_k, f"a whole number from 1 to {MOST_ID}, or None")
        _need(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, at most 1")
        _need(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a share from 0 to 1")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "suppress_tokens", _ids("suppress_tokens", self.suppress_tokens))
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            _need(bool(allowed), "allowed_token_ids", allowed, "None, or at least one token id")
            left = set(allowed) - set(self.suppress_tokens)
            _need(bool(left), "allowed_token_ids", allowed, "more than what suppress_tokens bans")
            object.__setattr__(self, "allowed_token_ids", allowed)

    @property
    def changed(self) -> dict[str, Any]:
        """Those of these fields that are not the default."""
        plain = LogitEdits()
        pairs = ((name, getattr(self, name), getattr(plain, name)) for name in LogitEdits.__dataclass_fields__)
        return {name: value for name, value, default in pairs if value != default}

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on what has been written."""
        given = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)
        return given and self.repeat_last_n != 0

    @property
    def edits_logits(self) -> bool:
        """Whether logits change before what may be drawn is cut down."""
        banned = self.allowed_token_ids is not None or bool(self.suppress_tokens)
        return banned or bool(self.logit_bias) or self.has_penalties

    @property
    def truncates(self) -> bool:
        """Whether only some tokens may be drawn."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0

    @property
    def token_ids(self) -> Mapping[str, Collection[int]]:
        """The token ids that are named, by field."""
        named: dict[str, Collection[int]] = {"logit_bias": self.logit_bias, "suppress_tokens": self.suppress_tokens}
        return named | {"allowed_token_ids": self.allowed_token_ids or ()}


def _need(ok: bool, name: str, value: object, what: str) -> None:
    if not ok:
        raise RequestError(f"sampling field {name} is {value_text(value)}", hint=f"{name} must be {what}")


def _biases(bias: Any) -> dict[int, float]:
    """A copy as plain numbers, in ascending order of the ids."""
    _need(isinstance(bias, Mapping), "logit_bias", bias, "a mapping of token ids to numbers: {5: -1.5}")
    for token, value in bias.items():
        what = f"by token ids, whole numbers from 0, which {value_text(token)} is not"
        _need(is_count(token, 0, MOST_ID), "logit_bias", bias, what)
        what = f"of numbers from -100 to 100: that of {int(token)} is {value_text(value)}"
        _need(is_number(value) and -100 <= value <= 100, "logit_bias", bias, what)
    return {int(token): float(bias[token]) for token in sorted(bias)}


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    """Plain integers in ascending order, each once."""
    fits = isinstance(ids, Collection) and not isinstance(ids, str | bytes | Mapping)
    listed: list[Any] = list(ids) if fits else [None]
    _need(all(is_count(token, 0, MOST_ID) for token in listed), name, ids, "a list of token ids, whole numbers from 0")
    return tuple(sorted({int(token) for token in listed}))
