"""One forward: a plan without tensors goes in, what came of it comes out.

    works --batch--> rows --embed, begin--> stack over pages --finish--> canvases of the next forward, what was done

Each request has a slot, in which its canvas waits between two forwards. Every request is at a step of its own. On a
GPU a forward of canvases alone is a captured graph (`cuda_graphs.py`).

Before the rows run all inputs are sent; after them the processor waits for the device once, for the flags of every
canvas, its argmax, whether what was heard is sound, and what was asked of it (the next token of an autoregressive
request). A forward of a prompt alone is not waited for. What else waits: judging a proposal (`judge.judge`); without
Triton experts that are not run all at once (`ops/grouped.py`) and the sparse signal (`ops/vocabulary/`).

Invariant: a forward that failed can be run again, request by request: pages hold what a second run of the same works
would write again, and where canvases have moved on, `stepped` says that they must not be run again.
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

    denoised: the step, where there was one. canvas: its argmax, where the step was its last. hidden: the final hidden
    states of the tokens that were heard. answer: what was asked of them, or why it could not be told. sound: False
    where a number was none (NaN): then the answer means nothing.
    """

    scheduled: ScheduledRequest
    denoised: Denoised | None = None
    canvas: list[int] | None = None
    hidden: Tensor | None = None
    sampled: list[int] | Exception | None = None
    is_finite: bool = True


SampledTokens = Mapping[Request, Tensor | Exception]
"""Whole numbers on the device for some requests, in one dimension; an exception is that request's alone."""

Sampler = Callable[[Sequence[ScheduledRequest], Mapping[Request, Tensor]], SampledTokens]
"""Asks something of the hidden states that each request's part of a forward has heard, and waits for nothing."""


class Runner:
    """Runs forwards of one network over the pages of a store.

    captured: None where every forward is eager; then `eager` says why. stepped: whether a forward failed whose
    canvases had moved on to their next step already.
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
        """Why no forward is captured; None where forwards of canvases alone are."""
        return self._why_eager if self.captured is None else self.captured.failed

    @torch.inference_mode()
    def run(self, works: Sequence[ScheduledRequest]) -> list[RunnerOutput]:
        """One forward over all works; an outcome for each."""
        with self.placed():
            return self._run(works)

    def placed(self) -> AbstractContextManager[object]:
        """Streams, events and kernels are the current GPU's, which need not be the network's: in here it is."""
        return torch.cuda.device(self.kv_cache.device) if self.kv_cache.device.type == "cuda" else nullcontext()

    def _run(self, works: Sequence[ScheduledRequest]) -> list[RunnerOutput]:
        self.stepped = False
        batch = Batch.of(works, self.network.config.canvas_length)
        rules = self.slots.begin([part.request for part in batch.canvases])
        done: StepOutputs | None = None
        heard = torch.empty(0, self.network.config.hidden_size)
        if self.captured is not None and batch.canvases and not (batch.num_causal or rules.custom):
            done = self.captured.step(batch.canvases, rules)
        if done is None and batch.num_rows:
            heard, done = self._forward(batch, rules)
        self.stepped = done is not None
        own = {
            part.request: slice(part.start - batch.num_kv_only, part.stop - batch.num_kv_only)
            for part in batch.with_logits
        }
        hidden = {request: heard[rows] for request, rows in own.items()}
        asked = self.sampler(works, hidden)
        sound, told, answers = self._to_host(heard, done, asked)
        steps = {} if done is None else self._steps(batch, done, told)
        outcomes = []
        for work in works:
            request = work.request
            denoised, canvas, whole = steps.get(request, (None, None, True))
            whole = whole and (request not in own or bool(sound[own[request]].all()))
            outcomes.append(
                RunnerOutput(
                    scheduled=work,
                    denoised=denoised,
                    canvas=canvas,
                    hidden=hidden.get(request),
                    sampled=answers.get(request),
                    is_finite=whole,
                )
            )
        self.stepped = False
        return outcomes

    def _forward(self, batch: Batch, rules: StepFeatures) -> tuple[Tensor, StepOutputs | None]:
        """The rows one by one launched: the hidden states of what was heard, and what the step did, if there is one."""
        network, device = self.network, self.network.device
        canvases = None
        if batch.canvases:
            canvases = CanvasBatch.of(to_device(torch.tensor([packed_entry(part) for part in batch.canvases]), device))
        x, runs = self._embed(batch)
        attends = build_attention(self.kv_cache, batch, network.windows(), runs, device, self.attention)
        positions, causal = batch.positions(device), batch.causal(device)
        begun: StepInputs | None = None
        if canvases is not None:
            begun = begin_step(network, self.slots, canvases, rules)
            x = torch.cat((x, begun.x), dim=1) if batch.num_causal else begun.x
        hidden = network.run(x, positions, attends, causal=causal, skip=batch.num_kv_only)[0]
        heard = hidden[: batch.num_causal - batch.num_kv_only]
        if canvases is None or begun is None:
            return heard, None
        states = hidden[batch.num_causal - batch.num_kv_only :]
        requests = [part.request for part in batch.canvases] if rules.custom else ()
        signal = self.options.soft_embedding
        return heard, finish_step(network, self.slots, canvases, rules, begun, states, signal, requests)

    def _embed(self, batch: Batch) -> tuple[Hidden, Mapping[Part, Tensor]]:
        """The input of the causal rows: embeddings, with pictures in their places; and parts with pictures."""
        network, device = self.network, self.network.device
        causal, runs = (*batch.kv_only, *batch.with_logits), {}
        tokens = [token for part in causal for token in part.tokens]
        x = network.embed(to_device(torch.tensor(tokens, dtype=torch.long), device)[None])
        for part in causal:
            shown = part.pictures
            if shown:
                rows = slice(part.start, part.stop)
                x[:, rows], marks = insert_images(x[:, rows], torch.tensor([part.stop - part.start]), [shown])
                if network.pictures_see_themselves:
                    runs[part] = marks[0]
        return x, runs

    def _to_host(
        self, heard: Tensor, done: StepOutputs | None, asked: SampledTokens
    ) -> tuple[Tensor, Tensor, dict[Request, list[int] | Exception]]:
        """Whether the states heard are sound, row by row, what the step tells, and what was asked of the states.

        All of it comes in one go: here it is waited, unless there is nothing.
        """
        queued = {request: numbers for request, numbers in asked.items() if isinstance(numbers, Tensor)}
        parts = [heard.isfinite().all(-1).long(), *queued.values()]
        parts += [] if done is None else [done.host_words.flatten()]
        parts = [part for part in parts if len(part)]
        words = to_host(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.long)
        sizes = [len(heard), *map(len, queued.values())]
        sound, *found = words[: sum(sizes)].split(sizes)
        answers: dict[Request, list[int] | Exception] = {
            request: failed for request, failed in asked.items() if isinstance(failed, Exception)
        }
        answers |= {request: numbers.tolist() for request, numbers in zip(queued, found, strict=True)}
        told = words[sum(sizes) :]
        return sound != 0, told if done is None else told.view(done.host_words.shape), answers

    def _steps(
        self, batch: Batch, done: StepOutputs, told: Tensor
    ) -> dict[Request, tuple[Denoised, list[int] | None, bool]]:
        """Of every canvas the step, its argmax where it is done, and whether all its numbers are some."""
        results = {}
        for i, part in enumerate(batch.canvases):
            request, (settled, ended, sound, *argmax) = part.request, told[i].tolist()
            denoised = Denoised(
                row=request.row.index,
                canvas=len(request.row.canvases),
                step=request.step + 1,
                argmax=done.argmax[i],
                accepted=done.accepted[i],
                entropy=done.entropy[i],
                changed=done.changed[i],
                settled=bool(settled),
                attempt=request.row.attempt,
                checks=request.row.checks,
            )
            results[request] = (denoised, argmax if ended and sound else None, bool(sound))
        return results
