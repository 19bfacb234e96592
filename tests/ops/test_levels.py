"""What is in C++ at every ISA level that this processor has: the comparisons of test_cpu.py and test_fused.py."""

from __future__ import annotations

import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from blockpress.hardware import isa, processor
from blockpress.ops import compiled
from blockpress.ops.cpu import bridge
from tests.forks import python
from tests.model import test_fused as layers
from tests.ops import test_cpu as operations
from tests.ops import test_integers as integers

ROOT = Path(__file__).parents[2]
LEVELS = [level for level in processor().levels if level != isa()]
"""The one in use is what all other tests run on."""


def compare(level: str) -> None:
    """Run in a process of that level."""
    library = bridge.library()
    assert isa() == level and library is not None and f"forward-{level}-" in library._name
    torch.set_num_threads(1)
    with torch.inference_mode():
        for own, stored in operations.PAIRS:
            for case in operations.LARGE:
                operations.test_linear_larger_than_a_block_equals_torch(case, own, stored)
            operations.test_strided_operands_give_the_same(own, stored, 5)
            operations.test_combine_larger_than_a_block_equals_torch(13, 2048, 300, own, stored)
            operations.test_experts_equal_the_reference("more than few", own, stored)
            operations.test_experts_equal_the_reference("few tokens", own, stored)
        for stored, rows in product(operations.HALVES, (1, 5)):
            operations.test_every_half_float_is_widened_to_the_bit(stored, rows)
        for stored in operations.HALVES:
            operations.test_every_half_float_along_the_depth(stored, 16)
        operations.test_results_are_rounded_to_bfloat16_as_torch_rounds(5)
        for case in integers.LARGE:
            integers.test_int8_linear_larger_than_a_block_follows_the_definition(case)
        for rows in (4, 5):
            integers.test_sums_equal_numpy_int32(rows)
            integers.test_strided_operands_give_the_same(rows)
            for signs in product((1, -1), (1, -1)):
                integers.test_the_largest_codes_do_not_saturate(rows, signs)
        integers.test_the_usual_error_is_small()
        integers.test_int8_experts_follow_the_definition(70)
        for case, dtype in product(operations.LOOKS, operations.TYPES):
            operations.test_attention_equals_the_reference(case, dtype, False)
    with torch.no_grad():
        for name, dtype in product(layers.CONFIGS, layers.usable()):
            layers.test_kv_only_rows_equal_the_modules(name, dtype, 6)


@pytest.mark.slow
@pytest.mark.skipif(compiled.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("level", LEVELS)
def test_every_isa_level_gives_the_same(level: str) -> None:
    code = f"from tests.ops import test_levels\ntest_levels.compare({level!r})"
    environment = os.environ | {"BLOCKPRESS_ISA": level, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*python(), "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
