"""One forward: a schedule without tensors goes in, an output per request comes out.

    schedule --batch--> rows --embed, begin_step--> stack over pages --finish_step--> next canvases, step outputs

Each request has a slot, which holds its canvas between two forwards; each is at a step of its own. On a GPU a forward
of canvases only is a captured graph (`cuda_graphs.py`).

All inputs are sent before the forward. After it the host waits for the device once, for the flags and the argmax of
every canvas, whether hidden states are finite, and the sampled tokens of autoregressive requests. A forward of prompts
only is not waited for. What else waits: scoring drafts (`scoring.score_tokens`), and, without Triton, experts that are
not run all at once (`ops/experts.py`) and the sparse self-conditioning embedding (`ops/vocabulary/`).

Invariant: a failed forward can be run again, request by request: a second run writes the same into the same pages, and
if canvases have moved on to their next step, `stepped` says that they must not run again.
Run it:  python -m pytest tests/engine/test_runner.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpress.decoding import Denoised
from blockpress.engine.attention import build_attention, kernels_for
from blockpress.engine.batch import Batch, Part
from blockpress.engine.canvas_state import CanvasState, StepFeatures
from blockpress.engine.cuda_graphs import CudaGraphs, why_not_capturable
from blockpress.engine.denoising import CanvasBatch, StepInputs, StepOutputs, begin_step, finish_step, packed_entry
from blockpress.engine.kv_cache import KVCache
from blockpress.engine.options import EngineOptions
from blockpress.engine.request import Request
from blockpress.engine.scheduler import ScheduledRequest
from blockpress.model import Network
from blockpress.model.pictures import insert_images
from blockpress.ops.transfer import to_device, to_host
from blockpress.shapes import Hidden


@dataclass(frozen=True, kw_only=True, eq=False)
class RunnerOutput:
    """What a forward did for one request.

    denoised: the step, if there was one. canvas: its argmax, if the step was its last. hidden: the final hidden states
    of its logit rows. sampled: the tokens sampled from them, or the exception of sampling. is_finite: False if a number
    is NaN or infinite; then the rest is meaningless.
    """

    scheduled: ScheduledRequest
    denoised: Denoised | None = None
    canvas: list[int] | None = None
    hidden: Tensor | None = None
    sampled: list[int] | BaseException | None = None
    is_finite: bool = True


SampledTokens = Mapping[Request, Tensor | BaseException]
"""Sampled token ids on the device, 1-D, for some requests; an exception concerns that request only."""

Sampler = Callable[[Sequence[ScheduledRequest], Mapping[Request, Tensor]], SampledTokens]
"""Samples tokens from the hidden states of each request's logit rows, without waiting for the device."""


class Runner:
    """Runs forwards of one network over the pages of a KV cache.

    captured: None if every forward is eager; then `eager` says why. stepped: whether a forward failed after its
    canvases had moved on to their next step.
    """

    def __init__(self, network: Network, options: EngineOptions, kv_cache: KVCache, sampler: Sampler) -> None:
        self.network, self.options, self.kv_cache, self.sampler = network, options, kv_cache, sampler
        self.slots = CanvasState(network, options.max_running)
        self.attention = kernels_for(kv_cache)
        self.stepped = False
        self.captured: CudaGraphs | None = None
        self._why_eager = (
            "it is not on a GPU" if kv_cache.device.type != "cuda" else why_not_capturable(network, self.attention)
        )
        if self._why_eager is None and self.attention is not None:
            self.captured = CudaGraphs(network, self.slots, kv_cache, options.soft_embedding, self.attention)

    @property
    def eager(self) -> str | None:
        """Why no forward is captured; None if forwards of canvases only are."""
        return self._why_eager if self.captured is None else self.captured.failed

    @torch.inference_mode()
    def run(self, scheduled: Sequence[ScheduledRequest]) -> list[RunnerOutput]:
        """One forward for all scheduled requests; an output for each."""
        with self.on_device():
            return self._run(scheduled)

    def on_device(self) -> AbstractContextManager[object]:
        """Makes the network's GPU the current one, which streams, events and kernels use."""
        return torch.cuda.device(self.kv_cache.device) if self.kv_cache.device.type == "cuda" else nullcontext()

    def _run(self, scheduled: Sequence[ScheduledRequest]) -> list[RunnerOutput]:
        self.stepped = False
        batch = Batch.of(scheduled, self.network.config.canvas_length)
        features = self.slots.begin([part.request for part in batch.canvases])
        step: StepOutputs | None = None
        logit_states = torch.empty(0, self.network.config.hidden_size, dtype=self.network.dtype)
        if self.captured is not None and batch.canvases and not (batch.num_causal or features.custom):
            step = self.captured.step(batch.canvases, features)
        if step is None and batch.num_rows:
            logit_states, step = self._forward(batch, features)
        self.stepped = step is not None
        logit_rows = {
            part.request: slice(part.start - batch.num_kv_only, part.stop - batch.num_kv_only)
            for part in batch.with_logits
        }
        hidden = {request: logit_states[rows] for request, rows in logit_rows.items()}
        sampled = self.sampler(scheduled, hidden)
        finite, words, tokens = self._to_host(logit_states, step, sampled)
        steps = {} if step is None else self._steps(batch, step, words)
        outputs = []
        for item in scheduled:
            request = item.request
            denoised, canvas, is_finite = steps.get(request, (None, None, True))
            is_finite = is_finite and (request not in logit_rows or bool(finite[logit_rows[request]].all()))
            outputs.append(
                RunnerOutput(
                    scheduled=item,
                    denoised=denoised,
                    canvas=canvas,
                    hidden=hidden.get(request),
                    sampled=tokens.get(request),
                    is_finite=is_finite,
                )
            )
        self.stepped = False
        return outputs

    def _forward(self, batch: Batch, features: StepFeatures) -> tuple[Tensor, StepOutputs | None]:
        """An eager forward: the hidden states of the logit rows, and the outputs of the canvases' step, if any."""
        network, device = self.network, self.network.device
        canvases = None
        if batch.canvases:
            canvases = CanvasBatch.of(to_device(torch.tensor([packed_entry(part) for part in batch.canvases]), device))
        x, image_runs = self._embed(batch)
        attends = build_attention(self.kv_cache, batch, network.windows(), image_runs, device, self.attention)
        positions, causal = batch.positions(device), batch.causal(device)
        inputs: StepInputs | None = None
        if canvases is not None:
            inputs = begin_step(network, self.slots, canvases, features)
            x = torch.cat((x, inputs.x), dim=1) if batch.num_causal else inputs.x
        hidden = network.run(x, positions, attends, causal=causal, skip=batch.num_kv_only)[0]
        logit_states = hidden[: batch.num_causal - batch.num_kv_only]
        if canvases is None or inputs is None:
            return logit_states, None
        states = hidden[batch.num_causal - batch.num_kv_only :]
        requests = [part.request for part in batch.canvases] if features.custom else ()
        signal = self.options.soft_embedding
        return logit_states, finish_step(network, self.slots, canvases, features, inputs, states, signal, requests)

    def _embed(self, batch: Batch) -> tuple[Hidden, Mapping[Part, Tensor]]:
        """The embeddings of the causal rows, with image features put in; and for parts with images, which image each
        token belongs to (-1: text)."""
        network, device = self.network, self.network.device
        causal, image_runs = (*batch.kv_only, *batch.with_logits), {}
        tokens = [token for part in causal for token in part.tokens]
        x = network.embed(to_device(torch.tensor(tokens, dtype=torch.long), device)[None])
        for part in causal:
            images = part.images
            if images:
                rows = slice(part.start, part.stop)
                x[:, rows], marks = insert_images(x[:, rows], torch.tensor([part.stop - part.start]), [images])
                if network.pictures_see_themselves:
                    image_runs[part] = marks[0]
        return x, image_runs

    def _to_host(
        self, logit_states: Tensor, step: StepOutputs | None, sampled: SampledTokens
    ) -> tuple[Tensor, Tensor, dict[Request, list[int] | BaseException]]:
        """Whether each logit row's state is finite, the step's `packed_results`, the sampled tokens; all on the host.

        It is one copy, and the one wait of a forward; if there is nothing to copy, nothing waits.
        """
        queued = {request: ids for request, ids in sampled.items() if isinstance(ids, Tensor)}
        parts = [logit_states.isfinite().all(-1).long(), *queued.values()]
        parts += [] if step is None else [step.packed_results.flatten()]
        parts = [part for part in parts if len(part)]
        copied = to_host(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.long)
        sizes = [len(logit_states), *map(len, queued.values())]
        finite, *ids_on_host = copied[: sum(sizes)].split(sizes)
        tokens: dict[Request, list[int] | BaseException] = {
            request: failed for request, failed in sampled.items() if isinstance(failed, BaseException)
        }
        tokens |= {request: ids.tolist() for request, ids in zip(queued, ids_on_host, strict=True)}
        words = copied[sum(sizes) :]
        return finite != 0, words if step is None else words.view(step.packed_results.shape), tokens

    def _steps(
        self, batch: Batch, outputs: StepOutputs, words: Tensor
    ) -> dict[Request, tuple[Denoised, list[int] | None, bool]]:
        """For every canvas its step, its argmax if it is finished, and whether all its numbers are finite."""
        results = {}
        for i, part in enumerate(batch.canvases):
            request, (settled, ended, finite, *argmax) = part.request, words[i].tolist()
            denoised = Denoised(
                row=request.row.index,
                canvas=len(request.row.canvases),
                step=request.step + 1,
                argmax=outputs.argmax[i],
                accepted=outputs.accepted[i],
                entropy=outputs.entropy[i],
                changed=outputs.changed[i],
                settled=bool(settled),
                retry=request.row.retry,
                verifications=request.row.verifications,
                repairs=len(request.row.repairs),
            )
            results[request] = (denoised, argmax if ended and finite else None, bool(finite))
        return results
