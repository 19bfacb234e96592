"""The network in bfloat16: no farther from the oracle's float32 result than the oracle's own bfloat16 run is."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from .checkpoints import CASES, OPS, compared, oracle
from .conftest import Report
from .oracle import (
    kinds,
    layer_calls,
    network_like,
    our_figures,
    our_layer,
    their_figures,
    to_bfloat16,
    widened,
)

pytestmark = pytest.mark.parity

WHOLE, LAYER, SAME_ROUNDING = 1.3, 1.1, 0.6
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_the_bfloat16_network_is_as_near_to_float32_as_the_oracle_s(name: str, report: Report) -> None:
    """Ours is as far from the float32 truth as the oracle's own bfloat16 run is.

    Compared is the geometric mean of a token's relative error, over all tokens of every row, seed and figure of a
    group. Where rounding sends a token to another expert its error jumps a hundredfold, and who is hit is chance: in
    the plain mean the oracle's own eager and SDPA runs differ by up to ten times, in this one by up to 1.35.

    The factor 1.3: both runs round the same maths at the same places in another order of summation, so that the two
    means have one expectation. Over twelve seeds and all cases the ratio lay between 0.88 and 1.10.
    """
    errors: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(CASES[name].seeds):
        c = compared(name, seed, rounded=True)
        low = to_bfloat16(c.theirs)
        for how, op in (("eager", "plain"), ("sdpa", "fused")):
            theirs = [their_figures(low, row, how, told) for row, told in zip(c.rows, c.signals, strict=True)]
            ours = our_figures(network_like(low, CASES[name].config, OPS[op]), c.rows, c.signals)
            for kind in kinds(c.eager[0]):
                for who, figures in ((how, theirs), (op, ours)):
                    own = (by_token(a[kind], b[kind]) for a, b in zip(figures, c.eager, strict=True))
                    errors[group(kind)][who] += own
    for kind, by in errors.items():
        mean = {who: geometric_mean(rows) for who, rows in by.items()}
        for op, how in (("plain", "eager"), ("fused", "sdpa")):
            ratio = mean[op] / mean[how]
            report(f"bfloat16, our distance over theirs, {kind}", ratio, WHOLE)
            assert ratio <= WHOLE, f"{kind}, {op}: {mean[op]:.2e} from float32, theirs {mean[how]:.2e}"


@cases
def test_one_bfloat16_layer_rounds_where_the_oracle_s_does(name: str, report: Report) -> None:
    """One layer in bfloat16 rounds where the oracle's does.

    Fed with the oracle's bfloat16 input, it is as far from the float32 layer as the oracle's (1.1: measured 0.97 to
    1.01), and nearer to the oracle's than that (0.6 of it: measured 0.27 to 0.41). A rounding that one of the two has
    and the other has not would part them by as much as both are from float32.
    """
    errors: dict[tuple[str, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    high, rows = oracle(name, 0, True)
    low, exact = to_bfloat16(high), network_like(high, CASES[name].config)
    for how, op in (("eager", "plain"), ("sdpa", "fused")):
        network = network_like(low, CASES[name].config, OPS[op])
        for row in rows:
            for call in layer_calls(low, row, how):
                truth, ours, theirs = our_layer(exact, widened(call))[0], our_layer(network, call)[0], call.y[0]
                by = errors[op, "causal" if call.causal else "canvas"]
                by["ours"].append(by_token(ours, truth))
                by["theirs"].append(by_token(theirs, truth))
                by["between"].append(by_token(ours, theirs))
    for (op, kind), by in errors.items():
        mean = {who: geometric_mean(rows) for who, rows in by.items()}
        ratio = mean["ours"] / mean["theirs"]
        report(f"bfloat16, one layer alone, our distance over theirs ({kind})", ratio, LAYER)
        assert ratio <= LAYER, f"{op} {kind}: {mean}"
        apart = float(torch.cat(by["between"]).median() / torch.cat(by["theirs"]).median())
        report(f"bfloat16, one layer alone, between us over theirs ({kind})", apart, SAME_ROUNDING)
        assert apart <= SAME_ROUNDING, f"{op} {kind}: the rounding differs"


def group(kind: str) -> str:
    """What a figure tells about: the context, the causal pass or the canvas."""
    if "key" in kind or "value" in kind:
        return "cached keys and values"
    return "canvas logits" if "denoise" in kind else "causal states and logits"


def geometric_mean(errors: list[Tensor]) -> float:
    return float(torch.cat(errors).clamp(min=1e-12).log().mean().exp())


def by_token(low: Tensor, high: Tensor) -> Tensor:
    """||low - high|| / ||high|| of every token; keys and values [heads, tokens, dim] from the end, as they are kept."""
    low, high = low.double(), high.double()
    if high.ndim == 3:
        low = low[:, low.shape[1] - high.shape[1] :].transpose(0, 1).flatten(1)
        high = high.transpose(0, 1).flatten(1)
    return (low - high).norm(dim=-1) / high.norm(dim=-1)
