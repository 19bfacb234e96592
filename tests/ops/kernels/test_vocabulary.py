"""The vocabulary's kernels on the CPU, through Triton's interpreter, and what the compiler makes of them for Hopper.

The checks themselves are those of the GPU harness (`blockpress/bench/gpu/vocabulary.py`), each against full logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from blockpress.bench.gpu.vocabulary import VocabularyCase, checks, draw_case

kernels = pytest.importorskip("blockpress.ops.kernels.probabilities", exc_type=ImportError)

pytestmark = pytest.mark.interpreter

SMALL = [check.name for check in checks() if not check.large]


@pytest.mark.parametrize("name", SMALL)
def test_the_vocabulary_kernels_equal_full_logits(
    name: str, checked: Callable[[str], dict[str, dict[str, Any]]]
) -> None:
    line = checked("vocabulary")[name]
    assert line["passed"], line


def test_the_compiler_uses_the_matrix_unit_and_spills_nothing(compiled: Callable[[str], list[str]]) -> None:
    for part, count in (("multiply 256 rows", 4), ("head sample", 1), ("probabilities select", 1)):
        lines = compiled(part)
        assert len(lines) == count
        for line in lines:
            registers, spills, _, programs, wgmma, sync = (int(word) for word in line.split()[-6:])
            assert spills == 0 and sync == 0 and programs >= 1 and registers <= 255, line
            assert (wgmma > 0) == ("multiply" in line), line


def test_a_sparse_batch_has_rows_of_both_kinds() -> None:
    """Few likely tokens, and so many that all are read: else the check of its signal would say nothing of one of them."""
    case = VocabularyCase(rows=6, vocab=4500, signal="sparse", spread=12.0, banned=3)
    probabilities = torch.softmax(draw_case(case, torch.device("cpu")).scaled, -1)
    likely = probabilities > kernels.LEAST
    covered = (probabilities * likely).sum(-1) > 1 - kernels.DROPPED
    assert 0 < int((covered & (likely.sum(-1) <= kernels.KEPT)).sum()) < case.rows
