"""Floors of a forward: the published tables, and what must hold for any rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpress import costs
from blockpress.config import PRESETS
from blockpress.costs import DEVICES, WIDTHS, BatchShape
from blockpress.errors import RequestError

PUBLISHED, TINY = PRESETS["diffusiongemma-26B-A4B"](), PRESETS["tiny"]()
L = 2048

# Reference kernels, section 1: milliseconds of a step for 1, 2, 4, 8, 16 and 32 canvases behind 2,048 tokens.
STEPS = {
    ("h200", "bf16"): (12.99, 15.35, 20.1, 29.5, 52.7, 105.3),
    ("h200", "fp8"): (7.14, 8.96, 12.6, 19.9, 36.6, 73.2),
    ("h200", "fp8-all"): (6.66, 8.01, 10.7, 16.1, 29.0, 57.9),
    ("h200", "w4a16"): (5.35, 7.72, 13.2, 26.3, 52.7, 105.3),
    ("h200", "w4"): (4.82, 6.64, 11.0, 22.0, 44.0, 88.0),
    ("h200", "w4a8"): (4.34, 5.68, 8.4, 14.5, 29.0, 57.9),
    ("h100", "bf16"): (17.8, 20.0, 24.7, 34.3, 53.3, 105.7),
    ("h100", "fp8"): (9.6, 11.3, 15.0, 22.3, 37.1, 73.7),
    ("h100", "w4a8"): (5.8, 7.0, 9.7, 15.2, 29.2, 58.4),
    ("rtx5090", "fp8"): (22.7, 31.3, 48.3, 85.7, 171, 343),
    ("rtx5090", "w4a8"): (14.3, 20.6, 33.9, 67.8, 136, 271),
}
# Tokens a second of all users, token by token, for 1, 2, 4, 8, 16, 32, 64 and 128 of them.
TOKENS = {
    "bf16": (545, 795, 1063, 1364, 1800, 2610, 4180, 6658),
    "fp8": (892, 1341, 1840, 2394, 3145, 4419, 6596, 9459),
}


@pytest.mark.parametrize(("device", "form"), STEPS, ids="-".join)
def test_costs_of_a_step_are_those_of_the_reference(device: str, form: str) -> None:
    for power, expected in enumerate(STEPS[device, form]):
        parts = costs.forward_cost(PUBLISHED, WIDTHS[form], BatchShape(canvases=(L,) * 2**power))
        assert 1000 * costs.floor_seconds(parts, DEVICES[device]) == pytest.approx(expected, rel=0.009)


@pytest.mark.parametrize("form", TOKENS)
def test_costs_of_autoregressive_decoding_are_those_of_the_reference(form: str) -> None:
    for power, expected in enumerate(TOKENS[form]):
        speed = costs.throughput(PUBLISHED, WIDTHS[form], DEVICES["h200"], 2**power, mode="autoregressive")
        assert speed == pytest.approx(expected, rel=0.009)


def test_a_commit_beside_a_step_costs_less_than_alone() -> None:
    def floor(**rows: tuple[object, ...]) -> float:
        parts = costs.forward_cost(PUBLISHED, WIDTHS["bf16"], BatchShape(**rows))  # type: ignore[arg-type]
        return 1000 * costs.floor_seconds(parts, DEVICES["h200"])

    step, commit = floor(canvases=(L,)), floor(prefills=((L - 256, 256),))
    both = floor(canvases=(L,), prefills=((L - 256, 256),))
    assert commit == pytest.approx(11.99 * 29 / 30, rel=0.01)  # the last layer's keys and values alone
    assert both - step == pytest.approx(1.37 * 29 / 30, abs=0.1)


rows = st.builds(
    BatchShape,
    canvases=st.lists(st.integers(0, 200), max_size=4).map(tuple),
    prefills=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 60)), max_size=4).map(tuple),
    logit_rows=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 12)), max_size=4).map(tuple),
)


def totals(which: BatchShape) -> tuple[float, float]:
    parts = costs.forward_cost(TINY, WIDTHS["bf16"], which).values()
    return sum(work.flops for work in parts), sum(work.bytes for work in parts)


@given(rows, rows)
def test_a_batch_is_the_same_work_with_fewer_bytes(one: BatchShape, other: BatchShape) -> None:
    both = BatchShape(
        canvases=one.canvases + other.canvases,
        prefills=one.prefills + other.prefills,
        logit_rows=one.logit_rows + other.logit_rows,
    )
    apart = [totals(one), totals(other)]
    flops, size = totals(both)
    assert flops == pytest.approx(apart[0][0] + apart[1][0])
    assert max(apart[0][1], apart[1][1]) <= size + 1e-6 and size <= apart[0][1] + apart[1][1] + 1e-6


@given(st.integers(0, 100), st.integers(1, 60), st.integers(1, 60))
def test_a_chunked_prefill_is_the_same_arithmetic(context: int, first: int, second: int) -> None:
    whole = totals(BatchShape(prefills=((context, first + second),)))
    chunks = [
        totals(BatchShape(prefills=((context, first),))),
        totals(BatchShape(prefills=((context + first, second),))),
    ]
    assert chunks[0][0] + chunks[1][0] == pytest.approx(whole[0])


def test_a_causal_layer_counts_the_pairs_of_its_mask() -> None:
    window, context, tokens = TINY.sliding_window, 5, 9
    seen = [min(context + i + 1, window) for i in range(tokens)]
    layer = TINY.layers[0]
    config = replace(TINY, layers=(layer, layer))  # a read stops before the attention of the last
    work = costs.forward_cost(config, WIDTHS["bf16"], BatchShape(prefills=((context, tokens),)))["attention sliding"]
    assert work.flops == 4 * TINY.num_heads * layer.head_dim * sum(seen)


def test_an_empty_batch_costs_nothing() -> None:
    assert costs.forward_cost(TINY, WIDTHS["fp8"], BatchShape()) == {}


def test_a_sparse_soft_embedding_and_idle_experts_are_left_out() -> None:
    step = BatchShape(canvases=(L,))
    parts = costs.forward_cost(PUBLISHED, WIDTHS["fp8"], step, soft=False, touched=84)
    last = costs.forward_cost(PUBLISHED, WIDTHS["fp8"], replace(step, goes_on=False), touched=84)
    assert "soft embedding" not in parts and parts == last
    assert parts["experts"].bytes == pytest.approx(22.84e9 * 84 / 128, rel=1e-3)


def test_an_unknown_rate_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="no rate of float32 is known of H200"):
        DEVICES["h200"].rate("float32")


def test_costs_import_no_torch() -> None:
    code = "import sys, blockpress.bench.chart, blockpress.bench.panels as p; p.roofline(p.costs.DEVICES['h100']); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
