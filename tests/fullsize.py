"""The whole model on this machine: load, prefill, denoise, commit, a token by itself; times, and memory against `show`.

Why: that a checkpoint of the published size runs within the memory that was promised is shown by running it, by hand,
never in CI: it needs 25 GB of disk, some 20 GB of memory, and minutes.

Invariant: what is compared is the process's peak of resident memory, file-backed pages included, less what it held
before the model was touched.

Run it:  blockpress synthesize diffusiongemma-26B-A4B /tmp/big --format nvfp4
         python -m tests.fullsize /tmp/big
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from blockpress.config import Sampling
from blockpress.decoding import Denoised
from blockpress.engine import EngineCore, EngineOptions
from blockpress.lm import load
from blockpress.plan.memory import needed, survey


def peak() -> int:
    """Bytes of the process's peak of resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Bytes of resident memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@torch.inference_mode()
def measure(path: str, prompt_length: int, steps: int) -> dict[str, object]:
    """Seconds and bytes of each part, printed as they come."""
    before, figures = peak(), {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - begun
        figures[what] = round(seconds, 2)
        print(
            f"{what:28}{seconds:9.2f} s   resident {resident() / 2**30:6.2f} GiB   peak {peak() / 2**30:6.2f} GiB",
            flush=True,
        )
        return result

    lm = timed("load", lambda: load(path))
    config = lm.config
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, config.vocab_size, (prompt_length,), generator=draw).tolist()
    core = EngineCore(lm.network, EngineOptions(max_running=2))
    sampling = Sampling(steps=steps, confidence=0.0)
    one = [*lm.build_requests([prompt], config.canvas_length + 1, 0, sampling)]
    core.submit(one[0])
    timed(f"prefill of {prompt_length}, first step", core.step)
    for number in range(2, steps + 1):
        timed(f"denoising step {number}", core.step)
    events = timed("commit, first step of the next", core.step).events
    entropies = [event.entropy for _, event in events if isinstance(event, Denoised)]
    assert entropies and all(bool(entropy.isfinite().all()) for entropy in entropies), "the entropies are not finite"
    while core.busy:
        core.step()
    tokens = [*lm.build_requests([prompt[:4]], 2, mode="autoregressive")]
    core.submit(tokens[0])
    core.step()
    timed("a token by itself", core.step)
    taken = peak() - before
    need = needed(config, prompt_length + config.canvas_length, dtype=config.dtype, files=survey(lm.path))
    off = f"{need.total / taken - 1:+.1%}" if taken else "less than before"
    print(f"predicted {need.total / 2**30:.2f} GiB, taken {taken / 2**30:.2f} GiB: {off}")
    return {"seconds": figures, "before": before, "taken": taken, "predicted": need}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps")
    chosen = parser.parse_args()
    figures = measure(chosen.path, chosen.prompt, chosen.steps)
    print(json.dumps(figures, default=vars, indent=2))


if __name__ == "__main__":
    main()
