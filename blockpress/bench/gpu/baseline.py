"""The same config in `transformers`: random weights, bfloat16, one denoising step, eager and compiled.

The step is the model's decoder with self-conditioning over a filled cache, and its head with the soft embedding,
temperature and multinomial sample as its generation loop computes them.

Invariant: none of our code runs in what is timed.
Run it:  make bench-gpu PART=baseline
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from blockpress.bench.gpu.report import GpuReport
from blockpress.bench.gpu.steps import CONTEXT
from blockpress.bench.gpu.timing import DEVICE, timed
from blockpress.config import PRESETS, ModelConfig
from blockpress.config.vision import MINIMAL_TOWER
from blockpress.costs import WIDTHS, BatchShape, floor_seconds, forward_cost

BATCHES = (1, 4)
TEMPERATURE = 0.6


@torch.inference_mode()
def bench(report: GpuReport) -> None:
    """Eager, then compiled, in batches of canvases after the same context as our steps."""
    try:
        model = build(replace(PRESETS["diffusiongemma-26B-A4B"](), vision=None), torch.device("cuda"))
    except Exception as reason:  # another version of the package, or none: the other parts do not need it
        report.note(f"no baseline: {type(reason).__name__}: {str(reason)[:300]}")
        return
    for batch in BATCHES:
        parts = forward_cost(
            PRESETS["diffusiongemma-26B-A4B"](), WIDTHS["bf16"], BatchShape(canvases=(CONTEXT,) * batch)
        )
        floor = 1000 * floor_seconds(parts, DEVICE)
        work = baseline_step(model, batch, CONTEXT)
        for how, run in (("eager", work), ("compiled", torch.compile(work))):
            try:
                taken = timed(run, warmups=2, repeats=5)
            except Exception as reason:  # not every version compiles
                report.note(f"{how} B={batch}: {type(reason).__name__}: {str(reason)[:300]}")
                continue
            report.add(f"transformers {how} B={batch}", taken.least, "ms", floor)
            report.add(f"transformers {how} B={batch} median", taken.median, "ms", floor)


def build(config: ModelConfig, device: torch.device) -> Any:
    """The model of that config in bfloat16, with the package's own random weights."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    data = config.to_dict() | {"vision_config": dict(MINIMAL_TOWER)}
    data["text_config"] |= {"use_bidirectional_attention": "vision"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(data)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def baseline_step(model: Any, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """A denoising step over a filled cache; call it in inference mode."""
    from transformers import DynamicCache

    text, device = model.config.text_config, model.device
    tokens, canvas = (
        torch.randint(text.vocab_size, (batch, length), device=device)
        for length in (context, model.config.canvas_length)
    )
    parameters = inspect.signature(model.forward).parameters
    # Renamed in version 5.24.
    cache = {"cache" if "cache" in parameters else "past_key_values": DynamicCache(config=text)}
    previous_logits = model(input_ids=tokens, decoder_input_ids=canvas, **cache).logits.to(torch.bfloat16)

    def run() -> torch.Tensor:
        out = model(decoder_input_ids=canvas, **cache, self_conditioning_logits=previous_logits)
        scaled = out.logits.float() / TEMPERATURE
        probabilities = torch.softmax(scaled, dim=-1)
        entropy = torch.distributions.Categorical(logits=scaled).entropy()
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(canvas.shape)
        return torch.where(entropy < 1, drawn, scaled.argmax(-1))

    return run
