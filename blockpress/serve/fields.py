"""The fields of requests that several APIs share, and what they mean for a canvas.

| field | meaning |
|---|---|
| temperature | scales the checkpoint's schedule: 1 leaves it as it is; 0 keeps it, and takes the likeliest tokens |
| seed | of all random draws: the same seed gives the same answer, in any batch |
| n | answers to one prompt, which is read once; their seeds follow each other |
| max_tokens | at most that many are returned, exactly |
| logit_bias, allowed_token_ids, penalties, top_p, top_k, min_p | edits of the logits (`blockpress.config.LogitEdits`) |
| mode | "diffusion", "verified" or "autoregressive" |
| diffusion | the sampler's own settings, see `DiffusionFields` |

Invariant: a field is honoured, known to have no meaning here, or refused by name (with `lenient`: listed in warnings).
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.config.edits import LEAST_REPETITION, MOST_REPETITION
from blockpress.errors import TextError
from blockpress.lm.arguments import AnySampling, Mode, check_mode, check_sampling
from blockpress.serve.errors import _ClientGone, _FieldError
from blockpress.serve.service import Service
from blockpress.text import Tokenizer

RELEASE = 2
"""For how many steps the first tokens of a canvas must have stayed to be sent before the canvas ends: one step would
send text earlier, three later; none changes how many answers are right (docs/log.md)."""
LARGE = 1 << 18
"""Bytes of a body from which it is read on a thread: streams would wait for it."""
MOST_SEED = 2**63 - 1
MOST_COUNT = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MOST_COUNT)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=MOST_COUNT)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=LEAST_REPETITION, le=MOST_REPETITION)]
Window = Annotated[int, Field(ge=-1, le=MOST_COUNT)]


class Fields(BaseModel):
    """The base of all bodies: numbers must be numbers; fields that nobody knows are kept in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class BodyRoute(APIRoute):
    """A route whose endpoint takes `body` and `http` and makes its own response.

    FastAPI documents it, and its field checks the body; the dependencies, forms and checked responses that FastAPI
    also looks for, which such a route has not, cost more than the check. Other endpoints are FastAPI's own.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, field = self.endpoint, self.body_field
        if (
            field is None
            or self.response_model is not None
            or {*inspect.signature(endpoint).parameters} != {"body", "http"}
        ):
            return super().get_route_handler()

        def checked(raw: bytes, media_type: str) -> Any:
            if not raw:
                raise _FieldError("body", "the body is empty", "send JSON")
            value: Any = raw
            if media_type.startswith("application/") and media_type.endswith(("/json", "+json")):
                try:
                    value = json.loads(raw)
                except ValueError as error:
                    raise _FieldError("body", f"the body is not JSON: {error}", "send JSON") from error
            body, errors = field.validate(value, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors)
            return body

        async def handled(http: Request) -> Response:
            try:
                raw = await http.body()
            except ClientDisconnect:
                raise _ClientGone from None
            kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
            if len(raw) < LARGE:
                body = checked(raw, kind)
            else:
                body = await anyio.to_thread.run_sync(checked, raw, kind)
            response: Response = await endpoint(body=body, http=http)
            return response

        return handled


class DiffusionFields(BaseModel):
    """How canvases are denoised, as `blockpress.Sampling` has it; null: as in the checkpoint.

    release: 0 sends text with its canvas only; the server's default is `RELEASE`. frames: whether a stream also has
    every step of the canvas.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    steps: Positive | None = None
    entropy_bound: float | None = None
    confidence: float | None = None
    stability: Count | None = None
    t_min: float | None = None
    t_max: float | None = None
    max_verifications: Count | None = None
    release: Count | None = None
    frames: bool = False


class SamplingFields(Fields):
    """What decides how an answer is drawn. repeat_penalty, repeat_last_n: llama.cpp's; the first is its name of
    repetition_penalty, the second says how far back penalties look."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    repeat_last_n: Window | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: list[Count] | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = None
    mode: Mode | None = None
    diffusion: DiffusionFields | None = None
    lenient: bool | None = None
    stream: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class Refusals:
    """Fields that are not honoured: an error, or with leniency a warning in the answer."""

    def __init__(self, lenient: bool) -> None:
        self.lenient, self.warnings = lenient, list[str]()

    @classmethod
    def of(cls, service: Service, lenient: bool | None) -> Refusals:
        """As a body asks; None: as the server's options do."""
        return cls(service.options.lenient if lenient is None else lenient)

    def refuse(self, name: str, value: object, why: str) -> None:
        """Raises RequestError: the field is not honoured, and the client is not lenient."""
        if not self.lenient:
            raise _FieldError(name, f"{name} is {value!r:.200}: {why}", "leave it out, or send lenient: true")
        self.warnings.append(f"{name} is ignored: {why}")


REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this model does not speak"),
    "cache_salt": ((), "cached prefixes are shared by all clients"),
    "chat_template": ((), "a template in a request is not run"),
    "continue_final_message": ((False,), "an answer begins a turn"),
    "documents": (([],), "the template has no place for them: put them into a message"),
    "function_call": (("none", "auto"), "it is the older form of tool_choice"),
    "functions": (([],), "it is the older form of tools"),
    "ignore_eos": ((False,), "an answer ends where the model ends it"),
    "include_stop_str_in_output": ((False,), "a stop text is not part of the answer"),
    "length_penalty": ((1, 1.0), "there are no beams"),
    "min_tokens": ((0,), "an answer ends where the model ends it"),
    "modalities": ((["text"],), "this model writes text"),
    "moderation": ((), "nothing is moderated"),
    "prompt_logprobs": ((0,), "log-probabilities are those of the answer"),
    "skip_special_tokens": ((True,), "control tokens are not part of a text"),
    "stop_token_ids": (([],), "the model's own stop tokens end an answer; stop takes texts"),
    "truncate_prompt_tokens": ((), "a prompt is read whole"),
    "use_beam_search": ((False,), "there are no beams"),
    "web_search_options": ((), "nothing is searched"),
}
"""Fields of OpenAI and vLLM that are not honoured: the values (beside null) that ask for nothing, and why not."""

XARGS = {"diffusion_max_steps": "steps", "max_denoising_steps": "steps"}
"""Names that vLLM (`vllm_xargs`) and mlx-vlm have for settings of the sampler."""


def check_extras(body: Fields, refusals: Refusals) -> None:
    """Refuse the known fields that are not honoured; unknown ones are passed over, as OpenAI does.

    Raises:
        _FieldError: one is given, and the client is not lenient.
    """
    for name, value in (body.model_extra or {}).items():
        if name.startswith("guided_") and value is not None:
            refusals.refuse(name, value, "it was removed from vLLM: structured_outputs and response_format are read")
        elif name in REFUSED and value is not None and value not in REFUSED[name][0]:
            refusals.refuse(name, value, REFUSED[name][1])


def diffusion_of(body: SamplingFields, refusals: Refusals) -> dict[str, Any]:
    """The settings of the sampler that a body gives, by whichever name. Raises _FieldError: one that is not known."""
    given = {} if body.diffusion is None else body.diffusion.model_dump(exclude_none=True, exclude={"frames"})
    extra = body.model_extra or {}
    others = {**(extra.get("vllm_xargs") or {}), **{name: extra[name] for name in XARGS if name in extra}}
    for name, value in others.items():
        if name not in XARGS:
            refusals.refuse(f"vllm_xargs.{name}", value, f"known are {', '.join(XARGS)}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _FieldError(name, f"{name} is {value!r:.80}", "give a whole number of at least 1")
        else:
            given.setdefault(XARGS[name], value)
    return given


def seeds(body: SamplingFields) -> list[int]:
    """A seed for each choice; random ones without a seed."""
    count = body.n or 1
    first = random.getrandbits(62) if body.seed is None else body.seed
    return [(first + number) % 2**63 for number in range(count)]


def read_sampling(service: Service, body: SamplingFields, refusals: Refusals) -> tuple[AnySampling, Mode]:
    """The sampling and the mode of a request.

    Raises:
        RequestError: a value out of range, or a field that the mode cannot honour.
    """
    generation, config = service.lm.generation, service.lm.config
    check_extras(body, refusals)
    asked = diffusion_of(body, refusals)
    mode = check_mode(body.mode, config)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    edits = _edits(service, body, refusals)
    if mode == "autoregressive":
        return _tokens(generation.autoregressive, body, asked, refusals).with_(stop=tuple(stop), **edits), mode
    sampling = _canvas(generation.sampling, body, asked).with_(stop=tuple(stop), **edits)
    return check_sampling(sampling, mode, generation, config, has_text=service.lm.tokenizer is not None), mode


def _edits(service: Service, body: SamplingFields, refusals: Refusals) -> dict[str, Any]:
    """The edits of the logits that a body asks for, as fields of a sampling.

    Raises:
        _FieldError: a token id that the vocabulary has not, or a banned word of several tokens.
    """
    vocab = service.lm.config.vocab_size
    given: dict[str, Any] = {
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repeat_penalty if body.repetition_penalty is None else body.repetition_penalty,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "allowed_token_ids": body.allowed_token_ids or None,
    }
    edits: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if body.repeat_last_n is not None:
        edits["repeat_last_n"] = body.repeat_last_n if body.repeat_last_n >= 0 else None
    if body.top_k is not None:
        edits["top_k"] = body.top_k if body.top_k > 0 else None
    if body.logit_bias:
        edits["logit_bias"] = {_token_id(key): value for key, value in body.logit_bias.items()}
    if body.bad_words:
        edits["suppress_tokens"] = _single_tokens(service.lm.tokenizer, body.bad_words, refusals)
    for name in ("logit_bias", "allowed_token_ids"):
        token = max(edits.get(name, ()), default=0)
        if token >= vocab:
            raise _FieldError(name, f"{name} has token id {token}", f"ids go from 0 to {vocab - 1}")
    return edits


def _single_tokens(tokenizer: Tokenizer | None, words: Sequence[str], refusals: Refusals) -> list[int]:
    """The tokens of words that are to be banned, alone and after a space, as vLLM reads them."""

    def spelled(text: str) -> list[int]:
        try:
            return [] if tokenizer is None else tokenizer.encode(text, add_special=False)
        except TextError:
            return []  # the vocabulary cannot write it

    banned = set[int]()
    for number, word in enumerate(words):
        alone, after_space = spelled(word.lstrip()), spelled(f" {word.lstrip()}")
        if len(alone) > 1 or not (alone or tokenizer):
            why = "it is not one token, and a canvas can only do without single ones"
            refusals.refuse(f"bad_words[{number}]", word, why)
        else:
            banned |= {*alone, *(after_space if len(after_space) == 1 else ())}
    return sorted(banned)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 10:
        raise _FieldError("logit_bias", f"logit_bias has the key {key!r:.80}", "give token ids, such as 5")
    return int(key)


def has_frames(body: SamplingFields) -> bool:
    """Whether every step of the canvas is asked for."""
    return body.diffusion is not None and body.diffusion.frames


def _canvas(sampling: Sampling, body: SamplingFields, asked: Mapping[str, Any]) -> Sampling:
    changes = {"release": RELEASE, **asked}
    if body.temperature == 0:
        changes["greedy"] = True
    elif body.temperature is not None and not changes.keys() & {"t_min", "t_max"}:
        changes |= {name: getattr(sampling, name) * body.temperature for name in ("t_min", "t_max")}
    return sampling.with_(**changes)


def _tokens(
    sampling: AutoregressiveSampling, body: SamplingFields, asked: Mapping[str, Any], refusals: Refusals
) -> AutoregressiveSampling:
    if asked:
        refusals.refuse("diffusion", dict(asked), "the mode is autoregressive")
    return sampling if body.temperature is None else sampling.with_(temperature=body.temperature)
