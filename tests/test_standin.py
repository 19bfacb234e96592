"""The stand-in for a GPU counts and refuses what a GPU would; on it the reference loop and training give their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Done, Event, Reply
from blockpress.decoding.autoregressive import generate_autoregressive
from blockpress.decoding.generate import generate
from blockpress.decoding.verified import generate_verified
from blockpress.model import Network
from blockpress.train import parallel
from blockpress.train.objective import Objective
from blockpress.train.trainer import Trainer

from .engine.driver import prompts, row
from .engine.special import CONFIG, SHORT, damped
from .standin import CUDA, Card, OnCard, plain_torch, standin
from .train.conftest import make_copy_recipe

WARM = AutoregressiveSampling(temperature=1.2, top_k=20, top_p=0.9)


def there() -> Tensor:
    return torch.arange(6, device="cuda").view(2, 3)


def sent(values: list[int]) -> Tensor:
    return torch.tensor(values).pin_memory().to("cuda", non_blocking=True)


COSTS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, int, int]]] = {
    "item": (lambda x: x[0, 1].item(), (1, 0, 0)),
    "list": (lambda x: x.tolist(), (1, 0, 0)),
    "truth": (lambda x: bool(x[0, 0]), (1, 0, 0)),
    "number": (lambda x: int(x.max()), (1, 0, 0)),
    "range up to a value": (lambda x: list(range(x[0, 1])), (1, 0, 0)),
    "slice up to a value": (lambda x: x[: x[0, 1]], (1, 0, 0)),
    "copy here": (lambda x: x.cpu(), (1, 0, 0)),
    "copy into": (lambda x: torch.zeros(2, 3, dtype=torch.long).copy_(x), (1, 0, 0)),
    "where": (lambda x: torch.where(x > 2), (1, 0, 0)),
    "where of three": (lambda x: torch.where(x > 2, x, 0), (0, 0, 0)),
    "nonzero": (lambda x: x.nonzero(), (1, 0, 0)),
    "mask": (lambda x: x[x > 2], (1, 0, 0)),
    "filled under a mask": (lambda x: x.__setitem__(x > 2, 0), (0, 0, 0)),
    "repeated": (lambda x: x[0].repeat_interleave(x[0]), (1, 0, 0)),
    "event": (lambda x: torch.cuda.Event().synchronize(), (1, 0, 0)),
    "made of values": (lambda x: torch.tensor([1, 2], device="cuda"), (0, 1, 0)),
    "pageable": (lambda x: torch.arange(3).to("cuda", non_blocking=True), (0, 1, 0)),
    "pinned, but waited for": (lambda x: torch.arange(3).pin_memory().to("cuda"), (0, 1, 0)),
    "pinned": (lambda x: sent([1, 2]), (0, 0, 1)),
    "index of the processor": (lambda x: x[torch.tensor([0])], (0, 1, 0)),
    "index of the device": (lambda x: x[x[0, :2]], (0, 0, 0)),
    "list as an index": (lambda x: x[[0]], (0, 1, 0)),
    "arithmetic": (lambda x: (x + torch.tensor(2)).sum().sqrt(), (0, 0, 0)),
}


@pytest.mark.parametrize("name", COSTS)
def test_waits_and_copies_are_counted(card: Card, name: str):
    call, figures = COSTS[name]
    x = there()
    card.take()
    result = call(x)
    tally = card.take()
    assert (*tally.figures, tally.sent) == figures, tally
    on_host = name in ("copy here", "copy into")
    assert all(isinstance(each, OnCard) != on_host for each in [result] if isinstance(each, Tensor))


MIXED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + torch.ones(3),
    "in place": lambda x: x.add_(torch.ones(2, 3, dtype=torch.long)),
    "joined": lambda x: torch.cat((x, torch.ones(1, 3, dtype=torch.long))),
    "product": lambda x: nn.functional.linear(torch.ones(3), x.float()),
    "index of the other side": lambda x: torch.arange(3)[x],
    "places": lambda x: x.index_copy_(0, torch.tensor([0]), x[:1]),
    "generator": lambda x: torch.rand(3, device="cuda", generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_mix(card: Card, name: str):
    with pytest.raises(RuntimeError, match="device"):
        MIXED[name](there())


def test_values_and_addresses_cannot_be_read_unseen(card: Card):
    x = there()
    assert x.device == CUDA and x.is_cuda and not x.is_cpu and x.dtype == torch.long
    assert isinstance(torch.empty_like(x), OnCard) and isinstance(x.max(-1).values, OnCard)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(AssertionError, match="address"):
        x.data_ptr()


def test_a_queued_copy_is_noise_until_waited_for(card: Card):
    first, second = (torch.empty(3, dtype=torch.long, pin_memory=True) for _ in range(2))
    first.copy_(sent([1, 2, 3]), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    second.copy_(sent([4, 5, 6]), non_blocking=True)
    assert 1 not in first.tolist()
    event.synchronize()
    assert first.tolist() == [1, 2, 3] and 4 not in second.tolist()
    torch.cuda.synchronize()
    assert second.tolist() == [4, 5, 6]


def test_the_stand_in_leaves_torch_unchanged():
    names = ("Event", "device_count", "is_available", "mem_get_info", "synchronize")
    before = [getattr(torch.cuda, name) for name in names]
    with standin():
        assert isinstance(there(), OnCard) and torch.cuda.device_count() == 1
    assert [getattr(torch.cuda, name) for name in names] == before
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert type(torch.ones(2) + 1) is Tensor and not torch.ones(2).is_cuda


def test_a_module_trains_there_as_on_the_processor(card: Card):
    here = nn.Linear(3, 2)
    away = nn.Linear(3, 2)
    away.load_state_dict(here.state_dict())
    away.to("cuda")
    assert all(isinstance(each, OnCard) and isinstance(each, nn.Parameter) for each in away.parameters())
    x = torch.randn(4, 3)
    for module, given in ((here, x), (away, x.to("cuda"))):
        module(given).square().sum().backward()
        torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.parameters(), away.parameters(), strict=True))
    back = away.to("cpu")
    assert all(type(each) is nn.Parameter for each in back.parameters())


Write = Callable[..., Iterator[Event]]
WAYS: dict[str, tuple[Write, Sampling | AutoregressiveSampling, int | None]] = {
    "diffusion": (generate, SHORT, None),
    "verified": (generate_verified, SHORT.with_(max_verifications=2), None),
    "log-probabilities": (generate_verified, SHORT, 2),
    "greedy": (generate_autoregressive, AutoregressiveSampling(), None),
    "sampled": (generate_autoregressive, WARM, 2),
}


def answers(network: Network, way: str, pictures: bool = False) -> list[Reply]:
    write, sampling, logprobs = WAYS[way]
    given = prompts(CONFIG, 3, 30, seed=11)
    rows = [row(CONFIG, i, prompt, sampling, logprobs=logprobs, max_tokens=20) for i, prompt in enumerate(given)]
    for one in rows[:1] if pictures else []:
        one.images = {0: torch.ones(len(one.prompt), CONFIG.hidden_size, device=network.device)}
    done = [event for event in write(network, rows, sampling) if isinstance(event, Done)]
    return [event.reply for event in sorted(done, key=lambda event: event.row)]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "pictures"), [*((way, False) for way in WAYS), ("diffusion", True), ("greedy", True)])
def test_the_reference_loop_gives_the_same_tokens_there(way: str, pictures: bool, card: Card):
    with plain_torch():
        wanted = answers(damped(), way, pictures)
    network = damped().to("cuda")
    card.take()
    for got, expected in zip(answers(network, way, pictures), wanted, strict=True):
        assert replace(got, logprobs=None) == replace(expected, logprobs=None)
        values = [[each.logprob for each in told.logprobs or ()] for told in (got, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-4), "few rows have other kernels on a processor"


def test_an_autoregressive_token_of_the_reference_loop_has_two_waits(card: Card):
    """Once for the token, once for the places in the cache, however many layers there are."""
    network = damped().to("cuda")
    answers(network, "greedy")
    card.take()
    tokens = len(answers(network, "greedy")[0].tokens)
    assert card.take().figures == (2 * tokens, 0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Objective(draws=2), Objective(draws=3, on_policy=1, stratified=True)])
def test_training_steps_are_the_same_there(objective: Objective, tmp_path: Path, card: Card):
    """Float32, uncompiled. torch clips and moves the tensors of a list by other kernels here: sums are in other order."""
    recipe = make_copy_recipe(objective=objective)
    trainers = [Trainer(recipe, tmp_path, device=device, dtype=torch.float32) for device in ("cpu", "cuda")]
    sums = [[trainer.train_step() for _ in range(2)] for trainer in trainers]
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)
    here, away = (trainer.network.state_dict() for trainer in trainers)
    for name, value in here.items():
        assert isinstance(away[name], OnCard)
        torch.testing.assert_close(away[name].cpu(), value, rtol=1e-4, atol=1e-5)


def test_losses_of_two_processes_are_summed_there(tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch):
    """What is exchanged is one tensor of one device; here the other process adds nothing."""
    exchanged: list[Tensor] = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", exchanged.append)
    Trainer(make_copy_recipe(), tmp_path, device="cuda", dtype=torch.float32).train_step()
    assert [isinstance(each, OnCard) for each in exchanged] == [True]
