"""Every number that a caller hands in is honoured, or refused by its field's name before any forward."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockpress.checkpoints.build import choose_device
from blockpress.config import PRESETS, AutoregressiveSampling, GenerationConfig, Sampling
from blockpress.config.sampling import MOST
from blockpress.decoding import SequenceState
from blockpress.decoding.sequence import MOST_LOGPROBS
from blockpress.engine import EngineOptions
from blockpress.errors import BlockpressError, RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from tests.conftest import num_examples
from tests.engine.special import damped

CONFIG = replace(PRESETS["tiny"](), context_length=64)
SHORT = Sampling(steps=2, confidence=0.0)
NUMBERS = [
    0,
    1,
    2,
    -1,
    7,
    127,
    128,
    129,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    10**5000,
]
FLOATS = [
    0.0,
    -0.0,
    0.5,
    1.0,
    3.0,
    1e-50,
    1e-40,
    1e-30,
    1e-6,
    1e30,
    1e38,
    1e39,
    1e300,
    -1.5,
    math.inf,
    -math.inf,
    math.nan,
]
OTHERS = [
    True,
    False,
    None,
    "1",
    "",
    b"1",
    [],
    [1],
    (1,),
    {},
    1j,
    Decimal("0.5"),
    object(),
    np.bool_(True),
    torch.tensor(1),
]
NUMPY = [
    np.int8(1),
    np.int64(3),
    np.uint64(2**64 - 1),
    np.float32(0.5),
    np.float64(0.25),
    np.float16(1e-7),
    np.float32("nan"),
]
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *FLOATS, *OTHERS, *NUMPY, Fraction(1, 3), np.arange(3), np.array(2.0)]),
    st.integers(),
    st.floats(),
)


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    generation = GenerationConfig(sampling=SHORT, stop_ids=(1,))
    options = EngineOptions(memory=1 << 22)
    with LM(path=Path("x"), network=damped(CONFIG), generation=generation, tokenizer=None, options=options) as lm:
        yield lm


def forwards(lm: LM) -> int:
    return 0 if lm.engine.stats is None else lm.engine.stats.forwards


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives, or the error of ours that it raises; any other fails the test."""
    try:
        return call()
    except BlockpressError as error:
        return error


def named(error: BlockpressError, name: str) -> bool:
    assert isinstance(error, RequestError)
    return name in error.message and bool(error.hint)


def test_fields_of_a_sampling_are_honoured_or_named(lm: LM):
    """What is taken is a finite number of Python's own, and engine and reference loop answer by it."""
    fields = {
        Sampling: ("steps", "entropy_bound", "t_min", "t_max", "stability", "confidence", "max_verifications"),
        AutoregressiveSampling: ("temperature", "top_k", "top_p"),
    }
    counts = {"steps", "stability", "max_verifications", "top_k"}
    reference = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=None, answer=run_reference)
    seen = set()

    @settings(max_examples=num_examples(80))
    @given(st.sampled_from([(kind, name) for kind, names in fields.items() for name in names]), VALUES)
    @example((Sampling, "t_max"), 1e30)
    @example((Sampling, "t_min"), 1e-30)
    @example((Sampling, "entropy_bound"), 1e300)
    @example((Sampling, "confidence"), 1e-300)
    @example((Sampling, "stability"), 2**31 - 1)
    @example((AutoregressiveSampling, "temperature"), 1e-30)
    @example((AutoregressiveSampling, "temperature"), 1e30)
    @example((AutoregressiveSampling, "top_p"), 1e-300)
    def check(field: tuple[Any, str], value: Any) -> None:
        kind, name = field
        others = {"t_max": 1e30} if name == "t_min" else {"t_min": 1e-30} if name == "t_max" else {}
        others |= {"temperature": 0.7} if name in ("top_k", "top_p") else {}
        sampling = attempt(lambda: kind(**{**others, name: value}))
        if isinstance(sampling, BlockpressError):
            assert named(sampling, f"sampling field {name}"), sampling
            return
        given = getattr(sampling, name)
        assert given is None or type(given) is (int if name in counts else float)
        assert given is None or (
            given == float(value) and math.isfinite(given) and (name not in counts or given <= MOST)
        )
        if isinstance(sampling, Sampling):
            sampling = sampling.with_(
                steps=min(sampling.steps, 2), max_verifications=min(sampling.max_verifications, 2)
            )
        key = (name, given)
        if key not in seen and len(seen) < 25:
            how: dict[str, Any] = {"max_tokens": 3, "sampling": sampling}
            how["mode"] = "diffusion" if kind is Sampling else "autoregressive"
            for model in (lm, reference):
                assert 1 <= len(model.generate([5, 6, 7], **how).tokens) <= 3
            seen.add(key)

    check()


@settings(max_examples=num_examples(50))
@given(name=st.sampled_from(["max_tokens", "seed", "logprobs"]), value=VALUES)
@example(name="seed", value=-(2**63))
@example(name="seed", value=10**400)
@example(name="seed", value=np.uint64(2**64 - 1))
@example(name="max_tokens", value=2**63)
@example(name="max_tokens", value=np.int8(1))
@example(name="logprobs", value=np.int64(3))
def test_arguments_of_generate_are_honoured_or_named(lm: LM, name: str, value: Any):
    before, how = forwards(lm), {"max_tokens": 2, "sampling": SHORT.with_(steps=1)}
    replies = attempt(lambda: lm.generate([5, 6, 7], **{**how, name: value}))
    if isinstance(replies, BlockpressError):
        assert named(replies, name), replies
        assert forwards(lm) == before
        return
    for reply in replies if isinstance(replies, list) else [replies]:
        assert len(reply.tokens) >= 1
        assert name != "max_tokens" or value is None or len(reply.tokens) <= value
        assert name != "logprobs" or value is None or all(len(token.top) == value for token in reply.logprobs or ())


@settings(max_examples=num_examples(60))
@given(name=st.sampled_from(["seed", "canvas_length", "room", "max_tokens", "logprobs"]), value=VALUES)
def test_fields_of_a_row_are_honoured_or_named(name: str, value: Any):
    fields: dict[str, Any] = {"seed": 0, "canvas_length": 4, "room": 9, "max_tokens": None, "logprobs": None}
    row = attempt(lambda: SequenceState(0, [5], stop_ids=(1,), **{**fields, name: value}))
    if isinstance(row, BlockpressError):
        assert named(row, name)
        return
    assert value is None or (int(value) == value and not isinstance(value, bool))


@settings(max_examples=num_examples(60))
@given(name=st.sampled_from(["max_running", "max_waiting", "memory", "chunk", "prefill_tokens"]), value=VALUES)
def test_options_of_an_engine_are_taken_or_named(name: str, value: Any):
    options = attempt(lambda: EngineOptions(**{name: value}))
    if isinstance(options, BlockpressError):
        assert named(options, f"engine option {name}")
        return
    assert value is None or type(getattr(options, name)) is int


def test_more_requests_than_the_memory_holds_canvases_for_are_refused_by_name(lm: LM):
    small = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=None)
    small.engine.options = EngineOptions(max_running=2**16, memory=1 << 22)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockpress.engine.core.free_memory", lambda: {"cpu": 1 << 24})
        with pytest.raises(RequestError, match="engine option max_running is 65536"):
            small.generate([5, 6, 7], max_tokens=1)


def test_pages_that_cannot_be_allocated_are_refused_by_name(lm: LM, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    small = LM(path=lm.path, network=lm.network, generation=lm.generation, tokenizer=None)
    monkeypatch.setattr("blockpress.engine.core.KVCache", full)
    with pytest.raises(RequestError, match="engine option memory is None"):
        small.generate([5, 6, 7], max_tokens=1)


def test_numpy_integers_and_arrays_are_seeds_and_counts(lm: LM):
    how = {"max_tokens": 9}
    assert lm.generate([5, 6, 7], seed=np.int64(3), **how) == lm.generate([5, 6, 7], seed=3, **how)
    several = lm.generate([5, 6, 7], seed=[1, 2, 3], **how)
    assert several == lm.generate(np.array([5, 6, 7]), seed=np.array([1, 2, 3], dtype=np.uint8), **how)
    assert lm.generate([5, 6, 7], max_tokens=np.int32(4)) == lm.generate([5, 6, 7], max_tokens=4)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 12345678901234567890])
def test_seeds_are_the_same_modulo_2_to_the_64(lm: LM, seed: int, mode: Any):
    hot = AutoregressiveSampling(temperature=2.0) if mode == "autoregressive" else None
    replies = [
        lm.generate([5, 6, 7], seed=seed + k * 2**64, max_tokens=12, mode=mode, sampling=hot) for k in (0, 1, -3)
    ]
    assert replies[0] == replies[1] == replies[2]


def test_the_reported_alternatives_have_a_limit_that_is_named(lm: LM):
    most = min(CONFIG.vocab_size, MOST_LOGPROBS)
    [token] = lm.generate([5, 6, 7], max_tokens=1, logprobs=most).logprobs or []
    assert len(token.top) == most
    with pytest.raises(RequestError, match=f"logprobs is {most + 1}") as caught:
        lm.generate([5, 6, 7], logprobs=most + 1)
    assert f"from 0 to {most}" in caught.value.hint


@pytest.mark.parametrize("value", [0, True, "yes", [1], threading.Event, torch.tensor(1)])
def test_what_is_no_flag_cancels_nothing_and_is_refused_by_name(lm: LM, value: Any):
    with pytest.raises(RequestError, match=r"cancel is"):
        lm.stream([4], sampling=SHORT, cancel=value)


@pytest.mark.parametrize(
    "value",
    [None, -0.0, 1e39, True, 2**64, 10**5000, [2], torch.tensor(2), int],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_device_is_refused_by_name(value: Any):
    with pytest.raises(RequestError, match=r"^device "):
        choose_device(value)
