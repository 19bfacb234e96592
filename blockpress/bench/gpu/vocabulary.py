"""The vocabulary's kernels: right against full logits, and fast over their floors.

Checks compute what `denoisers.plain_denoiser` does, from full logits: the product rounded to the weight's type, cap and
temperature in float32, argmax, `ops.vocabulary.sample`, entropy in float64, and the rounded soft embedding. A token may
be another one only where the deciding margin is below 1e-6 of the row's mass (sample) or 1e-5 (argmax): exponentials
on a GPU are not those of the host.

Invariant: what is measured is what `ops.kernels.vocabulary.see` calls, captured in a graph.
Run it:  make check-gpu; make bench-gpu PART=vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from blockpress.bench.gpu.check import KernelCheck, distance
from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.timing import DEVICE, captured
from blockpress.ops.vocabulary import SampleStats, SignalKind

MARGIN, NEAR = 1e-6, 1e-5
"""How near to an edge, as a share of the row's mass, a sample may fall to either side; and a maximum to its second."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """`spread`: standard deviation of the products. `banned`: how many ids some rows must not take."""

    rows: int = 5
    vocab: int = 300
    width: int = 64
    cap: float | None = 30.0
    spread: float = 4.0
    banned: int = 0
    ties: bool = False
    dtype: torch.dtype = torch.float32
    signal: SignalKind = "exact"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What `see` is called with, and the full scaled logits."""

    hidden: Tensor
    weight: Tensor
    temperature: Tensor
    uniform: Tensor
    banned: tuple[Tensor, Tensor] | None
    scale: Tensor
    scaled: Tensor


PUBLISHED = Case(rows=256, vocab=262144, width=2816, dtype=torch.bfloat16)
SIZES = (1, 2, 16, 127, 128, 129, 4095, 4096, 4097)
"""Vocabularies around the edges of a record's tile and of a sum's."""


def checks() -> list[KernelCheck]:
    """Sizes, caps, types, kinds of signal, banned ids, ties, sure rows, broken rows; then the published size."""
    cases = {f"vocab={vocab}": Case(vocab=vocab) for vocab in SIZES}
    cases |= {f"rows={rows}": Case(rows=rows, vocab=200) for rows in (0, 1, 17, 130)}
    bf16 = Case(dtype=torch.bfloat16)
    cases |= {
        "no cap": Case(cap=None, vocab=1000),
        "width=40": Case(width=40),
        "banned": Case(banned=7, vocab=400),
        "ties": Case(ties=True),
        "flat": Case(spread=0.0),
        "sure": Case(spread=20.0, vocab=1000),
        "bfloat16": replace(bf16, vocab=4500),
        "bfloat16 banned": replace(bf16, banned=7),
        "bfloat16 no cap": replace(bf16, cap=None),
        "no signal": replace(bf16, signal=None),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for spread in (1.0, 12.0):
            case = Case(rows=6, vocab=4500, signal="sparse", dtype=dtype, spread=spread, banned=3)
            cases[f"sparse {str(dtype)[6:]} spread={spread:.0f}"] = case
    found = [KernelCheck(name=name, limit=1, error=partial(_apart, case)) for name, case in cases.items()]
    found.append(KernelCheck(name="sure rows keep the digits of their entropy", limit=1e-4, error=_sure))
    found.append(KernelCheck(name="a broken row stays alone", limit=0, error=_broken))
    found.append(KernelCheck(name="rows in blocks", limit=0, error=_in_blocks))
    for kind in ("exact", "sparse"):
        case = replace(PUBLISHED, signal=kind)
        found.append(KernelCheck(name=f"published {kind}", limit=1, error=partial(_apart, case), large=True))
    return found


def _apart(case: Case, device: torch.device) -> float:
    """How much of what is allowed the worst of tokens, entropies and signal takes; a wrong token is twice too much.

    An entropy may be 2e-5 nat off. The signal is compared with the truth as the reference rounds it, where it is
    "exact"; "sparse" differs from the unrounded one by a rounding of each share and by the mass that it drops, but for
    rows that it does not cover, which are as the reference rounds them.
    """
    given = draw_case(case, device)
    seen = _see(case, given)
    assert len(seen.argmax) == case.rows
    if not case.rows:
        return 0.0
    worst = torch.tensor([2.0 * _wrong(case, given, seen), _entropy(given, seen) / 2e-5])
    if case.signal is None:
        return float(worst.max())
    wide = case.dtype == torch.float32
    limit = {"exact": 2e-5 if wide else 1e-3, "sparse": 2.0**-8 if wide else 8e-3}
    assert seen.signal is not None
    belief = torch.softmax(given.scaled.to(case.dtype), -1, dtype=torch.float32).to(case.dtype)
    rounded = ((belief @ given.weight) * given.scale).float()
    wanted = (torch.softmax(given.scaled, -1) @ given.weight.float()) * given.scale
    if case.signal == "sparse":
        off = [(seen.signal.float() - one).norm(dim=-1, keepdim=True) for one in (rounded, wanted)]
        wanted = torch.where(off[0] < off[1], rounded, wanted)
    else:
        wanted = rounded
    apart = torch.tensor(distance(seen.signal, wanted) / limit[case.signal])
    return float(torch.cat((worst, apart[None])).max())  # a NaN is the largest


def draw_case(case: Case, device: torch.device) -> Given:
    """Random inputs, fresh ones on a GPU and the same ones for everybody on a CPU, and the logits of the truth."""
    if device.type == "cpu":
        torch.manual_seed(case.rows + case.vocab)
    n, vocab, width = case.rows, case.vocab, case.width
    hidden = torch.randn(n, width, device=device).to(case.dtype)
    weight = (torch.randn(vocab, width, device=device) * (case.spread / width**0.5)).to(case.dtype)
    if case.ties:
        # Eighths: their products are exact, so equal rows tie, however a product's columns are grouped and summed.
        hidden, weight = ((x * 8).round() / 8 for x in (hidden, weight))
        weight[1:] = weight[:-1][torch.arange(vocab - 1, device=device) // 150 * 150]
    temperature = torch.rand(n, device=device) * 0.4 + 0.4
    product = (hidden @ weight.T).float()
    scaled = (product if case.cap is None else torch.tanh(product / case.cap) * case.cap) / temperature[:, None]
    banned = None
    if case.banned:
        ids = torch.randperm(vocab, device=device)[: case.banned]
        ids[0] = scaled[0].argmax() if scaled[0].argmax() not in ids else ids[0]
        no = torch.rand(n, case.banned, device=device) < 0.5
        no[0] = True
        banned = (ids, no)
        scaled[:, ids] = scaled[:, ids].masked_fill(no, float("-inf"))
    return Given(
        hidden=hidden,
        weight=weight,
        temperature=temperature,
        uniform=torch.rand(n, device=device, dtype=torch.float64),
        banned=banned,
        scale=torch.tensor(width**0.5, device=device, dtype=case.dtype),
        scaled=scaled,
    )


def _see(case: Case, given: Given) -> SampleStats:
    from blockpress.ops.kernels.vocabulary import sample_from_hidden

    return sample_from_hidden(
        given.hidden,
        given.weight,
        cap=case.cap,
        temperature=given.temperature,
        uniform=given.uniform,
        banned=given.banned,
        signal=case.signal,
        scale=given.scale,
    )


def _wrong(case: Case, given: Given, seen: SampleStats) -> int:
    """How many tokens are wrong: not the largest, or not the one that the uniform falls on."""
    wrong, level = 0, case.ties or case.spread == 0
    for row in range(case.rows):
        shares = torch.softmax(given.scaled[row].double(), -1)
        best, got, drawn = given.scaled[row].argmax(), seen.argmax[row], seen.sample[row]
        near = not level and bool(given.scaled[row, best] - given.scaled[row, got] < NEAR)
        wrong += int(got != best and not near)
        through = shares.cumsum(-1)
        before, until = through[drawn] - shares[drawn], through[drawn]
        wrong += int(not (before - MARGIN <= given.uniform[row] <= until + MARGIN) or shares[drawn] == 0)
    return wrong


def _entropy(given: Given, seen: SampleStats) -> float:
    """The largest difference to float64, in nats."""
    log_p = torch.log_softmax(given.scaled.double(), -1)
    wanted = -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)
    return float((seen.entropy.double() - wanted).abs().max())


def _sure(device: torch.device) -> float:
    """The largest relative error of entropies from 1e-2 down to 1e-9 nat: one token towers over 999 equal ones."""
    from blockpress.ops.kernels.vocabulary import sample_from_hidden

    ahead = torch.tensor([10.0, 15.0, 20.0, 25.0, 30.0], device=device)
    weight = torch.zeros(1000, 16, device=device)
    weight[123, 0] = 1
    hidden = torch.zeros(5, 16, device=device)
    hidden[:, 0] = ahead
    uniform = torch.full((5,), 0.5, device=device, dtype=torch.float64)
    ones, scale = torch.ones(5, device=device), torch.ones((), device=device)
    got = sample_from_hidden(
        hidden, weight, cap=None, temperature=ones, uniform=uniform, signal=None, scale=scale
    ).entropy
    log_p = torch.log_softmax((hidden.double() @ weight.T.double()), -1)
    wanted = -(log_p.exp() * log_p).sum(-1)
    return float(((got.double() - wanted) / wanted).abs().max())


def _broken(device: torch.device) -> float:
    """How many values of other rows change where one row is NaN; and whether that row's entropy says so."""
    case = Case(rows=20)
    given = draw_case(case, device)
    before = _see(case, given)
    given.hidden[7, 3] = torch.nan
    after = _see(case, given)
    others = torch.arange(20, device=device) != 7
    assert before.signal is not None and after.signal is not None
    pairs = [(before.argmax, after.argmax), (before.sample, after.sample), (before.entropy, after.entropy)]
    changed = sum(int((a[others] != b[others]).sum()) for a, b in [*pairs, (before.signal, after.signal)])
    inside = 0 <= int(after.sample[7]) < case.vocab and 0 <= int(after.argmax[7]) < case.vocab
    return float(changed + (not bool(after.entropy[7].isnan())) + (not inside))


def _in_blocks(device: torch.device) -> float:
    """How many tokens and entropies change when the rows go through in blocks of 16, the last one smaller."""
    from blockpress.ops.kernels import vocabulary

    case = Case(rows=37, banned=3)
    given = draw_case(case, device)
    whole, block = _see(case, given), vocabulary.BLOCK
    try:
        vocabulary.BLOCK = 16 * case.vocab * 4
        parts = _see(case, given)
    finally:
        vocabulary.BLOCK = block
    assert whole.signal is not None and parts.signal is not None
    signal = distance(parts.signal, whole.signal) > 1e-5
    return float((whole.argmax != parts.argmax).sum() + (whole.sample != parts.sample).sum() + signal)


def bench(report: GpuReport) -> None:
    """Every kind of signal at 256 to 8,192 rows, of flat rows and of sure ones; then the products alone."""
    for rows in (256, 512, 1024, 4096):
        for kind in (None, "exact", "sparse"):
            case = replace(PUBLISHED, rows=rows, signal=kind)
            _measure(report, f"{kind or 'no signal'} rows={rows}", case)
    for spread in (0.0, 20.0):
        _measure(report, f"sparse rows=256 spread={spread:.0f}", replace(PUBLISHED, signal="sparse", spread=spread))
    given = _filled(PUBLISHED)
    share = torch.rand(256, PUBLISHED.vocab, device="cuda").to(PUBLISHED.dtype)
    floor = _floor_ms(PUBLISHED, 1)
    _time(report, "cuBLAS head rows=256", lambda: given.hidden @ given.weight.T, floor)
    _time(report, "cuBLAS soft embedding rows=256", lambda: share @ given.weight, floor)


def _measure(report: GpuReport, name: str, case: Case) -> None:
    given = _filled(case)
    products = 1 if case.signal in (None, "sparse") else 2
    _time(report, name, lambda: _see(case, given), _floor_ms(case, products))
    del given
    torch.cuda.empty_cache()


def _time(report: GpuReport, name: str, work: Callable[[], object], floor: float) -> None:
    try:
        taken = captured(work)
    except Exception as reason:  # a case that does not fit must not end the other figures
        report.note(f"{name}: {type(reason).__name__}: {reason}")
        return
    report.add(name, taken.least, "ms", floor)
    report.add(f"{name} median", taken.median, "ms", floor)


def _filled(case: Case) -> Given:
    """Random inputs without the truth's logits, which would be gigabytes."""
    device = torch.device("cuda")
    hidden = torch.randn(case.rows, case.width, device=device, dtype=case.dtype)
    weight = torch.randn(case.vocab, case.width, device=device, dtype=case.dtype) * (case.spread / case.width**0.5)
    return Given(
        hidden=hidden,
        weight=weight,
        temperature=torch.full((case.rows,), 0.6, device=device),
        uniform=torch.rand(case.rows, device=device, dtype=torch.float64),
        banned=None,
        scale=torch.tensor(case.width**0.5, device=device, dtype=case.dtype),
        scaled=hidden[:, :0].float(),
    )


def _floor_ms(case: Case, products: int) -> float:
    """Each product's operations, or the bytes of its weight and of the logits (written or read once), if longer.

    >>> round(_floor_ms(PUBLISHED, 1), 2)
    0.48
    """
    flops = 2 * case.rows * case.vocab * case.width
    bytes_ = (case.width + case.rows) * case.vocab * case.dtype.itemsize
    return 1000 * products * max(flops / DEVICE.rate("bfloat16"), bytes_ / DEVICE.bandwidth)
