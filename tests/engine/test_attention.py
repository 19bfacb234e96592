"""Looking through kernels is looking through pages: with attention in torch here, with the real kernels interpreted.

The interpreter needs a process of its own: `python -c "from tests.engine.test_attention import interpreted; interpreted()"`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from blockpress.config import AutoregressiveSampling, Sampling
from blockpress.decoding import Denoised
from blockpress.engine import EngineCore, EngineOptions, Request
from blockpress.engine.attention import PagedAttention, TritonPagedAttention, build_attention, kernels_for
from blockpress.engine.kv_cache import KVCache
from blockpress.ops import vocabulary
from tests.forks import python

from .driver import AnySampling, drive, prompts, reply, row
from .special import CONFIG, SHORT, InTorch, damped, on_paper, poison, special

row_of = partial(row, CONFIG)
OPTIONS = EngineOptions(memory=1 << 23, chunk=9)


def requests(max_tokens: int, steps: int = 4) -> list[Request]:
    """Canvases, checks and single tokens, so that forwards hold every kind of part."""
    how: list[AnySampling] = [
        SHORT.with_(steps=steps),
        AutoregressiveSampling(),
        SHORT.with_(steps=steps, max_verifications=1),
        SHORT.with_(steps=steps - 1),
    ]
    given = prompts(CONFIG, len(how), 30, seed=2, shared=14)
    rows = [
        special(i, given[i], one, max_tokens=max_tokens)
        if isinstance(one, Sampling)
        else row_of(i, given[i], one, max_tokens=5)  # each token is a forward
        for i, one in enumerate(how)
    ]
    return [Request(*pair) for pair in zip(rows, how, strict=True)]


def compare(attention: PagedAttention, see: Callable[..., vocabulary.SampleStats] | None = None, **given: int) -> None:
    """A core that looks through `attention`, reads through `see`, and replays, beside one that looks through pages."""
    network = damped()
    cores = [poison(EngineCore(network, OPTIONS)), poison(on_paper(network, OPTIONS, attention))]
    seen = []
    for core in cores:
        with pytest.MonkeyPatch.context() as patch:
            if see is not None and core is cores[1]:
                patch.setattr(vocabulary, "sample_from_hidden", see)
            told = drive(core, asked := requests(**given), arrivals=[0, 1, 1, 3])
        steps = [event for one in asked for event in told[one] if isinstance(event, Denoised)]
        seen.append(([reply(told[one]) for one in asked], torch.stack([step.entropy for step in steps])))
    (answers, entropy), (others, other) = seen
    assert answers == others
    torch.testing.assert_close(entropy, other, rtol=1e-3, atol=1e-4)


def interpreted() -> None:
    """What the test below runs with TRITON_INTERPRET=1."""
    from blockpress.ops.kernels import attention
    from blockpress.ops.kernels import vocabulary as kernel

    read = []

    def see(*given: Any, **more: Any) -> vocabulary.SampleStats:
        read.append(more["banned"])
        return kernel.sample_from_hidden(*given, **more)

    compare(attention, see, max_tokens=13, steps=2)
    assert len(read) > 4 and any(banned is not None for banned in read)
    print("alike")


def test_span_attention_gives_the_tokens_of_page_attention() -> None:
    compare(InTorch(), max_tokens=29)


@pytest.mark.interpreter
def test_triton_attention_gives_the_tokens_of_page_attention() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*python(), "-c", "from tests.engine.test_attention import interpreted; interpreted()"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "alike\n", done.stderr


def test_kernels_are_used_only_on_gpus_and_supported_heads() -> None:
    """And for heads that they can read: of powers of two, from 16 on."""
    store = EngineCore(damped(), OPTIONS).kv_cache
    assert store.dims == {16, 32} and kernels_for(store) is None
    pytest.importorskip("triton")
    for dims, found in (({256, 512}, True), ({8, 16}, False), ({96}, False)):
        assert (kernels_for(Mock(spec=KVCache, device=torch.device("cuda"), dims=dims)) is not None) == found


def test_pictures_use_page_attention() -> None:
    """The tokens of a picture see each other in both directions, which is no span of the kernels."""
    core = on_paper(damped(), OPTIONS)
    [request] = requests(14)[:1]
    request.row.images = {2: torch.zeros(5, CONFIG.hidden_size)}
    kinds = []

    def listening(*given: object) -> object:
        found = build_attention(*given)  # type: ignore[arg-type]
        kinds.append({type(look) for look in found})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blockpress.engine.runner.build_attention", listening)
        drive(core, [request])
    assert TritonPagedAttention not in kinds[0]
    assert {TritonPagedAttention} in kinds
