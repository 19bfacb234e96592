"""What surrounds a call in torch does not change its answer, and the call leaves torch as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import blockpress
from blockpress.config import PRESETS, AutoregressiveSampling, GenerationConfig, Sampling
from blockpress.decoding import Denoised, Done
from blockpress.engine import EngineOptions
from blockpress.errors import RequestError
from blockpress.lm import LM
from blockpress.lm.execute import run_reference
from blockpress.model import Network
from blockpress.ops.computing import computing
from tests.engine.special import damped

CONFIG = replace(PRESETS["tiny"](), canvas_length=6, context_length=32)
HOT = AutoregressiveSampling(temperature=0.8, top_k=9, top_p=0.9)
CALLS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"mode": "verified"},
    {"mode": "autoregressive", "sampling": HOT, "logprobs": 2},
]


@contextmanager
def setting(set_: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


class Onlooker(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "with torch.device": lambda: torch.device("meta"),
    "two threads": lambda: setting(torch.set_num_threads, 2, torch.get_num_threads()),
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "matmul precision high": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul precision medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "flushed denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "a function mode": Onlooker,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}

SLOW = {"deterministic algorithms", "default device meta", "with torch.device", "a function mode"}
"""torch calls Python for every operation, or fills all memory that it takes."""


def answers(network: Network) -> tuple[list[Any], Tensor]:
    """Of all modes and both ways to run them: tokens and accepted positions of every step, with the reply; and all
    numbers behind them, from entropies to the logits of both passes."""
    generation = GenerationConfig(sampling=Sampling(steps=2, confidence=0.0), stop_ids=(1,))
    given = {"path": Path("x"), "network": network, "generation": generation, "tokenizer": None}
    found, numbers = list[Any](), list[float]()
    for answer in (None, run_reference):
        with LM(**given, options=EngineOptions(memory=1 << 22), answer=answer) as lm:  # type: ignore[arg-type]
            for how in CALLS:
                for event in lm.stream([5, 6, 7, 8], max_tokens=8, seed=3, **how):
                    if isinstance(event, Denoised):
                        found.append((event.argmax.tolist(), event.accepted.tolist()))
                        numbers += event.entropy.tolist()
                    elif isinstance(event, Done):
                        found.append(replace(event.reply, logprobs=None))
                        for token in event.reply.logprobs or ():
                            numbers += [token.logprob, *(logprob for _, logprob in token.top)]
    for logits in (lm.next_token_logits([5, 6, 7]), lm.denoise_logits([5, 6, 7], [4] * CONFIG.canvas_length)):
        numbers += logits.flatten().tolist()
    return found, torch.tensor(numbers, dtype=torch.float64, device="cpu")


def same(found: tuple[list[Any], Tensor], plain: tuple[list[Any], Tensor]) -> bool:
    """The last bit of a product depends on where in memory its operands lie, in the same surroundings too."""
    return found[0] == plain[0] and torch.allclose(found[1], plain[1], rtol=0, atol=1e-5)


def state() -> list[Any]:
    """What of torch, and of the random generators, a caller could see changed."""
    return [
        [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.full((1,), 1e-40, dtype=torch.float32, device="cpu").mul(1).item(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
    ]


@pytest.fixture(scope="module")
def network() -> Network:
    return damped(CONFIG)


@pytest.fixture(scope="module")
def plain(network: Network) -> tuple[list[Any], Tensor]:
    return answers(network)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in SURROUNDINGS]
)
def test_surroundings_neither_change_an_answer_nor_are_changed(
    network: Network, plain: tuple[list[Any], Tensor], name: str
):
    """Tokens and accepted positions are equal; the numbers behind them differ by less than 1e-5 nats."""
    with SURROUNDINGS[name]():
        before = state()
        found = answers(network)
        assert state() == before
    assert same(found, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["inference_mode", "default dtype bfloat16", "default device meta", "autocast to bfloat16"]
)
def test_a_model_is_loaded_as_it_is_whatever_surrounds_it(name: str):
    """Its weights too, and the first answer with it."""
    expected = blockpress.load("sudoku-nano", memory=1 << 24)
    with SURROUNDINGS[name]():
        before = state()
        lm = blockpress.load("sudoku-nano", memory=1 << 24)
        reply = lm.generate([5] * 9, max_tokens=9, sampling=Sampling(steps=2))
        assert state() == before
    assert reply == expected.generate([5] * 9, max_tokens=9, sampling=Sampling(steps=2))
    theirs = expected.network.state_dict()
    assert all(
        torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype
        for key, value in lm.network.state_dict().items()
    )


def test_products_of_one_backend_at_a_lower_precision_do_not_change_an_answer(
    network: Network, plain: tuple[list[Any], Tensor]
):
    """Set for oneDNN alone, which torch's own getter then refuses to name."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    with setting(lambda value: setattr(products, "fp32_precision", value), "bf16", before):
        assert same(answers(network), plain)
        assert products.fp32_precision == "bf16"


def test_threads_that_compute_at_once_leave_the_precision_as_it_was():
    """The first one sets it, the last one resets it."""
    with setting(torch.set_float32_matmul_precision, "medium", "highest"):
        with computing(), nullcontext():
            inside = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
            with computing():
                pass
            assert torch.backends.mkldnn.matmul.fp32_precision == inside == "ieee"  # type: ignore[attr-defined]
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_a_transform_of_functorch_around_a_call_is_refused_by_name(network: Network, transform: Any):
    generation = GenerationConfig(sampling=Sampling(steps=1), stop_ids=(1,))
    with LM(path=Path("x"), network=network, generation=generation, tokenizer=None) as lm:
        calls: list[Callable[[], Any]] = [
            lambda: lm.generate([5, 6, 7], max_tokens=2),
            lambda: lm.next_token_logits([5, 6]),
            lambda: blockpress.load("sudoku-nano"),
        ]
        for call in calls:

            def inside(x: Tensor, call: Callable[[], Any] = call) -> Tensor:
                call()
                return x.sum()

            with pytest.raises(RequestError, match=r"vmap, grad or another transform"):
                transform(inside)(torch.zeros(2))
        assert lm.generate([5, 6, 7], max_tokens=2).tokens
