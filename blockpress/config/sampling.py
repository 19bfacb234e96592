"""`generation_config.json`: how a canvas is denoised, how a token is sampled, and which ids end an answer.

Null or absent means the reference's default.

Invariant: a sampling that exists is valid; errors name the field and its value.
Run it:  python -m pytest tests/test_config.py
Source: reference model, section 2; for tokens `GenerationConfig` of `transformers` 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from blockpress.config.checks import is_count, is_number, require, value_text
from blockpress.config.edits import LogitEdits
from blockpress.config.model import ModelConfig
from blockpress.errors import ConfigError, RequestError, newer_names, renamed_fields

DEFAULT_MAX_VERIFICATIONS = 4
"""How many verifications of a canvas the mode "verified" does by default."""
MOST = 2**31 - 1
"""The largest count of steps, verifications and kept tokens."""
MOST_REPAIRS = 1000
"""The largest number of repairs of a canvas: each has draws of its own, and there are so many."""
COLDEST, HOTTEST = 1e-30, 1e30
"""The temperatures by which float32 logits can be divided. At the coldest only the likeliest token is left."""
_TEMPERATURE = f"a temperature from {COLDEST} to {HOTTEST}"

_OLDER = {"checks": "max_verifications"}  # until version 0.3


@renamed_fields(**_OLDER)
@dataclass(frozen=True, kw_only=True)
class Sampling(LogitEdits):
    """How a canvas is denoised; the defaults are the reference's.

    steps: most denoising steps per canvas. entropy_bound: most nats of the accepted tokens together, the largest not
    counted. t_max, t_min: temperature at the first step and after the last; the last step's is above t_min, which may
    be 0. stability: consecutive steps whose argmax must agree before a canvas settles. confidence: mean entropy (nats
    per token) below which it may settle. max_verifications: how many times at most the causal pass verifies a settled
    canvas, and what it rejects is denoised again; 0: never. max_repairs: how many times at most places of a settled
    canvas are denoised again, all others held: those whose token the causal pass gives a probability below
    repair_below; 0: never. checked_spans: what is verified or repaired, as (start, stop) pairs of places in the answer;
    it is called with the answer's tokens, the settled canvas included; None: all. release: steps for which the first
    tokens of a canvas must have stayed, each at most at the entropy `confidence`, to be pinned and their text released
    before the canvas ends; 0: text is released with its canvas. greedy: whether accepted positions hold their likeliest
    tokens, not samples; what is accepted stays as it is. stop: text that ends the answer and is not part of it.
    accept, settle: your own rules (`diffusion.Accept` and `diffusion.Settle`) instead of the entropy bound, and of
    stability and confidence; their steps are not captured on a GPU, nor are those with edits of the logits
    (`LogitEdits` has these fields).
    """

    steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability: int = 1
    confidence: float = 0.005
    max_verifications: int = 0
    max_repairs: int = 0
    repair_below: float = 0.01
    checked_spans: Callable[[Sequence[int]], Iterable[tuple[int, int]]] | None = None
    release: int = 0
    greedy: bool = False
    stop: tuple[str, ...] = ()
    accept: Callable[[Any], Any] | None = None
    settle: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise RequestError(
                    f"sampling field {name} is {value_text(getattr(self, name))}", hint=f"{name} must be {what}"
                )

        numbers = ("entropy_bound", "t_min", "t_max", "confidence", "repair_below")
        _as_python(self, ("steps", "stability", "max_verifications", "max_repairs", "release"), numbers)
        need(is_count(self.steps, 1, MOST), "steps", f"a whole number from 1 to {MOST}")
        need(is_number(self.entropy_bound) and self.entropy_bound > 0, "entropy_bound", "a number above 0 (nats)")
        need(is_number(self.t_max) and COLDEST <= self.t_max <= HOTTEST, "t_max", _TEMPERATURE)
        need(is_number(self.t_min) and 0 <= self.t_min <= HOTTEST, "t_min", f"a temperature from 0 to {HOTTEST}")
        need(self.t_max >= self.t_min, "t_max", f"a temperature of at least t_min ({self.t_min})")
        last = self.t_min + (self.t_max - self.t_min) / int(self.steps)
        need(last >= COLDEST, "t_min", f"at least {COLDEST}: at the last step the temperature would be {last}")
        need(is_count(self.stability, 0, MOST), "stability", f"a whole number from 0 to {MOST}")
        need(is_number(self.confidence) and self.confidence >= 0, "confidence", "0 or more (nats a token)")
        need(is_count(self.max_verifications, 0, MOST), "max_verifications", f"a whole number from 0 to {MOST}")
        need(is_count(self.max_repairs, 0, MOST_REPAIRS), "max_repairs", f"a whole number from 0 to {MOST_REPAIRS}")
        either = not (self.max_repairs and self.max_verifications)
        need(either, "max_repairs", "0 where max_verifications is not: a canvas is repaired or verified")
        need(
            is_number(self.repair_below) and 0 < self.repair_below < 1, "repair_below", "a probability between 0 and 1"
        )
        need(
            self.checked_spans is None or callable(self.checked_spans), "checked_spans", "a callable of tokens, or None"
        )
        need(isinstance(self.greedy, bool), "greedy", "True or False")
        need(is_count(self.release, 0, MOST), "release", f"a whole number from 0 to {MOST}")
        need(self.accept is None or callable(self.accept), "accept", "a callable of entropies, or None")
        need(self.settle is None or callable(self.settle), "settle", "a callable of counts and entropies, or None")
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        super().__post_init__()

    @property
    def reads_drafts(self) -> bool:
        """Whether the causal pass reads a settled canvas before it is committed."""
        return self.max_verifications > 0 or self.max_repairs > 0

    def with_(self, **changes: Any) -> Sampling:
        """A copy with some fields changed; the result is checked."""
        changes = newer_names("Sampling", _OLDER, changes)
        _check_names(self, changes)
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampling(LogitEdits):
    """How the next token is chosen in autoregressive decoding; the defaults take the likeliest one.

    temperature: the logits are divided by it; 0 takes the likeliest token, and top_k, top_p and min_p have no effect.
    stop: text that ends the answer and is not part of it. The other fields are those of `LogitEdits`.
    """

    temperature: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise RequestError(
                    f"sampling field {name} is {value_text(getattr(self, name))}", hint=f"{name} must be {what}"
                )

        _as_python(self, (), ("temperature",))
        divides = is_number(self.temperature) and (self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST)
        need(divides, "temperature", f"0, or {_TEMPERATURE}")
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        super().__post_init__()

    def with_(self, **changes: Any) -> AutoregressiveSampling:
        """A copy with some fields changed; the result is checked."""
        _check_names(self, changes)
        return replace(self, **changes)


def _as_python(sampling: Sampling | AutoregressiveSampling, counts: Collection[str], numbers: Collection[str]) -> None:
    """Counts and numbers of NumPy and other kinds become Python's own; what is none stays as it is, to be refused."""
    for name in (*counts, *numbers):
        value = getattr(sampling, name)
        if is_number(value) and not (name in counts and not isinstance(value, Integral)):
            object.__setattr__(sampling, name, int(value) if name in counts else float(value))


def _check_names(sampling: Sampling | AutoregressiveSampling, changes: Mapping[str, Any]) -> None:
    unknown = [name for name in changes if name not in sampling.__dataclass_fields__]
    if unknown:
        raise RequestError(
            f"sampling has no field {unknown[0]!r}", hint=f"fields: {', '.join(sampling.__dataclass_fields__)}"
        )


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    if not (isinstance(texts, tuple) and all(isinstance(text, str) and text for text in texts)):
        raise RequestError(
            f"sampling field stop is {value_text(texts)}",
            hint="stop must be a text or a list of texts, none of them empty",
        )
    return texts


# Fields with which the reference would change the choice of a token in other ways. Value: what changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "penalty_alpha": (None, 0),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """`generation_config.json`: the samplers and the ids that end an answer. Null or absent means the default.

    `sampling` is for canvases, `autoregressive` for single tokens; `has_canvas` tells whether the file's family has
    canvases. `max_new_tokens` in it is the default of one library's call, never a limit here.
    """

    sampling: Sampling = Sampling()
    autoregressive: AutoregressiveSampling = AutoregressiveSampling()
    has_canvas: bool = True
    stop_ids: tuple[int, ...] = (1,)
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> GenerationConfig:
        """Read the file; `config` gives the stop ids where the file has none.

        Raises:
            ConfigError: a value of the wrong type or range, a sampler that is not the entropy-bound one, or, in a
                family without canvases, a field that would choose tokens in a way that is not implemented.
        """
        sampler = data.get("sampler_config")
        require(sampler is None or isinstance(sampler, Mapping), "sampler_config", sampler, "an object")
        sampler = sampler or {}
        name = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
        require(name == "EntropyBoundSamplerConfig", "sampler_config._cls_name", name, "'EntropyBoundSamplerConfig'")
        given = {
            "steps": data.get("max_denoising_steps"),
            "entropy_bound": sampler.get("entropy_bound"),
            "t_min": data.get("t_min"),
            "t_max": data.get("t_max"),
            "stability": data.get("stability_threshold"),
            "confidence": data.get("confidence_threshold"),
        }
        if not config.has_canvas:
            for key, allowed in _NEUTRAL.items():
                require(data.get(key) in allowed, key, data.get(key), " or ".join(map(repr, allowed)))
        try:
            sampling = Sampling(**{k: v for k, v in given.items() if v is not None})
            autoregressive = AutoregressiveSampling(**_tokens(data))
        except RequestError as error:
            raise ConfigError(f"generation_config.json: {error.message}", hint=error.hint) from error
        eos = data.get("eos_token_id")
        stop_ids = config.eos_ids if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        for token in stop_ids:
            require(is_count(token, 0), "eos_token_id", token, "a token id or a list of them")
        return cls(
            sampling=sampling,
            autoregressive=autoregressive,
            has_canvas=config.has_canvas,
            stop_ids=stop_ids,
            source=data,
        )

    def to_dict(self) -> dict[str, Any]:
        """The file's content, in the reference's field names."""
        out = dict(self.source) | {"eos_token_id": list(self.stop_ids)}
        s, t = self.sampling, self.autoregressive
        rules = {name: getattr(s, name) for name in ("accept", "settle", "checked_spans")}
        edits = s.changed | {name: value for name, value in t.changed.items() if name not in _HELD}
        for name, value in [*edits.items(), *((name, rule) for name, rule in rules.items() if rule is not None)]:
            raise ConfigError(
                f"sampling field {name} is {value_text(value)}, which generation_config.json cannot hold",
                hint=f"save it without {name}, and hand it in when you generate",
            )
        if self.has_canvas:
            out |= {
                "max_denoising_steps": s.steps,
                "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": s.entropy_bound},
                "t_min": s.t_min,
                "t_max": s.t_max,
                "stability_threshold": s.stability,
                "confidence_threshold": s.confidence,
            }
        if t.temperature > 0:
            out |= {"do_sample": True, "temperature": t.temperature, "top_k": t.top_k or 0, "top_p": t.top_p}
            out |= {"min_p": t.min_p} if t.min_p or "min_p" in out else {}
        elif self.source.get("do_sample"):
            out["do_sample"] = False
        penalty, suppressed = t.repetition_penalty, list(t.suppress_tokens)
        out |= {"repetition_penalty": penalty} if penalty != 1 or "repetition_penalty" in out else {}
        return out | ({"suppress_tokens": suppressed} if suppressed or "suppress_tokens" in out else {})


_HELD = ("top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens")
"""Edits of the logits of single tokens that the file can hold."""


def _tokens(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that choose a token, as the reference reads them."""
    always = {name: data.get(name) for name in ("repetition_penalty", "suppress_tokens")}
    return {name: value for name, value in always.items() if value is not None} | _sampled(data)


def _sampled(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those that apply only if `do_sample` is true; then an absent top_k is 50, and 0 is no limit."""
    sample = data.get("do_sample")
    require(sample is None or isinstance(sample, bool), "do_sample", sample, "true, false or null")
    if not sample:
        return {}
    given = {name: data.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    fields = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | {k: v for k, v in given.items() if v is not None}
    # The limits of these two, at which only the likeliest token is left.
    if any(is_number(fields[name]) and fields[name] == 0 for name in ("temperature", "top_p")):
        return {}
    return fields | {"top_k": fields["top_k"] or None}
