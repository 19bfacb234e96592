"""One forward: whose state it touches, whose numbers it lets through, and that it waits for the device once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blockpress
from blockpress import sudoku
from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Failed
from blockpress.decoding.output import TextOutputProcessor
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.batch import Batch, Part
from blockpress.engine.canvas_state import MIN_IDS, CanvasState, StepFeatures
from blockpress.engine.cuda_graphs import CudaGraphs
from blockpress.engine.denoising import FIELDS, CanvasBatch, begin_step, finish_step, packed_entry, padding_entry
from blockpress.model import Network

from .driver import drive, prompts, reference_reply, reply, row, submitted
from .special import BANNED, CONFIG, PINNED, SHORT, InTorch, alone, asked, damped, on_paper, poison

OPTIONS = EngineOptions(memory=1 << 23, max_running=5)
MAKERS: dict[str, Callable[[Network, EngineOptions], EngineCore]] = {"eager": EngineCore, "captured": on_paper}


@pytest.fixture(scope="module")
def network() -> Network:
    return damped()


def test_banned_and_pinned_tokens_match_the_reference_and_unwritten_pages_are_never_read(network: Network):
    given, how = prompts(CONFIG, 7, 50, seed=7, shared=20), [SHORT.with_(steps=2 + i % 3) for i in range(7)]
    requests = asked(given, how)
    told = drive(poison(EngineCore(network, OPTIONS)), requests, arrivals=[0, 0, 1, 2, 2, 4, 9])
    for i, request in enumerate(requests):
        answer = reply(told[request])
        assert answer == alone(network, i, given[i], how[i]), f"request {i}"
        for token, places in BANNED[i % len(BANNED)].items():
            pinned = {at for at, pin in PINNED[i % len(PINNED)].items() if pin == token}
            found = {at for at, one in enumerate(answer.tokens) if one == token and at % 12 in places}
            assert found <= pinned


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("what", ["signal", "pages"])
def test_a_nan_fails_only_its_request(network: Network, what: str, maker: str):
    """NaN in one request's signal or pages: it fails. The others' tokens are the reference loop's, and so are those of
    who comes into its slot and its pages."""
    given, how = prompts(CONFIG, 6, 30, seed=11), [SHORT] * 6
    core, requests = MAKERS[maker](network, OPTIONS), asked(given, how)
    copies = submitted(core, requests)
    told: dict[Request, list[Any]] = {request: [] for request in requests}
    for number in range(10_000):
        if number == 2:
            spoil(core, copies[1], what)
        for request, event in core.step().events:
            told[request].append(event)
        if not core.busy:
            break
    assert isinstance(told[requests[1]][-1], Failed)
    for i in (0, 2, 3, 4, 5):
        assert reply(told[requests[i]]) == alone(network, i, given[i], how[i]), f"request {i}"


def test_a_nan_in_a_logit_row_fails_only_its_request(network: Network):
    how, given = AutoregressiveSampling(), prompts(CONFIG, 3, 30, seed=14)
    core, requests = EngineCore(network, OPTIONS), [Request(row(CONFIG, i, given[i], how), how) for i in range(3)]
    copies = submitted(core, requests)
    told: dict[Request, list[Any]] = {request: [] for request in requests}
    while core.busy:
        for request, event in core.step().events:
            told[request].append(event)
        if copies[1].num_computed_tokens == len(given[1]):
            spoil(core, copies[1], "pages")
    assert isinstance(told[requests[1]][-1], Failed)
    for i in (0, 2):
        assert reply(told[requests[i]]) == reference_reply(network, CONFIG, given[i], i, how), f"request {i}"


@pytest.mark.parametrize("maker", MAKERS)
def test_a_canvas_settles_after_its_stability(maker: str):
    """The shipped model, whose canvases do settle; its answer, steps included, is the reference loop's. It is sure at
    any time, so that nothing but the argmax decides."""
    lm = blockpress.load("sudoku-nano")
    prompt, steps = lm.encode(sudoku.layout(sudoku.generate_puzzle(3, givens=36).puzzle)), []
    for stability in (1, 3):
        how = lm.generation.sampling.with_(stability=stability, confidence=10.0)
        request = Request(row(lm.config, 0, prompt, how, max_tokens=90), how)
        answer = reply(drive(MAKERS[maker](lm.network, EngineOptions(memory=1 << 26)), [request])[request])
        assert answer == reference_reply(lm.network, lm.config, prompt, 0, how, max_tokens=90)
        steps.append(answer.usage.steps)
    assert steps[1] == steps[0] + 2


def spoil(core: EngineCore, request: Request, what: str) -> None:
    assert request.slot is not None and request.num_computed_tokens
    if what == "signal":
        core.runner.slots.signal[request.slot] = torch.nan
        return
    for layer, kind in enumerate(core.kv_cache.kinds):
        for part in core.kv_cache.pages(layer):
            part[:, [page for page in request.tables[kind] if page >= 0]] = torch.nan


@pytest.mark.parametrize("maker", MAKERS)
def test_a_failed_forward_is_rerun_request_by_request(network: Network, maker: str, monkeypatch: pytest.MonkeyPatch):
    given, how = prompts(CONFIG, 3, 30, seed=12), [SHORT] * 3
    core, requests = MAKERS[maker](network, OPTIONS), asked(given, how)
    run, forwards = network.run, []

    def breaking(x: Tensor, *others: Any, **more: Any) -> Tensor:
        forwards.append(x.shape[1])
        if len(forwards) in (1, 6):
            raise RuntimeError("out of memory")
        return run(x, *others, **more)

    monkeypatch.setattr(network, "run", breaking)
    told = drive(core, requests)
    monkeypatch.undo()
    assert [reply(told[one]) for one in requests] == [alone(network, i, given[i], how[i]) for i in range(3)]
    assert len(forwards) > 8


def test_a_step_changes_only_its_slots(network: Network):
    """Entries of nobody, and slots of others, leave a canvas as it is alone."""
    requests = [Request(row(CONFIG, i, [5, 6], SHORT), SHORT) for i in range(2)]
    numbers = []
    for i, request in enumerate(requests):
        request.slot = 3 * i
        numbers.append(first(request))
    results = []
    for rows in ([0, 1], [None, 1, None, 0, None], [1]):
        slots = CanvasState(network, 5)
        before = [tensor.clone() for tensor in (slots.canvas, slots.signal, slots.argmax)]
        entries = torch.tensor([padding_entry(slots.padding_slot) if i is None else numbers[i] for i in rows])
        finished = stepped(network, slots, entries)
        touched = [requests[i].slot for i in rows if i is not None]
        for tensor, old in zip((slots.canvas, slots.signal, slots.argmax), before, strict=True):
            assert [at for at in range(5) if not torch.equal(tensor[at], old[at])] == sorted(
                x for x in touched if x is not None
            )
        at = rows.index(1)
        assert finished.packed_results[at].tolist() == [0, 0, 1, *finished.argmax[at].tolist()]
        results.append((slots.canvas[3], slots.argmax[3], finished.accepted[at], finished.changed[at]))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def first(request: Request) -> list[int]:
    """The numbers of a request's first step, without a context."""
    return packed_entry(Part(request=request, first=0, start=0, stop=CONFIG.canvas_length, canvas=True))


@torch.inference_mode()
def stepped(network: Network, slots: CanvasState, entries: Tensor) -> Any:
    """A step whose rows see nothing but themselves."""
    canvases = CanvasBatch.of(entries)
    begun = begin_step(network, slots, canvases, StepFeatures())
    hidden = torch.nn.functional.normalize(begun.x[0]) * 3
    return finish_step(network, slots, canvases, StepFeatures(), begun, hidden, "exact")


def test_canvas_fields_round_trip():
    how = Sampling(steps=7, t_min=0.3, t_max=1.1, entropy_bound=0.15, stability=2, confidence=0.007)
    one = row(CONFIG, 0, [5, 6, 7], how)
    one.seed = -(2**40) - 3
    request = Request(one, how)
    request.slot, request.step = 4, 6
    canvases = CanvasBatch.of(torch.tensor([[*first(request), 99], [*padding_entry(5), 99]]))
    assert len(first(request)) == len(padding_entry(5)) == FIELDS
    assert canvases.slot.tolist() == [4, 5] and canvases.rows.tolist() == [12, 0] and canvases.number.tolist() == [7, 1]
    assert int(canvases.high[0]) << 32 | int(canvases.low[0]) == one.seed % 2**64
    assert canvases.last.tolist() == [True, False] and canvases.stability.tolist() == [2, 0]
    wanted = torch.tensor([0.3 + 0.8 / 7, 0.15, 0.007])
    torch.testing.assert_close(torch.stack((canvases.temperature, canvases.bound, canvases.confidence))[:, 0], wanted)


def banning(index: int, banned: dict[int, set[int]]) -> Request:
    processor = TextOutputProcessor(None)
    processor.banned_ids = banned
    return Request(row(CONFIG, index, [5], SHORT, processor=processor), SHORT)


def test_banned_ids_keep_their_column_until_the_table_grows(network: Network):
    """A table of ids that nobody denies twice is filled anew in place, and grows only where it must."""
    slots, at, spaces = CanvasState(network, 3), [], (range(8), range(8, 16), range(16, 36))
    requests = [banning(i, {token: {token % 12} for token in ids}) for i, ids in enumerate(spaces)]
    for i, (request, ids) in enumerate(zip(requests, spaces, strict=True)):
        request.slot = i
        rules = slots.begin([request])
        at.append((slots.ids.data_ptr(), rules.banned))
        requests[i - 1].slot = None if i == 1 else requests[i - 1].slot  # the first ends when the second has begun
        columns = slots.ids.tolist()
        assert len(set(columns)) == len(columns) == rules.banned
        places = {token: slots.banned[i, :, columns.index(token)].nonzero().flatten().tolist() for token in ids}
        assert places == {token: [token % 12] for token in ids}
        assert int(slots.banned[i].sum()) == len(ids)
    assert [width for _, width in at] == [MIN_IDS, 16, 32]
    requests[2].slot, other = None, banning(3, {40: {1}})
    other.slot = 2
    assert slots.begin([other]).banned == 32 and slots.ids.data_ptr() == at[2][0]
    assert int(slots.banned[2].sum()) == 1
    free = Request(row(CONFIG, 4, [5], SHORT), SHORT)
    free.slot = 2
    assert slots.begin([free]) == StepFeatures(begins=True) and not slots.banned[2].any()


class Blank(InTorch):
    """Sees nothing, and writes nothing."""

    @staticmethod
    def attend(query: Tensor, *others: Any, **more: Any) -> Tensor:
        return torch.empty_like(query)

    @staticmethod
    def write(*given: Any) -> None:
        return None


@torch.inference_mode()
def test_a_forward_reads_no_value_from_the_device():
    """On the meta device tensors have no values: whoever waits for one, or for a shape made of some, raises."""
    core = EngineCore(damped().to("meta"), OPTIONS)
    runner = core.runner
    runner.attention = Blank()
    requests = asked(prompts(CONFIG, 4, 30, seed=13), [SHORT, SHORT, SHORT.with_(max_verifications=1), SHORT])
    copies = submitted(core, requests)
    works = core.scheduler.schedule()
    batch = Batch.of(works, CONFIG.canvas_length)
    assert batch.kv_only and batch.with_logits and len(batch.canvases) == 4
    rules = runner.slots.begin(copies)
    assert rules == StepFeatures(begins=True, pinned=True, banned=16)
    heard, done = runner._forward(batch, rules)
    assert done is not None and done.packed_results.shape == (4, 3 + CONFIG.canvas_length) and len(heard) == 1
    graphs = CudaGraphs(runner.network, runner.slots, core.kv_cache, "exact", Blank(), there_alone)  # type: ignore[arg-type]
    finished = graphs.step(batch.canvases, rules)
    assert graphs.failed is None and finished is not None and finished.packed_results.is_meta
    graphs.prepare(3)
    assert (graphs.captures, graphs.failed) == (4, None)
    with pytest.raises((NotImplementedError, RuntimeError)):
        finished.packed_results.tolist()
    with pytest.raises(AssertionError), There():
        torch.tensor([1, 2]).to("meta")


def there_alone(work: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Runs work once as it is, then again, and nothing may come from the processor any more."""
    work()
    with There():
        return work, work()


class There(TorchDispatchMode):
    """Every tensor that goes into an operation is on the device already."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            assert not isinstance(given, Tensor) or given.is_meta, f"{func} takes a tensor of the processor"
        return func(*args, **(kwargs or {}))


def test_a_forward_copies_back_once(network: Network, monkeypatch: pytest.MonkeyPatch):
    core, requests = (
        EngineCore(network, OPTIONS),
        asked(prompts(CONFIG, 3, 30, seed=13), [SHORT.with_(max_verifications=1), SHORT, SHORT]),
    )
    for request in requests:
        core.submit(request)
    fetched = []
    monkeypatch.setattr("blockpress.engine.runner.to_host", lambda tensor: fetched.append(tensor.shape) or tensor)
    forwards = 0
    while core.busy:
        core.step()
        forwards += 1
    assert len(fetched) == forwards
