"""The vocabulary's kernels: checked against full logits, and timed against their floors.

Checks compute what `denoisers.plain_denoiser` does, from full logits: the product rounded to the weight's dtype, cap
and temperature in float32, argmax, `ops.vocabulary.sample`, entropy in float64, and the rounded soft embedding. A token
may differ only where the deciding margin is below 1e-6 of the row's mass (sample) or 1e-5 (argmax): exponentials on a
GPU are not those of the host.

Invariant: what is measured is what `ops.kernels.vocabulary.sample_from_hidden` calls, captured in a graph.
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
"""Margins within which a sample may fall on either side of an edge (share of the row's mass), and an argmax differ."""


@dataclass(frozen=True, kw_only=True)
class VocabularyCase:
    """`spread`: standard deviation of the products. `banned`: how many ids are banned in some rows."""

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
class KernelInputs:
    """The arguments of `sample_from_hidden`, and the full scaled logits."""

    hidden: Tensor
    weight: Tensor
    temperature: Tensor
    uniform: Tensor
    banned: tuple[Tensor, Tensor] | None
    scale: Tensor
    scaled: Tensor


PUBLISHED = VocabularyCase(rows=256, vocab=262144, width=2816, dtype=torch.bfloat16)
SIZES = (1, 2, 16, 127, 128, 129, 4095, 4096, 4097)
"""Vocabularies around the edges of the tiles of records and of sums."""
BETWEEN = ("vocab=16", "vocab=4095", "bfloat16 no cap", "sparse bfloat16 spread=1")
"""Checks that lie between two others: a CPU leaves them out."""


def checks() -> list[KernelCheck]:
    """Sizes, caps, dtypes, kinds of soft embedding, banned ids, ties, sure rows, NaN rows; then the published size."""
    cases = {f"vocab={vocab}": VocabularyCase(vocab=vocab) for vocab in SIZES}
    cases |= {f"rows={rows}": VocabularyCase(rows=rows, vocab=200) for rows in (0, 1, 17, 130)}
    bf16 = VocabularyCase(dtype=torch.bfloat16)
    cases |= {
        "no cap": VocabularyCase(cap=None, vocab=1000),
        "width=40": VocabularyCase(width=40),
        "banned": VocabularyCase(banned=7, vocab=400),
        "ties": VocabularyCase(ties=True),
        "flat": VocabularyCase(spread=0.0),
        "sure": VocabularyCase(spread=20.0, vocab=1000),
        "bfloat16": replace(bf16, vocab=4500),
        "bfloat16 banned": replace(bf16, banned=7),
        "bfloat16 no cap": replace(bf16, cap=None),
        "no signal": replace(bf16, signal=None),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for spread in (1.0, 12.0):
            case = VocabularyCase(rows=6, vocab=4500, signal="sparse", dtype=dtype, spread=spread, banned=3)
            cases[f"sparse {str(dtype)[6:]} spread={spread:.0f}"] = case
    kernel_checks = [
        KernelCheck(name=name, limit=1, error=partial(_error, case), large=name in BETWEEN)
        for name, case in cases.items()
    ]
    kernel_checks.append(KernelCheck(name="sure rows keep the digits of their entropy", limit=1e-4, error=_sure))
    kernel_checks.append(KernelCheck(name="a broken row stays alone", limit=0, error=_broken))
    kernel_checks.append(KernelCheck(name="rows in blocks", limit=0, error=_in_blocks))
    for kind in ("exact", "sparse"):
        case = replace(PUBLISHED, signal=kind)
        kernel_checks.append(KernelCheck(name=f"published {kind}", limit=1, error=partial(_error, case), large=True))
    return kernel_checks


def _error(case: VocabularyCase, device: torch.device) -> float:
    """The largest error of tokens, entropies and soft embedding, as a share of its limit; a wrong token counts as 2.

    An entropy may be 2e-5 nat off. The "exact" soft embedding is compared with the truth as the reference rounds it;
    "sparse" differs from the unrounded one by the rounding of each probability and by the mass that it drops, except in
    rows that it does not cover, which are as the reference rounds them.
    """
    inputs = draw_case(case, device)
    stats = _run_kernel(case, inputs)
    assert len(stats.argmax) == case.rows
    if not case.rows:
        return 0.0
    worst = torch.tensor([2.0 * _wrong(case, inputs, stats), _entropy(inputs, stats) / 2e-5])
    if case.signal is None:
        return float(worst.max())
    wide = case.dtype == torch.float32
    limit = {"exact": 2e-5 if wide else 1e-3, "sparse": 2.0**-8 if wide else 8e-3}
    assert stats.signal is not None
    probabilities = torch.softmax(inputs.scaled.to(case.dtype), -1, dtype=torch.float32).to(case.dtype)
    rounded = ((probabilities @ inputs.weight) * inputs.scale).float()
    wanted = (torch.softmax(inputs.scaled, -1) @ inputs.weight.float()) * inputs.scale
    if case.signal == "sparse":
        off = [(stats.signal.float() - truth).norm(dim=-1, keepdim=True) for truth in (rounded, wanted)]
        wanted = torch.where(off[0] < off[1], rounded, wanted)
    else:
        wanted = rounded
    apart = torch.tensor(distance(stats.signal, wanted) / limit[case.signal])
    return float(torch.cat((worst, apart[None])).max())  # a NaN is the largest


def draw_case(case: VocabularyCase, device: torch.device) -> KernelInputs:
    """Random inputs, new ones on a GPU and always the same on a CPU, and the logits of the truth."""
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
    return KernelInputs(
        hidden=hidden,
        weight=weight,
        temperature=temperature,
        uniform=torch.rand(n, device=device, dtype=torch.float64),
        banned=banned,
        scale=torch.tensor(width**0.5, device=device, dtype=case.dtype),
        scaled=scaled,
    )


def _run_kernel(case: VocabularyCase, given: KernelInputs) -> SampleStats:
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


def _wrong(case: VocabularyCase, given: KernelInputs, stats: SampleStats) -> int:
    """How many tokens are wrong: not the argmax, or not the one that the uniform draw falls on."""
    wrong, level = 0, case.ties or case.spread == 0
    for row in range(case.rows):
        shares = torch.softmax(given.scaled[row].double(), -1)
        best, got, drawn = given.scaled[row].argmax(), stats.argmax[row], stats.sample[row]
        near = not level and bool(given.scaled[row, best] - given.scaled[row, got] < NEAR)
        wrong += int(got != best and not near)
        cumulative = shares.cumsum(-1)
        before, until = cumulative[drawn] - shares[drawn], cumulative[drawn]
        wrong += int(not (before - MARGIN <= given.uniform[row] <= until + MARGIN) or shares[drawn] == 0)
    return wrong


def _entropy(given: KernelInputs, stats: SampleStats) -> float:
    """The largest difference to float64, in nats."""
    log_p = torch.log_softmax(given.scaled.double(), -1)
    wanted = -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)
    return float((stats.entropy.double() - wanted).abs().max())


def _sure(device: torch.device) -> float:
    """The largest relative error of entropies from 1e-2 down to 1e-9 nat: one token far above 999 equal ones."""
    from blockpress.ops.kernels.vocabulary import sample_from_hidden

    lead = torch.tensor([10.0, 15.0, 20.0, 25.0, 30.0], device=device)
    weight = torch.zeros(1000, 16, device=device)
    weight[123, 0] = 1
    hidden = torch.zeros(5, 16, device=device)
    hidden[:, 0] = lead
    uniform = torch.full((5,), 0.5, device=device, dtype=torch.float64)
    ones, scale = torch.ones(5, device=device), torch.ones((), device=device)
    got = sample_from_hidden(
        hidden, weight, cap=None, temperature=ones, uniform=uniform, signal=None, scale=scale
    ).entropy
    log_p = torch.log_softmax((hidden.double() @ weight.T.double()), -1)
    wanted = -(log_p.exp() * log_p).sum(-1)
    return float(((got.double() - wanted) / wanted).abs().max())


def _broken(device: torch.device) -> float:
    """How many values of other rows change where one row is NaN; plus 1 if that row's entropy is not NaN."""
    case = VocabularyCase(rows=20)
    given = draw_case(case, device)
    before = _run_kernel(case, given)
    given.hidden[7, 3] = torch.nan
    after = _run_kernel(case, given)
    others = torch.arange(20, device=device) != 7
    assert before.signal is not None and after.signal is not None
    pairs = [(before.argmax, after.argmax), (before.sample, after.sample), (before.entropy, after.entropy)]
    changed = sum(int((a[others] != b[others]).sum()) for a, b in [*pairs, (before.signal, after.signal)])
    inside = 0 <= int(after.sample[7]) < case.vocab and 0 <= int(after.argmax[7]) < case.vocab
    return float(changed + (not bool(after.entropy[7].isnan())) + (not inside))


def _in_blocks(device: torch.device) -> float:
    """How many tokens and soft embeddings change when rows are processed in blocks of 16, the last one smaller."""
    from blockpress.ops.kernels import vocabulary

    case = VocabularyCase(rows=37, banned=3)
    given = draw_case(case, device)
    whole, block = _run_kernel(case, given), vocabulary.BLOCK
    try:
        vocabulary.BLOCK = 16 * case.vocab * 4
        parts = _run_kernel(case, given)
    finally:
        vocabulary.BLOCK = block
    assert whole.signal is not None and parts.signal is not None
    signal = distance(parts.signal, whole.signal) > 1e-5
    return float((whole.argmax != parts.argmax).sum() + (whole.sample != parts.sample).sum() + signal)


def bench(report: GpuReport) -> None:
    """Every kind of soft embedding at 256 to 4,096 rows, then flat and sure rows; then the products alone."""
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


def _measure(report: GpuReport, name: str, case: VocabularyCase) -> None:
    given = _filled(case)
    products = 1 if case.signal in (None, "sparse") else 2
    _time(report, name, lambda: _run_kernel(case, given), _floor_ms(case, products))
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


def _filled(case: VocabularyCase) -> KernelInputs:
    """Random inputs without the truth's logits, which would be gigabytes."""
    device = torch.device("cuda")
    hidden = torch.randn(case.rows, case.width, device=device, dtype=case.dtype)
    weight = torch.randn(case.vocab, case.width, device=device, dtype=case.dtype) * (case.spread / case.width**0.5)
    return KernelInputs(
        hidden=hidden,
        weight=weight,
        temperature=torch.full((case.rows,), 0.6, device=device),
        uniform=torch.rand(case.rows, device=device, dtype=torch.float64),
        banned=None,
        scale=torch.tensor(case.width**0.5, device=device, dtype=case.dtype),
        scaled=hidden[:, :0].float(),
    )


def _floor_ms(case: VocabularyCase, products: int) -> float:
    """Milliseconds of each product's operations, or of its weight's and the logits' bytes (moved once), if longer.

    >>> round(_floor_ms(PUBLISHED, 1), 2)
    0.48
    """
    flops = 2 * case.rows * case.vocab * case.width
    bytes_ = (case.width + case.rows) * case.vocab * case.dtype.itemsize
    return 1000 * products * max(flops / DEVICE.rate("bfloat16"), bytes_ / DEVICE.bandwidth)
