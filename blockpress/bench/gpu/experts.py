"""The experts' kernels: checked against `ops.experts.moe_loop`, and timed against the bytes of their weights.

Figures: 30 layers with distinct weights in one captured graph, so that no weight is in a cache; a layer's time is the
graph's over 30. The floor is the longer of the time of the chosen experts' bytes and that of the operations
(`costs.roofline`).

Invariant: what is measured is what `ops.experts.moe_forward` calls.
Run it:  make check-gpu; make bench-gpu PART=experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from blockpress.bench.gpu.check import KernelCheck, different, distance
from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.routed import BYTES, KINDS, PUBLISHED, ROUTINGS, ExpertShape, hidden_rows, routing, weight
from blockpress.bench.gpu.timing import captured, layer_floor_ms
from blockpress.ops import experts as plain
from blockpress.ops.geglu import geglu
from blockpress.ops.packed import E4M3, Codes
from blockpress.ops.weight import Packed

LAYERS = 30
SMALL = ExpertShape(experts=6, hidden=128, size=64, top_k=2)
ODD = ExpertShape(experts=5, hidden=96, size=96, top_k=3)
LONG = ExpertShape(experts=2, hidden=64, size=320, top_k=1)
"""Five times 64, which no tile of 128 divides, as the published size is eleven times 64."""

OFTEN = ("bfloat16", "e4m3", "int4 g32", "nvfp4")
"""The kinds that are measured, and that a CPU checks along long sums; the others share their kernels."""

LIMIT, FP8_LIMIT, FP8_PLAIN_LIMIT = 8e-3, 1e-2, 6e-2
"""Limits: bfloat16 rounding; with fp8 activations, where the plain version rounds them too, and where it does not."""


def checks() -> list[KernelCheck]:
    """Routing; every kind of weight under every routing, small; sizes that tiles do not divide; the published sizes."""
    cases = _routing_checks()
    for kind in KINDS:
        limit, rare = FP8_LIMIT if kind == "e4m3" else LIMIT, kind not in OFTEN
        packed = kind not in ("bfloat16", "e4m3")  # what routes their tokens is the same code
        cases += [_case(kind, how, SMALL, 17, limit, large=packed and how != "skewed") for how in ROUTINGS]
        cases += [_case(kind, "uniform", SMALL, 1, limit, large=packed)]
        cases += [_case(kind, "uniform", replace(SMALL, experts=3), 70, limit, large=packed)]
        cases += [_case(kind, "one", LONG, 3, limit, large=rare)]
        if kind in ("bfloat16", "e4m3"):  # tiles of 128 tokens
            cases += [_case(kind, "uniform", replace(SMALL, experts=2, top_k=1), 150, limit)]
        if kind != "int4 g64":
            cases += [_case(kind, "skewed", ODD, 21, limit)]
        for tokens in (1, 16, 256, 512, 1024):
            cases += [_case(kind, how, PUBLISHED, tokens, limit, large=True) for how in ROUTINGS]
    plain_fp8 = partial(_mixed, "e4m3", "uniform", SMALL, 17, rounds=False)
    cases += [KernelCheck(name="e4m3 against unrounded activations", limit=FP8_PLAIN_LIMIT, error=plain_fp8)]
    for tokens in (1, 40):
        cases += [KernelCheck(name=f"bfloat16 in float32 tokens={tokens}", limit=1e-6, error=partial(_exact, tokens))]
    for kind, shape, limit in (("bfloat16", SMALL, LIMIT), ("bfloat16", ODD, LIMIT), ("e4m3", SMALL, FP8_LIMIT)):
        error = partial(_mixed, kind, "skewed", shape, 19, descriptor=True)
        cases += [KernelCheck(name=f"{kind} descriptor {shape.hidden}", limit=limit, error=error)]
    return cases


def _routing_checks() -> list[KernelCheck]:
    cases = []
    shape = ExpertShape(experts=13, hidden=0, size=0, top_k=5)
    for how in ROUTINGS:
        for tokens, tile in ((1, 16), (40, 16), (250, 32)):
            error = partial(_arranged, how, tokens, tile, shape)
            cases += [KernelCheck(name=f"routing sorted {how} tokens={tokens} tile={tile}", limit=0, error=error)]
    for experts, top in ((4, 2), (37, 5), (128, 8)):
        error = partial(_routed, experts, top)
        cases += [KernelCheck(name=f"routing chosen {experts} experts top {top}", limit=1e-6, error=error)]
    return [*cases, *(KernelCheck(name=f"routing ties {top}", limit=0, error=partial(_ties, top)) for top in (1, 3))]


def _case(kind: str, how: str, shape: ExpertShape, tokens: int, limit: float, large: bool = False) -> KernelCheck:
    name = f"{kind} {how} {shape.experts}x{shape.hidden}x{shape.size} tokens={tokens}"
    return KernelCheck(name=name, limit=limit, error=partial(_mixed, kind, how, shape, tokens), large=large)


def _weights(kind: str, shape: ExpertShape, device: torch.device, seed: int) -> tuple[Tensor | Packed, Tensor | Packed]:
    first = weight(kind, (shape.experts, 2 * shape.size, shape.hidden), device, seed)
    return first, weight(kind, (shape.experts, shape.hidden, shape.size), device, seed + 1)


def _mixed(
    kind: str,
    how: str,
    shape: ExpertShape,
    tokens: int,
    device: torch.device,
    *,
    rounds: bool = True,
    descriptor: bool = False,
) -> float:
    """The distance of `moe_forward` from the plain loop in float32 over the unpacked weights."""
    from blockpress.ops.kernels import experts as kernels

    seed = int(torch.randint(1 << 30, ()))
    gate_up, down = _weights(kind, shape, device, seed)
    x = hidden_rows(tokens, shape.hidden, device, seed + 2, torch.bfloat16)
    weights, chosen = routing(how, tokens, shape, device, seed + 3)
    tiles = kernels.choose_tiles(kernels.packing_of(gate_up), chosen.numel(), shape.experts)  # type: ignore[arg-type]
    if descriptor:
        tiles = kernels.ExpertTiles(
            gate_up=replace(tiles.gate_up, descriptor=True), down=replace(tiles.down, descriptor=True)
        )
    got = kernels.moe_forward(x, weights, chosen, gate_up, down, tiles)
    if isinstance(gate_up, Codes) and isinstance(down, Codes) and rounds:
        return distance(got, rounded_loop(x, weights, chosen, gate_up, down))
    floats = [w.float() if isinstance(w, Tensor) else w.unpack(torch.float32) for w in (gate_up, down)]
    return distance(got, plain.moe_loop(x.float(), weights, chosen, *floats))


def rounded_loop(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """`ops.experts.moe_loop` in float32, with activations rounded to e4m3 where the kernels round them."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        rounded = _rounded(x[token].float(), x.shape[1])
        gate, up = (rounded @ gate_up[expert].unpack(torch.float32).T).chunk(2, dim=-1)
        y = _rounded(geglu(gate, up), 64) @ down[expert].unpack(torch.float32).T
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def _rounded(x: Tensor, group: int) -> Tensor:
    """Values rounded to e4m3 with one scale a group."""
    parts = x.split(group, -1)
    scales = [part.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448 for part in parts]
    return torch.cat([(x / scale).to(E4M3).float() * scale for x, scale in zip(parts, scales, strict=True)], dim=-1)


def _exact(tokens: int, device: torch.device) -> float:
    """The same kernels on float32, where only the order of sums differs."""
    from blockpress.ops.kernels import experts as kernels

    gate_up, down = (weight.float() for weight in _weights("bfloat16", SMALL, device, tokens))  # type: ignore[union-attr]
    x = hidden_rows(tokens, SMALL.hidden, device, 5, torch.float32)
    weights, chosen = routing("uniform", tokens, SMALL, device, tokens)
    got = kernels.moe_forward(x, weights, chosen, gate_up, down)
    return distance(got, plain.moe_loop(x, weights, chosen, gate_up, down))


def _arranged(how: str, tokens: int, tile: int, shape: ExpertShape, device: torch.device) -> float:
    """How many entries differ from a stable sort and from tiles listed one by one."""
    from blockpress.ops.kernels.routing import arrange

    _, chosen = routing(how, tokens, shape, device, int(torch.randint(1 << 30, ())))
    got = arrange(chosen, shape.experts, tile)
    expected, begin = [], 0
    for expert, count in enumerate(torch.bincount(chosen.flatten(), minlength=shape.experts).tolist()):
        expected += [[expert, first, min(begin + count, first + tile)] for first in range(begin, begin + count, tile)]
        begin += count
    work, used = torch.tensor(expected, dtype=torch.int32), len(expected)
    rest = got.work[used:, 0]
    order = chosen.flatten().argsort(stable=True).int()
    return different(got.order, order.cpu()) + different(got.work[:used, :3], work) + float((rest != -1).sum())


def _routed(experts: int, top: int, device: torch.device) -> float:
    """The distance of the router's weights, scattered over all experts so that a wrong choice counts."""
    from blockpress.ops.kernels.routing import route

    scores = hidden_rows(23, experts, device, experts + top, torch.float32) * 3
    scale = torch.rand(experts, device=device) + 0.5
    dense = [torch.zeros(23, experts, device=device) for _ in range(2)]
    routed = (route(scores, top, scale), plain.route(scores, top, scale))
    for out, (weights, chosen) in zip(dense, routed, strict=True):
        out.scatter_(1, chosen.long(), weights)
    return distance(*dense)


def _ties(top: int, device: torch.device) -> float:
    """Of equal scores the experts of lowest index are taken, in order."""
    from blockpress.ops.kernels.routing import route

    _, chosen = route(torch.zeros(5, 16, device=device), top, torch.ones(16, device=device))
    return different(chosen, torch.arange(top, dtype=torch.int32).expand(5, top))


def bench(report: GpuReport) -> None:
    """Every kind of weight at 256 tokens, uniform and skewed; then larger batches; then other tiles."""
    device = torch.device("cuda")
    for kind in OFTEN:
        stack = [_weights(kind, PUBLISHED, device, 2 * layer) for layer in range(LAYERS)]
        for how, tokens in (*((how, 256) for how in ROUTINGS), *(("uniform", 1 << i) for i in range(9, 14))):
            _measure(report, kind, how, tokens, stack)
        for label, tiles in _others(kind):
            _measure(report, kind, "uniform", 256, stack, label, tiles)
        del stack
        torch.cuda.empty_cache()


def _measure(
    report: GpuReport, kind: str, how: str, tokens: int, stack: list, label: str = "", tiles: object = None
) -> None:
    from blockpress.ops.kernels import experts as kernels

    device = torch.device("cuda")
    x = hidden_rows(tokens, PUBLISHED.hidden, device, 1, torch.bfloat16)
    routes = [routing(how, tokens, PUBLISHED, device, layer) for layer in range(LAYERS)]
    touched = sum(float(chosen.unique().numel()) for _, chosen in routes) / LAYERS

    def run() -> None:
        for (gate_up, down), (weights, chosen) in zip(stack, routes, strict=True):
            kernels.moe_forward(x, weights, chosen, gate_up, down, tiles)  # type: ignore[arg-type]

    floor = layer_floor_ms(tokens, touched, BYTES[kind], "fp8" if kind == "e4m3" else "bfloat16")
    name = f"{kind} {how} M={tokens}{label}"
    try:
        taken = captured(run)
    except Exception as reason:  # a tile that does not fit must not end the other figures
        report.note(f"{name}: {type(reason).__name__}: {reason}")
        return
    report.add(name, taken.least / LAYERS, "ms", floor)
    report.add(f"{name} median", taken.median / LAYERS, "ms", floor)


def _others(kind: str) -> Iterator[tuple[str, object]]:
    """Alternatives to the chosen tiles at 256 tokens: the first to try when tuning."""
    from blockpress.ops.kernels.experts import choose_tiles

    code = kind.partition(" ")[0]
    base = choose_tiles(code, 256 * PUBLISHED.top_k, PUBLISHED.experts)
    changes: list[dict[str, object]] = [{"stages": 3}, {"stages": 5}, {"depth": 64}, {"tokens": 16}, {"warps": 8}]
    if code in ("bfloat16", "e4m3"):
        changes.append({"descriptor": True})
    for change in changes:
        down = {key: value for key, value in change.items() if key != "depth"}
        yield f" {change}", replace(base, gate_up=replace(base.gate_up, **change), down=replace(base.down, **down))  # type: ignore[arg-type]
