"""Attention over pages on the CPU, through Triton's interpreter, and what the compiler makes of it for Hopper.

The checks themselves are those of the GPU harness (`blockpress/bench/gpu/attention.py`), each against
`ops.attention.plain` over gathered keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockpress.bench.gpu.attention import CANVAS, CAUSAL, _mask, checks
from blockpress.model.masks import canvas_mask, causal_mask

pytest.importorskip("triton")

pytestmark = pytest.mark.interpreter

SMALL = [check.name for check in checks() if not check.large]


@pytest.mark.parametrize("name", SMALL)
def test_the_attention_kernel_equals_the_reference(
    name: str, checked: Callable[[str], dict[str, dict[str, Any]]]
) -> None:
    line = checked("attention")[name]
    assert line["passed"], line


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_the_checks_masks_are_the_models(window: int | None) -> None:
    for span in CANVAS:
        lengths = torch.tensor([span.stop])
        assert torch.equal(_mask(span, window), canvas_mask(lengths, span.stop, span.count, window)[0])
    for span in CAUSAL:
        before = span.stop - span.count
        wanted = causal_mask(torch.tensor([before]), before, span.count, window)[0]
        assert torch.equal(_mask(span, window), wanted)


def test_the_compiler_uses_the_matrix_unit_and_spills_nothing(compiled: Callable[[str], list[str]]) -> None:
    for part in ("attend sliding 256 rows", "attend full 256 rows"):
        lines = compiled(part)
        assert len(lines) == 1
        registers, spills, _, programs, wgmma, sync = (int(word) for word in lines[0].split()[-6:])
        assert spills == 0 and sync == 0 and wgmma > 0 and programs >= 1 and registers <= 255, lines[0]
