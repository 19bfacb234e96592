"""`generation_config.json`: how a canvas is denoised and which ids end an answer.

Null or absent means the reference's default. Source: reference model, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blockpress.config.checks import check, is_count, is_number
from blockpress.config.model import ModelConfig
from blockpress.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a canvas is denoised; the defaults are the reference's.

    steps: most denoising steps a canvas. entropy_bound: nats that the accepted tokens may hold together, the largest
    left out. t_max, t_min: temperature at the first step and after the last. stability: steps in a row whose argmax
    must agree before a canvas settles. confidence: mean entropy (nats a token) below which it may settle. stop: text
    that ends the answer and is not part of it.
    """

    steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability: int = 1
    confidence: float = 0.005
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise RequestError(f"sampling field {name} is {getattr(self, name)!r}", hint=f"{name} must be {what}")

        need(is_count(self.steps), "steps", "a whole number of at least 1")
        need(is_number(self.entropy_bound) and self.entropy_bound > 0, "entropy_bound", "a number above 0 (nats)")
        need(is_number(self.t_min) and self.t_min > 0, "t_min", "a temperature above 0")
        need(
            is_number(self.t_max) and self.t_max >= self.t_min,
            "t_max",
            f"a temperature of at least t_min ({self.t_min})",
        )
        need(is_count(self.stability, 0), "stability", "a whole number of at least 0")
        need(is_number(self.confidence) and self.confidence >= 0, "confidence", "0 or more (nats a token)")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        need(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            "stop",
            "a text or a list of texts, none of them empty",
        )

    def with_(self, **changes: Any) -> Sampling:
        """A copy with some fields changed (and checked)."""
        unknown = [name for name in changes if name not in self.__dataclass_fields__]
        if unknown:
            raise RequestError(
                f"sampling has no field {unknown[0]!r}", hint=f"fields: {', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """`generation_config.json`: the sampler and the ids that end an answer. Null or absent means the default.

    `max_new_tokens` in that file is the default of one library's call, never a cap here.
    """

    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = (1,)
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> GenerationConfig:
        """Read the file; `config` gives the stop ids where the file has none.

        Raises:
            ConfigError: a value of the wrong type or range, or a sampler that is not the entropy-bound one.
        """
        sampler = data.get("sampler_config")
        check(sampler is None or isinstance(sampler, Mapping), "sampler_config", sampler, "an object")
        sampler = sampler or {}
        name = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
        check(name == "EntropyBoundSamplerConfig", "sampler_config._cls_name", name, "'EntropyBoundSamplerConfig'")
        given = {
            "steps": data.get("max_denoising_steps"),
            "entropy_bound": sampler.get("entropy_bound"),
            "t_min": data.get("t_min"),
            "t_max": data.get("t_max"),
            "stability": data.get("stability_threshold"),
            "confidence": data.get("confidence_threshold"),
        }
        try:
            sampling = Sampling(**{k: v for k, v in given.items() if v is not None})
        except RequestError as error:
            raise ConfigError(f"generation_config.json: {error.message}", hint=error.hint) from error
        eos = data.get("eos_token_id")
        stop_ids = config.eos_ids if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        for token in stop_ids:
            check(is_count(token, 0), "eos_token_id", token, "a token id or a list of them")
        return cls(sampling=sampling, stop_ids=stop_ids, source=data)

    def to_dict(self) -> dict[str, Any]:
        """The file's content, in the reference's field names."""
        s = self.sampling
        return dict(self.source) | {
            "max_denoising_steps": s.steps,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": s.entropy_bound},
            "t_min": s.t_min,
            "t_max": s.t_max,
            "stability_threshold": s.stability,
            "confidence_threshold": s.confidence,
            "eos_token_id": list(self.stop_ids),
        }
